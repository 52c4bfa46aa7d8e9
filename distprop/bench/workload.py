"""A training step to be timed: a model with its loss, its optimizer and as many rows as are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distprop import functional as F
from distprop import nn, optim
from distprop.bench.links import time_together
from distprop.bench.step import LR, MOMENTUM, relu_network
from distprop.comm import Communicator, SoloCommunicator
from distprop.config import Config
from distprop.job import prepare
from distprop.parallel import DataParallel
from distprop.random import at, manual_seed
from distprop.tape import Array

LONG_SECONDS = 1.0  # a step that takes longer is timed at fewer sizes, so that a measurement takes less than a minute


@dataclass(frozen=True)
class Workload:
    """What a step trains, and on what."""

    name: str
    model: nn.Module
    loss: Callable[..., Any]
    optimizer: optim.Optimizer
    batch: Callable[[int], tuple[Array, Array]]

    @property
    def message_bytes(self) -> int:
        """What a step sends: one gradient for each parameter."""
        return sum(parameter.data.nbytes for parameter in self.model.parameters() if parameter.requires_grad)

    def step(self, comm: Communicator, rows: int) -> Callable[[], None]:
        """A function that makes one update with `rows` rows on this rank."""
        parallel = DataParallel(self.model, comm)
        x, y = self.batch(rows)

        def step() -> None:
            at(0, 0, comm.rank * rows)  # for dropout, as a Trainer does
            self.optimizer.zero_grad()
            self.loss(parallel(x), y).backward()
            self.optimizer.step()

        return step


def network(sizes: Sequence[int]) -> Workload:
    """A ReLU network of these widths on random numbers; SGD with momentum."""
    manual_seed(0)
    model = relu_network(sizes)
    rng = np.random.default_rng(0)

    def batch(rows: int) -> tuple[Array, Array]:
        return rng.normal(size=(rows, sizes[0])).astype(np.float32), rng.integers(0, sizes[-1], rows)

    optimizer = optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    return Workload("-".join(map(str, sizes)), model, F.cross_entropy, optimizer, batch)


def configured(config: Config) -> Workload:
    """The model, loss and optimizer of a configuration, on its own data."""
    task = prepare(config)

    def batch(rows: int) -> tuple[Array, Array]:
        x, y = task.train_set[np.arange(rows) % len(task.train_set)]
        return x, y

    layers = [layer for layer in task.model if isinstance(layer, nn.Linear)]
    name = "-".join(map(str, [layers[0].in_features, *(layer.out_features for layer in layers)]))
    return Workload(name, task.model, getattr(F, config.train.loss), task.optimizer, batch)


def time_alone(workload: Workload, comm: Communicator, rows: int, seconds: float) -> tuple[tuple[int, float], ...]:
    """(rows, seconds) of a step without messages, for one row and for numbers around `rows`. Collective.

    All ranks compute at once; each figure is what the slowest takes, since the others wait for it.
    """

    def timed(rows: int) -> float:
        return time_together(comm, workload.step(SoloCommunicator(), rows), seconds)

    taken = {rows: timed(rows)}
    if taken[rows] < LONG_SECONDS:
        taken |= {other: timed(other) for other in {rows // 4, 4 * rows} if other > 1}
    if rows > 1:
        taken[1] = timed(1)
    return tuple(sorted(taken.items()))
