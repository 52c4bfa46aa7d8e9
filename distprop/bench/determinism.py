"""What the same bits on any number of ranks cost: steps of a deterministic trainer beside those of a default one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distprop import functional as F
from distprop import optim
from distprop.bench.step import LR, MOMENTUM, relu_network
from distprop.comm import Communicator
from distprop.data import ArrayDataset
from distprop.environment import blas_description
from distprop.metrics import StepResult
from distprop.random import manual_seed
from distprop.train import Trainer

BLOCK = 5  # steps before the other one has its turn


@dataclass(frozen=True)
class DeterminismTimes:
    """Medians in seconds a step."""

    default: float
    deterministic: float

    @property
    def cost(self) -> float:
        """How much longer a deterministic step takes, as a share of the default one."""
        return self.deterministic / self.default - 1


def bench_determinism(
    comm: Communicator, sizes: Sequence[int], batch_size: int, shards: int, steps: int
) -> DeterminismTimes:
    """Time `steps` steps of each kind on global batches of `batch_size` rows."""
    rng = np.random.default_rng(0)
    rows = 16 * batch_size
    dataset = ArrayDataset(rng.normal(size=(rows, sizes[0])).astype(np.float32), rng.integers(0, sizes[-1], rows))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    trainers = {kind: _trainer(comm, sizes, batch_size, shards, kind, seconds[kind]) for kind in (True, False)}
    for _ in range(-(-steps // BLOCK) + 1):
        for trainer in trainers.values():
            trainer.fit(dataset, steps=BLOCK)
    return DeterminismTimes(*(statistics.median(seconds[kind][BLOCK:]) for kind in (False, True)))


def show(times: DeterminismTimes, sizes: Sequence[int], batch_size: int, shards: int, ranks: int) -> str:
    """The table that `distprop bench determinism` prints."""
    return "\n".join(
        [
            f"{'-'.join(map(str, sizes))}, global batch {batch_size}, {shards} shards, {ranks} rank{'s' * (ranks > 1)}",
            f"BLAS: {blas_description()}",
            f"  default       {times.default * 1e3:9.3f} ms",
            f"  deterministic {times.deterministic * 1e3:9.3f} ms",
            f"the same bits on any number of ranks cost {times.cost:+.1%}",
        ]
    )


def _trainer(
    comm: Communicator, sizes: Sequence[int], batch_size: int, shards: int, deterministic: bool, seconds: list[float]
) -> Trainer:
    manual_seed(0)
    model = relu_network(sizes)

    def note(result: StepResult) -> None:
        seconds.append(result.seconds)

    return Trainer(
        model,
        F.cross_entropy,
        optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM),
        comm=comm,
        batch_size=batch_size,
        deterministic=deterministic,
        shards=shards,
        callbacks=[note],
        progress=False,
    )
