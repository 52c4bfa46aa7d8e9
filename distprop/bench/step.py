"""Where the time of a training step goes, beside a hand-written NumPy loop for the same network.

The two take turns in one run, block by block, because machines drift; medians are over all steps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from distprop import functional as F
from distprop import nn, optim
from distprop.comm import Communicator
from distprop.environment import blas_description
from distprop.parallel import DataParallel
from distprop.random import manual_seed
from distprop.tape import Array

LR, MOMENTUM = 0.01, 0.9
BLOCK = 10  # steps before the other one has its turn


@dataclass(frozen=True)
class StepTimes:
    """Medians in seconds a step."""

    forward: float
    backward: float
    reduce: float
    update: float
    total: float
    by_hand: float

    @property
    def ratio(self) -> float:
        """The package's step over the hand-written one's."""
        return self.total / self.by_hand


def bench_step(
    comm: Communicator, sizes: Sequence[int] = (784, 512, 512, 10), batch: int = 128, steps: int = 300
) -> StepTimes:
    """Time `steps` steps of a ReLU network of `sizes`, `batch` rows on each rank, SGD with momentum."""
    rng = np.random.default_rng(comm.rank)
    batches = [
        (rng.normal(size=(batch, sizes[0])).astype(np.float32), rng.integers(0, sizes[-1], batch)) for _ in range(16)
    ]
    ours, by_hand = _package_step(comm, sizes), _hand_written_step(comm, sizes)
    times: list[tuple[float, ...]] = []
    hand_times: list[float] = []
    for start in range(-BLOCK, steps, BLOCK):  # the first block of each warms up
        for number in range(start, start + BLOCK):
            taken = ours(*batches[number % 16])
            if start >= 0:
                times.append(taken)
        for number in range(start, start + BLOCK):
            taken = by_hand(*batches[number % 16])
            if start >= 0:
                hand_times.append(taken[-1])
    forward, backward, reduce, update, total = np.median(np.array(times), axis=0).tolist()
    return StepTimes(forward, backward, reduce, update, total, float(np.median(hand_times)))


def relu_network(sizes: Sequence[int]) -> nn.Sequential:
    """Fully connected layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _package_step(comm: Communicator, sizes: Sequence[int]) -> Callable[[Array, Array], tuple[float, ...]]:
    manual_seed(0)
    model = relu_network(sizes)
    optimizer = optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    parallel = DataParallel(model, comm)

    def step(x: Array, y: Array) -> tuple[float, ...]:
        t0 = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(parallel(x), y)
        t1 = time.perf_counter()
        loss.backward()
        t2 = time.perf_counter()
        optimizer.step()
        t3 = time.perf_counter()
        return t1 - t0, t2 - t1 - parallel.reduce_seconds, parallel.reduce_seconds, t3 - t2, t3 - t0

    return step


def _hand_written_step(comm: Communicator, sizes: Sequence[int]) -> Callable[[Array, Array], tuple[float, ...]]:
    """The same network as one would write it for itself: no tape, no layers, in-place where that is natural."""
    rng = np.random.default_rng(0)
    weights = [
        rng.uniform(-1, 1, (outputs, inputs)).astype(np.float32) / np.float32(inputs**0.5)
        for inputs, outputs in itertools.pairwise(sizes)
    ]
    biases = [np.zeros(outputs, np.float32) for outputs in sizes[1:]]
    parameters = [*weights, *biases]
    velocities = [np.zeros_like(p) for p in parameters]
    depth = len(weights)

    def step(x: Array, y: Array) -> tuple[float]:
        began = time.perf_counter()
        inputs = [x]
        for layer in range(depth):
            z = inputs[-1] @ weights[layer].T
            z += biases[layer]
            inputs.append(np.maximum(z, 0, out=z) if layer < depth - 1 else z)
        scores = inputs.pop()
        scores -= scores.max(axis=1, keepdims=True)
        p = np.exp(scores)
        p /= p.sum(axis=1, keepdims=True)
        rows = np.arange(len(y))
        float(-np.log(p[rows, y]).mean())
        p[rows, y] -= 1
        g = p
        g /= np.float32(len(y))
        grads: list[Array] = [*weights, *biases]
        for layer in reversed(range(depth)):
            grads[layer] = g.T @ inputs[layer]
            grads[depth + layer] = g.sum(axis=0)
            if layer:
                g = g @ weights[layer]
                g *= inputs[layer] > 0
        for parameter, velocity, grad in zip(parameters, velocities, grads, strict=True):
            if comm.size > 1:
                comm.allreduce(grad)
                grad /= comm.size
            velocity *= np.float32(MOMENTUM)
            velocity += grad
            parameter -= np.float32(LR) * velocity
        return (time.perf_counter() - began,)

    return step


def show(times: StepTimes, sizes: Sequence[int], batch: int, ranks: int) -> str:
    """The table that `distprop bench step` prints."""
    network = "-".join(map(str, sizes))
    lines = [
        f"{network}, batch {batch} a rank, {ranks} rank{'s' * (ranks > 1)}, float32",
        f"BLAS: {blas_description()}",
    ]
    lines += [
        f"  {name:<10}{seconds * 1e3:9.3f} ms"
        for name, seconds in (
            ("forward", times.forward),
            ("backward", times.backward),
            ("reduce", times.reduce),
            ("update", times.update),
            ("total", times.total),
            ("by hand", times.by_hand),
        )
    ]
    rate = batch * ranks / times.total
    return "\n".join([*lines, f"{times.ratio:.2f} times the hand-written NumPy loop; {rate:,.0f} samples/s"])
