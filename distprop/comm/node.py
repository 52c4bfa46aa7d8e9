"""The ranks of one node add up their messages in memory that all of them see.

Each rank fills an array of its own, as always, but the arrays lie side by side in one shared block. To sum them, rank
r of n adds up the r-th slice of all arrays and writes the sum into each; a barrier before and one after keep the ranks
out of each other's way. Every number moves once, in pieces that stay in the cache. If there are several nodes, the
ranks that hold the same slice on each of them sum it with the library's Allreduce in between: a gradient crosses a
node's network interface once, not once a rank.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from distprop.comm.base import Communicator

SumBetween: TypeAlias = Callable[[Communicator, NDArray[Any], int], None]

_FOLDER = "/dev/shm"
_PIECE_BYTES = 256 * 1024  # a piece of two ranks fits into a second-level cache of 1 MiB; 23 MB: 0.8 ms, 1.4 with 32 kB
_LINE_BYTES = 64  # of the cache


class Node:
    """The ranks of one node, one of possibly several, and the memory that they share.

    Attributes:
        rank: this rank's number on its node.
        size: how many ranks the node has.

    Args:
        here: the ranks of this node.
        slices: into how many slices a sum is cut: as many as the node with the fewest ranks has.
        across: the ranks that have this rank's number on all nodes; None for a single node, and for a rank that has
            no slice.
    """

    def __init__(self, here: Communicator, slices: int, across: Communicator | None = None) -> None:
        self.rank, self.size = here.rank, here.size
        self._here, self._slices, self._across = here, slices, across
        self._arrays: dict[int, list[NDArray[Any]]] = {}  # of all ranks, by the id of this rank's
        self._checks: dict[int, _Check] = {}  # by the same

    def allocate(self, length: int, dtype: DTypeLike) -> NDArray[Any] | None:
        """Zeros `(length,)` for this rank, which the others can see and write: `arrays` has theirs. Collective here.

        The memory goes with the arrays; it has no name that could outlive a killed job. None, on all ranks of the node,
        where there is no shared memory, or not enough of it.
        """
        arrays = self._share(self.size, length, dtype)
        if arrays is None:
            return None
        own = arrays[self.rank].view()  # the others are kept as long as this view is
        self._arrays[id(own)] = arrays
        weakref.finalize(own, self._arrays.pop, id(own))
        return own

    def allocate_common(self, length: int, dtype: DTypeLike) -> NDArray[Any] | None:
        """One array of zeros `(length,)` for all ranks of the node. Collective here; None as in `allocate`."""
        arrays = self._share(1, length, dtype)
        return None if arrays is None else arrays[0]

    def arrays(self, own: NDArray[Any]) -> Sequence[NDArray[Any]] | None:
        """Every rank's array of the call of `allocate` that returned `own`; None if `own` is not of `allocate`."""
        return self._arrays.get(id(own))

    def check_sums(self, own: NDArray[Any], count: int) -> bool:
        """From now on sums of `own`, of `allocate`, look for what is not finite in each rank's first `count` numbers.

        Collective here. A sum reads the numbers anyway, so it costs less than a pass of its own. False, and they do
        not, where there are several nodes: the others would not hear of it.
        """
        found = None
        if self._across is None and self._slices == self.size and id(own) in self._arrays:
            found = self.allocate_common(self.size**2, np.int64)
        if found is None:
            return False
        self._checks[id(own)] = _Check(count, found.reshape(self.size, self.size), self.rank)
        weakref.finalize(own, self._checks.pop, id(own))
        return True

    def not_finite(self, own: NDArray[Any]) -> list[int | None]:
        """For each rank of the node the last of its numbers that was not finite in the sum of `own` just made, or None.

        After `check_sums`, and before this rank begins another sum of `own`.
        """
        return self._checks[id(own)].by_rank()

    def suspicious(self, own: NDArray[Any]) -> bool:
        """Whether there was one, or numbers so large that their sum may be infinite; if and when as `not_finite`."""
        return self._checks[id(own)].anything

    def own_slice(self, array: NDArray[Any]) -> slice:
        """This rank's of nearly equal slices of an array that all ranks of the node work on."""
        return _slice(len(array), array.itemsize, self.rank, self.size)

    def barrier(self) -> None:
        """Wait for the ranks of this node."""
        self._here.barrier()

    def sum(self, own: NDArray[Any], between: SumBetween | None = None) -> None:
        """Replace each rank's array, of `allocate`, by the sum over all ranks of all nodes. Collective on all nodes.

        `between(across, total, start)` sums `total`, which begins at number `start`, over the nodes, in place of the
        library's Allreduce.
        """
        arrays, check = self._arrays[id(own)], self._checks.get(id(own))
        self.barrier()  # all have written
        if self.rank < self._slices:
            mine = _slice(len(own), own.itemsize, self.rank, self._slices)
            total, *others = parts = [array[mine] for array in arrays]
            if check is not None:
                check.begin()
            for piece in _pieces(total):
                if check is not None:
                    check.look(parts, piece, mine.start)
                for other in others:
                    total[piece] += other[piece]
                if self._across is None:
                    for other in others:
                        other[piece] = total[piece]
            if self._across is not None:
                if between is None:
                    self._across.allreduce(total)
                else:
                    between(self._across, total, mine.start)
                for other in others:
                    other[...] = total
        self.barrier()  # all sums are there

    def _share(self, count: int, length: int, dtype: DTypeLike) -> list[NDArray[Any]] | None:
        """`count` arrays of zeros in one block that all ranks map."""
        stride = -(-length * np.dtype(dtype).itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        size = max(stride * count, mmap.PAGESIZE)
        made = _make_file(size) if self.rank == 0 else None
        path = os.fsdecode(self._here.allgather(os.fsencode(made or ""))[0])
        block = _map(path, size) if path else None
        mapped = self._here.allgather(b"" if block is None else b"mapped")
        if made:
            _remove(made)
        if block is None or b"" in mapped:
            return None
        return [np.frombuffer(block, dtype, length, offset=number * stride) for number in range(count)]


class _Check:
    """Looks for numbers that are not finite; row r of `found` is what rank r has found, one column for each rank.

    That is 0 for nothing, 1 + the place of the last such number, or -1 where only the numbers' squares are infinite.
    """

    def __init__(self, count: int, found: NDArray[np.int64], rank: int) -> None:
        self._count, self._found, self._mine = count, found, found[rank]

    def begin(self) -> None:
        """Forget what the last sum has found."""
        self._mine[:] = 0

    def look(self, parts: Sequence[NDArray[Any]], piece: slice, start: int) -> None:
        """Look at a piece of all ranks' parts, which begin at number `start` of the message."""
        numbers = slice(piece.start, max(piece.start, min(piece.stop, self._count - start)))
        for rank, part in enumerate(parts):
            with np.errstate(all="ignore"):
                if math.isfinite(np.dot(part[numbers], part[numbers])):
                    continue
            bad = np.flatnonzero(~np.isfinite(part[numbers]))
            if len(bad):
                self._mine[rank] = start + piece.start + bad[-1] + 1
            elif not self._mine[rank]:  # they are large, and their squares infinite
                self._mine[rank] = -1

    @property
    def anything(self) -> bool:
        """Whether anyone has found what is not finite, or whose square is not."""
        return bool(self._found.any())

    def by_rank(self) -> list[int | None]:
        """The last number of each rank's array that anyone has found."""
        return [None if last <= 0 else last - 1 for last in self._found.max(axis=0).tolist()]


def _make_file(size: int) -> str | None:
    """The path of a new file of `size` zeros in memory; None, and no file, if there is no room for it."""
    path = os.path.join(_FOLDER, f"distprop-{os.urandom(8).hex()}")
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(file, 0, size)  # reserved now: a full /dev/shm would be a bus error later
    except OSError:
        _remove(path)
        return None
    finally:
        os.close(file)
    return path


def _map(path: str, size: int) -> mmap.mmap | None:
    """The file's memory; None if it cannot be had."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(file, size)
    except OSError:
        return None
    finally:
        os.close(file)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _slice(length: int, itemsize: int, number: int, slices: int) -> slice:
    """The `number`-th of nearly equal slices; they meet between cache lines, for which two ranks would fight."""
    line = _LINE_BYTES // itemsize
    start, stop = (length * n // slices // line * line for n in (number, number + 1))
    return slice(start, length if number + 1 == slices else stop)


def _pieces(array: NDArray[Any]) -> Iterator[slice]:
    step = _PIECE_BYTES // array.itemsize
    for start in range(0, len(array), step):
        yield slice(start, start + step)
