"""A sum whose rounding does not depend on who computes it.

Floating-point addition is not associative, so the sum over the ranks changes with their number. Here the batch is cut
into a fixed number of shards, and their messages are added in one binary tree over the shard numbers:

    ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))

A rank holds a run of neighbouring shards and adds up the whole subtrees in it by itself. What is left of the tree spans
ranks: each rank takes one slice of everybody's partial sums, finishes the tree for that slice, and the slices are
gathered, in shared memory where all ranks have it. Whatever carries the numbers, every addition happens here, in an
order that is the same for 1, 2, 3 or 64 ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from distprop.comm.base import Communicator
from distprop.comm.node import Node
from distprop.data.loader import share
from distprop.tape import Array

_PIECE = 32768  # numbers that a slice is finished in at a time, to stay in the cache


@dataclass
class _Partial:
    """The sum of the shards from `start` to `start + size - 1`, a whole subtree."""

    start: int
    size: int
    values: Array


class FixedTree:
    """Adds the messages of `shards` shards, each of `length` numbers, held by the ranks of `comm`.

    Each rank calls `add` for each of its shards, `share(shards, rank, size)`, in order, and then all call `total`.
    Memory: one message for each level of the tree that a rank holds, log2(shards) + 1 at the most. Making one is
    collective.
    """

    def __init__(self, comm: Communicator, shards: int, length: int, dtype: DTypeLike) -> None:
        self.comm, self.shards, self.length, self.dtype = comm, shards, length, np.dtype(dtype)
        self.mine = share(shards, comm.rank, comm.size)
        self._next = self.mine.start
        self._held = [list(subtrees(share(shards, rank, comm.size))) for rank in range(comm.size)]
        levels = max(_levels(share(shards, rank, comm.size)) for rank in range(comm.size))
        self._memory = [comm.allocate(length, self.dtype) for _ in range(levels)]
        self._partials: list[_Partial] = []  # the n-th lies in self._memory[n]

    def add(self, message: Array) -> None:
        """Take the next shard's `message`; it may be overwritten afterwards."""
        if self._next >= self.mine.stop:
            raise RuntimeError(f"rank {self.comm.rank} holds shards {self.mine.start} to {self.mine.stop - 1} only")
        if self._partials and _siblings(self._partials[-1], self._next, 1):
            left = self._partials[-1]
            left.values += message
            left.size = 2
        else:
            values = self._memory[len(self._partials)]
            values[:] = message
            self._partials.append(_Partial(self._next, 1, values))
        self._next += 1
        _join_siblings(self._partials)

    def total(self, out: Array) -> None:
        """Write the sum over all shards into `out`, on every rank. Collective; quickest if `out` is of `allocate`."""
        if self._next != self.mine.stop:
            raise RuntimeError(f"rank {self.comm.rank} has added {self._next - self.mine.start} of its shards only")
        my_slice = share(self.length, self.comm.rank, self.comm.size)
        node = self.comm.node
        everywhere = [node.arrays(array) or () for array in (out, *self._memory)] if node else []
        if node and node.size == self.comm.size and all(everywhere):  # there may have been room for some of them only
            self._total_in_shared_memory(node, everywhere, my_slice)
        else:
            out[my_slice] = _finish(self._collect(my_slice))
            self._gather(out, my_slice)
        self.clear()

    def clear(self) -> None:
        """Forget what has been added."""
        self._partials.clear()
        self._next = self.mine.start

    def _total_in_shared_memory(self, node: Node, everywhere: Sequence[Sequence[Array]], my_slice: slice) -> None:
        """Finish my slice right where the others' partial sums lie, and write it to all of them.

        `everywhere` has every rank's `out`, and then every rank's partial sums, level by level.
        """
        node.barrier()  # all partial sums are there
        outs, *levels = everywhere
        held = [
            _Partial(*subtree, levels[level][rank])
            for rank, of_rank in enumerate(self._held)  # and so in the order of the shards
            for level, subtree in enumerate(of_rank)
        ]
        for start in range(my_slice.start, my_slice.stop, _PIECE):
            piece = slice(start, min(start + _PIECE, my_slice.stop))
            finished = _finish([_Partial(p.start, p.size, p.values[piece]) for p in held])
            for out in outs:
                out[piece] = finished
        node.barrier()  # all slices are there

    def _collect(self, my_slice: slice) -> list[_Partial]:
        """My slice of the partial sums of all ranks, in the order of the shards."""
        if self.comm.size == 1:
            return [_Partial(p.start, p.size, p.values) for p in self._partials]
        held = self._held
        width = my_slice.stop - my_slice.start
        slices = [share(self.length, r, self.comm.size) for r in range(self.comm.size)]
        collected: list[_Partial] = []
        for turn in range(max(len(of_rank) for of_rank in held)):
            mine = self._partials[turn].values if turn < len(self._partials) else np.empty(0, self.dtype)
            sends = slices if turn < len(self._partials) else [slice(0, 0)] * self.comm.size
            senders = [r for r in range(self.comm.size) if turn < len(held[r])]
            arrived = np.empty((len(senders), width), self.dtype)
            places = {r: slice(i * width, (i + 1) * width) for i, r in enumerate(senders)}
            receives = [places.get(r, slice(0, 0)) for r in range(self.comm.size)]
            self.comm.alltoall(mine, sends, arrived.reshape(-1), receives)
            collected += [_Partial(*held[r][turn], arrived[i]) for i, r in enumerate(senders)]
        return sorted(collected, key=lambda partial: partial.start)

    def _gather(self, out: Array, my_slice: slice) -> None:
        if self.comm.size > 1:
            nothing = slice(0, 0)  # a rank has its own slice already, and may not send and receive in one place
            others = [r for r in range(self.comm.size) if r != self.comm.rank]
            sends = [my_slice if r in others else nothing for r in range(self.comm.size)]
            receives = [
                share(self.length, r, self.comm.size) if r in others else nothing for r in range(self.comm.size)
            ]
            self.comm.alltoall(out, sends, out, receives)


def subtrees(run: slice) -> Iterator[tuple[int, int]]:
    """The largest whole subtrees (start, size) that make up a run of shards.

    >>> list(subtrees(slice(3, 8)))
    [(3, 1), (4, 4)]
    """
    start = run.start
    while start < run.stop:
        size = 1
        while start % (2 * size) == 0 and start + 2 * size <= run.stop:
            size *= 2
        yield start, size
        start += size


def _levels(run: slice) -> int:
    """How many partial sums are held at once while the shards of `run` arrive one by one."""
    return max((len(list(subtrees(slice(run.start, stop)))) for stop in range(run.start + 1, run.stop + 1)), default=1)


def _finish(partials: list[_Partial]) -> Array:
    """The rest of the tree. If the shards are no power of two, the missing leaves on the right count as nothing."""
    stack: list[_Partial] = []
    for partial in partials:
        stack.append(partial)
        _join_siblings(stack)
    while len(stack) > 1:
        right = stack.pop()
        stack[-1].values += right.values
    return stack[0].values


def _siblings(left: _Partial, start: int, size: int) -> bool:
    """Whether the subtree (start, size) is the right half of a node whose left half is `left`."""
    return left.size == size and left.start % (2 * size) == 0 and left.start + size == start


def _join_siblings(stack: list[_Partial]) -> None:
    """Add up the top of the stack as long as it is two halves of one node."""
    while len(stack) > 1 and _siblings(stack[-2], stack[-1].start, stack[-1].size):
        right = stack.pop()
        stack[-1].values += right.values
        stack[-1].size *= 2
