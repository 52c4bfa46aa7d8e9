"""What both workers do alike: the order of events, so that neither library has an advantage by it.

A worker makes a `Training` and gives it to `take_turns` or to `train_mnist`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from networks import BATCHES, NETWORKS, Product, batches

CHECKED = 5  # first steps, of which both libraries must have the same losses
WARM_UP = 5  # steps after those
ACCURACY = 0.98  # of MNIST's test images


class Training(Protocol):
    """A model with its optimizer in one of the libraries, on this rank."""

    rank: int
    size: int

    def step(self, x: Any, y: Any) -> float:
        """Forward, loss, zero_grad, backward, clipping, update; returns this rank's loss."""

    def convert(self, x: np.ndarray, y: np.ndarray) -> tuple[Any, Any]:
        """A batch as the library wants it."""

    def gather(self, value: float) -> list[float]:
        """The values of all ranks."""


def take_turns(
    training: Training,
    name: str,
    make_products: Callable[[Product], Callable[[], None]],
    about: Callable[[], dict[str, Any]],
) -> None:
    """Make the first steps, say what they were like, and then do what `programs.Program` asks for, until it hangs up.

    What they were like: the mapping that `about()` returns, seconds from the command to the end of the first step, the
    losses of the first steps, and the largest memory of a rank in bytes. `make_products(product)` returns a function
    that computes a layer's matrix products once.
    """
    stream = (training.convert(x, y) for x, y in batches(name, training.rank))
    losses = [training.step(*next(stream))]
    first_step = time.time() - float(os.environ["COMPARE_BEGAN"])
    losses += [training.step(*next(stream)) for _ in range(CHECKED - 1)]
    prepared = itertools.cycle(list(itertools.islice(stream, BATCHES)))
    for _ in range(WARM_UP):
        training.step(*next(prepared))
    first = {
        **about(),
        "losses": [statistics.fmean(training.gather(loss)) for loss in losses],
        "first_step_seconds": max(training.gather(first_step)),
        "peak_bytes": max(training.gather(peak_bytes())),
    }
    layers: list[Callable[[], None]] = []

    def step() -> None:
        training.step(*next(prepared))

    def products() -> None:
        for layer in layers:
            layer()

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["COMPARE_TURNS"])
        with connection.makefile("rw") as channel:
            print(json.dumps(first if training.rank == 0 else None), file=channel, flush=True)
            for line in channel:
                what, count = line.split()
                if what == "products" and not layers:
                    layers += [make_products(product) for product in NETWORKS[name].products]
                    products()
                times = _times({"steps": step, "products": products}[what], int(count))
                print(json.dumps(statistics.median(times)), file=channel, flush=True)


def _times(function: Callable[[], None], count: int) -> list[float]:
    """Seconds of each call."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return times


def train_mnist(
    training: Training,
    data: Sequence[np.ndarray],
    set_lr: Callable[[float], None],
    count_right: Callable[[Any, Any], int],
    epochs: int,
    seed: int,
) -> dict[str, Any]:
    """Train with 64 images a rank until `ACCURACY` of the test images are right, looked at twice an epoch.

    The learning rate falls in a straight line from 0.1 to 0. Both libraries see the same images in the same order.
    """
    x, y, test_x, test_y = data
    share = slice(training.rank, None, training.size)
    test = training.convert(test_x[share], test_y[share])
    per_epoch = len(x) // (64 * training.size)
    total = epochs * per_epoch
    accuracy, step = 0.0, 0
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(x))
        for batch in np.split(order[: per_epoch * 64 * training.size], per_epoch):
            mine = batch[share]
            set_lr(0.1 * (1 - step / total))
            training.step(*training.convert(x[mine], y[mine]))
            step += 1
            if step % (per_epoch // 2) == 0:
                accuracy = sum(training.gather(count_right(*test))) / len(test_y)
                if accuracy >= ACCURACY:
                    break
        if accuracy >= ACCURACY:
            break
    seconds = time.time() - float(os.environ["COMPARE_BEGAN"])
    return {"seconds": seconds, "steps": step, "accuracy": accuracy, "reached": accuracy >= ACCURACY}


def operands(product: Product) -> list[np.ndarray]:
    """x, W and g of a layer, and arrays for y, dW and dx."""
    rng = np.random.default_rng(0)
    copies = (product.copies,) if product.copies > 1 else ()
    shapes = [(product.rows, product.inputs), (product.outputs, product.inputs), (product.rows, product.outputs)]
    inputs = [rng.normal(size=(*copies, *shape)).astype(np.float32) for shape in shapes]
    return [*inputs, np.empty_like(inputs[2]), np.empty_like(inputs[1]), np.empty_like(inputs[0])]


def peak_bytes() -> int:
    """The most memory this process has had so far: the kernel's VmHWM, libraries and shared pages included."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0
