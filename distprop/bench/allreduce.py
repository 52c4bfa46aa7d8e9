"""How long the ranks take to add up an array, beside the MPI library's own blocking Allreduce in the same run.

Both work in place on memory of `allocate` that was written just before, as gradients are, and take turns. The time
is that of the slowest rank from a common start; every sum is compared with what it must be.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distprop.comm import Communicator
from distprop.tape import Array

SIZES = (1e-3, 1e-2, 1e-1, 1, 2.7, 10, 23, 100)  # MB, of 10⁶ bytes
_MOVED = 600e6  # bytes reduced for each size, which says how often
_PATTERN = 251  # whole numbers below it, so that float32 adds them exactly


@dataclass(frozen=True)
class AllreduceTimes:
    """Medians in seconds of summing `bytes` of float32 over the ranks."""

    bytes: int
    seconds: float
    library_seconds: float
    repeats: int

    @property
    def ratio(self) -> float:
        """How many times faster than the library's Allreduce."""
        return self.library_seconds / self.seconds


def bench_allreduce(
    comm: Communicator, library: Communicator, megabytes: Sequence[float] = SIZES, repeats: int | None = None
) -> Iterator[AllreduceTimes]:
    """Time `comm.allreduce` and `library.allreduce`, the plain one of the same ranks, for each size.

    Raises:
        ArithmeticError: a sum is wrong.
    """
    for size in megabytes:
        count = max(1, round(size * 1e6 / 4))
        times = repeats or int(np.clip(_MOVED / (4 * count), 15, 300))
        ours, theirs = _time_in_turns((comm, library), count, times)
        yield AllreduceTimes(4 * count, ours, theirs, times)


def _time_in_turns(communicators: Sequence[Communicator], count: int, repeats: int) -> list[float]:
    rank, size = communicators[0].rank, communicators[0].size
    pattern = (np.arange(count) % _PATTERN).astype(np.float32)
    expected = size * pattern + np.float32(size * (size - 1) // 2)
    arrays = [comm.allocate(count, np.float32) for comm in communicators]
    times: list[list[float]] = [[] for _ in communicators]
    for _ in range(repeats + 2):  # the first two warm up
        for comm, array, seconds in zip(communicators, arrays, times, strict=True):
            np.add(pattern, rank, out=array)
            comm.barrier()
            began = time.perf_counter()
            comm.allreduce(array)
            seconds.append(time.perf_counter() - began)
            _check(comm, array, expected)
    return [_median_of_slowest(comm, seconds[2:]) for comm, seconds in zip(communicators, times, strict=True)]


def _check(comm: Communicator, array: Array, expected: Array) -> None:
    if not np.array_equal(array, expected):
        wrong = int(np.argmax(array != expected))
        raise ArithmeticError(
            f"{type(comm).__name__}.allreduce on rank {comm.rank} of {comm.size}: number {wrong} of {array.size} is "
            f"{array[wrong]}, and should be {expected[wrong]}"
        )


def _median_of_slowest(comm: Communicator, seconds: Sequence[float]) -> float:
    every_rank = [np.frombuffer(message) for message in comm.allgather(np.array(seconds, np.float64).tobytes())]
    return statistics.median(np.max(every_rank, axis=0).tolist())


def show(rows: Sequence[AllreduceTimes], comm: Communicator, library: str) -> str:
    """The table that `distprop bench allreduce` prints."""
    lines = [
        f"{comm.size} ranks, {type(comm).__name__} beside the Allreduce of {library}; float32, medians, sums checked",
        f"{'MB':>10}{'ms':>10}{'GB/s':>8}{'library ms':>12}{'GB/s':>8}{'times faster':>14}{'repeats':>9}",
    ]
    for row in rows:
        rates = [row.bytes / seconds / 1e9 for seconds in (row.seconds, row.library_seconds)]
        lines.append(
            f"{row.bytes / 1e6:10.3f}{row.seconds * 1e3:10.4f}{rates[0]:8.2f}"
            f"{row.library_seconds * 1e3:12.4f}{rates[1]:8.2f}{row.ratio:14.2f}{row.repeats:9d}"
        )
    return "\n".join(lines)
