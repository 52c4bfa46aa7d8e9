"""What looking at gradients and units costs: training with it beside the same training without, in one process.

The two take turns, block by block, because machines drift. A look is also timed by itself, against the steps between
the looks of the same run: it comes so seldom that its share is lost in the noise of whole blocks.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distprop import functional as F
from distprop import nn, optim
from distprop.bench.step import LR, MOMENTUM, relu_network
from distprop.comm import Communicator
from distprop.data.dataset import ArrayDataset
from distprop.environment import blas_description
from distprop.health import EVERY, is_looked_at
from distprop.metrics import StepResult
from distprop.random import manual_seed
from distprop.train import Trainer

BLOCK = 2 * EVERY  # steps before the other one has its turn
LIMIT = 0.02  # of step time


@dataclass(frozen=True)
class HealthTimes:
    """Medians in seconds: a step of each training, and in the one with looks a step that is looked at, and one not."""

    with_looks: float
    without: float
    look: float
    between: float

    @property
    def overhead(self) -> float:
        """What looks add to training, by the steps that are looked at."""
        return (self.look / self.between - 1) / EVERY

    @property
    def of_blocks(self) -> float:
        """The same by whole blocks of steps."""
        return self.with_looks / self.without - 1


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """784-512-512-10 with ReLU, and the shape of an example."""
    return relu_network((784, 512, 512, 10)), (784,)


def convolutional() -> tuple[nn.Module, tuple[int, ...]]:
    """Two 5×5 convolutions with pooling and two layers behind them, that of examples/mnist_conv.py."""
    model = nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(20, 40, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(640, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    return model, (1, 28, 28)


NETWORKS: Mapping[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "mlp": mlp,
    "convolutional": convolutional,
}


def bench_health(comm: Communicator, network: str, batch: int = 128, steps: int = 1000) -> HealthTimes:
    """Train one of NETWORKS with and without looks, `steps` steps each, with `batch` rows on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [_Run(comm, network, batch, Path(folder, str(health)), health) for health in (True, False)]
        blocks: list[list[float]] = [[], []]
        for number in range(1 + max(2, steps // BLOCK)):  # the first block warms up, and looks more often
            for place in (0, 1) if number % 2 else (1, 0):
                taken = runs[place].block()
                if number:
                    blocks[place].append(taken)
    by_step = runs[0].seconds
    looks = [seconds for step, seconds in by_step.items() if step > BLOCK and is_looked_at(step, EVERY)]
    others = [seconds for step, seconds in by_step.items() if step > BLOCK and not is_looked_at(step, EVERY)]
    with_looks, without = (float(np.median(of_one)) / BLOCK for of_one in blocks)
    return HealthTimes(with_looks, without, float(np.median(looks)), float(np.median(others)))


class _Run:
    """A training that goes on block by block, and the seconds of each of its steps."""

    def __init__(self, comm: Communicator, network: str, batch: int, folder: Path, health: bool) -> None:
        manual_seed(0)
        model, shape = NETWORKS[network]()
        rng = np.random.default_rng(0)
        rows = BLOCK * batch * comm.size // 10
        self._examples = ArrayDataset(rng.normal(size=(rows, *shape)).astype(np.float32), rng.integers(0, 10, rows))
        self._trainer = Trainer(
            model,
            F.cross_entropy,
            optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM),
            comm=comm,
            batch_size=batch * comm.size,
            run_dir=folder,
            health=health,
            callbacks=[self._note],
            progress=False,
        )
        self.seconds: dict[int, float] = {}
        self._before = 0.0

    def block(self) -> float:
        """Train one block; its seconds."""
        began = self._before = time.perf_counter()
        self._trainer.fit(self._examples, steps=BLOCK)
        return time.perf_counter() - began

    def _note(self, result: StepResult) -> None:
        now = time.perf_counter()
        self.seconds[result.step], self._before = now - self._before, now


def show(network: str, times: HealthTimes, batch: int, ranks: int) -> str:
    """What `distprop bench health` prints of one network."""
    lines = [
        f"{network}, batch {batch} a rank, {ranks} rank{'s' * (ranks > 1)}, a look every {EVERY} steps",
        f"BLAS: {blas_description()}",
    ]
    lines += [
        f"  {name:<24}{seconds * 1e3:9.3f} ms"
        for name, seconds in (
            ("a step with looks", times.with_looks),
            ("a step without", times.without),
            ("a step looked at", times.look),
            ("a step between looks", times.between),
        )
    ]
    verdict = "within" if times.overhead < LIMIT else "ABOVE"
    return "\n".join(
        [
            *lines,
            f"looks add {times.overhead:.2%} to training ({times.of_blocks:+.2%} by whole blocks, noise included): "
            f"{verdict} the limit of {LIMIT:.0%}",
        ]
    )
