"""Does it pay to sum gradients while others are still computed? `distprop run -n 2 benchmarks/overlap.py`.

The backward products of 784-2048-2048-10 on 128 rows, last layer first, and four ways to sum their results over the
ranks, which take turns: one blocking Allreduce at the end; an Iallreduce for each layer, tested after each product; a
thread that calls Allreduce for each layer; and what `DataParallel` does on one node, a sum in shared memory at the end.
Medians of the slowest rank.
"""

from __future__ import annotations

import argparse
import itertools
import queue
import statistics
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

import distprop as dp

Way: TypeAlias = tuple[Callable[[int], object], Callable[[], object]]  # after each gradient; at the end

WIDTHS, ROWS = (784, 2048, 2048, 10), 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps: 1 or more")
    comm = dp.world()
    private, message = np.zeros(count(), np.float32), comm.allocate(count(), np.float32)
    gradients = cut(private)
    ways: dict[str, tuple[list[np.ndarray], Way]] = {
        "products alone": (gradients, (lambda layer: None, lambda: None)),
        "blocking Allreduce": (gradients, blocking(private)),
        "tested Iallreduce": (gradients, tested(gradients)),
        "Allreduce in a thread": (gradients, threaded(gradients)),
        "sum in shared memory": (cut(message), (lambda layer: None, lambda: comm.allreduce(message))),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.steps + 2):
        for name, (places, (ready, finish)) in ways.items():
            comm.barrier()
            began = time.perf_counter()
            backward(places, ready)
            finish()
            seconds = time.perf_counter() - began
            times[name].append(max(np.frombuffer(b"".join(comm.allgather(np.float64(seconds).tobytes()))).tolist()))
    if comm.rank == 0:
        for name, seconds in times.items():
            print(f"{name:<24}{1e3 * statistics.median(seconds[2:]):8.2f} ms")


def count() -> int:
    return sum(a * b for a, b in itertools.pairwise(WIDTHS))


def cut(message: np.ndarray) -> list[np.ndarray]:
    """The weights' gradients as views, first layer first; the last layer lies in front."""
    views, start = [], 0
    for inputs, outputs in reversed(list(itertools.pairwise(WIDTHS))):
        views.append(message[start : start + inputs * outputs].reshape(outputs, inputs))
        start += inputs * outputs
    return views[::-1]


_RNG = np.random.default_rng(0)
_X = [_RNG.standard_normal((ROWS, width), np.float32) for width in WIDTHS]
_W = [_RNG.standard_normal((b, a), np.float32) for a, b in itertools.pairwise(WIDTHS)]


def backward(gradients: list[np.ndarray], ready: Callable[[int], object]) -> None:
    """dW = gᵀ x and dx = g W of each layer, last first; `ready(layer)` after each dW."""
    for layer in reversed(range(len(_W))):
        np.matmul(_X[layer + 1].T, _X[layer], out=gradients[layer])
        ready(layer)
        if layer:
            _X[layer + 1] @ _W[layer]
            ready(-1)


def blocking(whole: np.ndarray) -> Way:
    from mpi4py import MPI

    return lambda layer: None, lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, whole)


def tested(gradients: list[np.ndarray]) -> Way:
    from mpi4py import MPI

    requests: list[MPI.Request] = []

    def ready(layer: int) -> None:
        MPI.Request.Testall(requests)
        if layer >= 0:
            requests.append(MPI.COMM_WORLD.Iallreduce(MPI.IN_PLACE, gradients[layer]))

    def finish() -> None:
        MPI.Request.Waitall(requests)
        requests.clear()

    return ready, finish


def threaded(gradients: list[np.ndarray]) -> Way:
    from mpi4py import MPI

    work: queue.Queue[int] = queue.Queue()
    comm = MPI.COMM_WORLD.Dup()

    def serve() -> None:
        while True:
            comm.Allreduce(MPI.IN_PLACE, gradients[work.get()])
            work.task_done()

    threading.Thread(target=serve, daemon=True).start()
    return lambda layer: work.put(layer) if layer >= 0 else None, work.join


if __name__ == "__main__":
    main()
