"""N ranks as threads of one process: a test double, so that a test of 8 ranks needs no MPI and fails in a debugger.

Each collective is two barriers: all have put down what they bring; all have taken what they want. A rank that raises
breaks the barrier, so the others raise as well instead of waiting for ever.

A replay runs a whole program in each of them, one at a time: a rank has the interpreter for itself until it waits in a
collective. So code that was written for a process of its own, with a global random generator or a cache, is none the
worse for it, and what happens is the same every time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from distprop.comm.base import Array, CollectiveError, check_contiguous, check_root, check_summable
from distprop.comm.node import Node

Result = TypeVar("Result")


def run_threads(
    size: int,
    function: Callable[[ThreadCommunicator], Result],
    timeout_seconds: float | None = 60,
    *,
    share_memory: bool = False,
    one_at_a_time: bool = False,
) -> list[Result]:
    """Call `function(comm)` on `size` ranks at once and return the results by rank.

    With `share_memory` they see each other's messages, as ranks of one node do. With `one_at_a_time` one rank works
    while the others wait; in collectives they change. No `timeout_seconds` means to wait for ever. The first exception
    of any rank (by time) is raised here once all threads have ended.
    """
    meeting = _Meeting(size, timeout_seconds, share_memory)
    results: dict[int, Result] = {}

    def body(rank: int) -> None:
        with meeting.turn if one_at_a_time else nullcontext():
            try:
                results[rank] = function(ThreadCommunicator(meeting, rank))
            except BaseException as error:
                meeting.fail(rank, error)

    threads = [threading.Thread(target=body, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if meeting.error is not None:
        raise meeting.error
    return [results[rank] for rank in range(size)]


class ThreadCommunicator:
    """One rank of `run_threads`."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank = rank
        self.size = meeting.size
        self.node = Node(self, self.size) if meeting.share_memory else None

    def allocate(self, length: int, dtype: DTypeLike) -> NDArray[Any]:
        """Zeros in memory that the ranks share if the world was made with `share_memory`."""
        shared = self.node.allocate(length, dtype) if self.node else None
        return shared if shared is not None else np.zeros(length, dtype)

    def allreduce(self, array: Array) -> Array:
        """Sum in place, in the order of the ranks."""
        if self.node and self.node.arrays(array):
            self.node.sum(array)
            return array
        check_summable(array)
        brought = self._exchange(("allreduce", array.shape, array.dtype.str), array.copy())
        array[...] = 0
        for other in brought:
            array += other
        return array

    def broadcast(self, array: Array, root: int = 0) -> Array:
        """Copy the array of rank `root` in place."""
        check_root(root, self.size)
        check_contiguous(array)
        brought = self._exchange(("broadcast", root, array.shape, array.dtype.str), array.copy())
        array[...] = brought[root]
        return array

    def allgather(self, message: bytes) -> list[bytes]:
        """Every rank's message, by rank."""
        return self._exchange(("allgather",), message)

    def alltoall(
        self, send: Array, send_slices: Sequence[slice], receive: Array, receive_slices: Sequence[slice]
    ) -> None:
        """A slice for each rank."""
        brought = self._exchange(("alltoall", send.dtype.str), [send[piece].copy() for piece in send_slices])
        for pieces, place in zip(brought, receive_slices, strict=True):
            if pieces[self.rank].shape != receive[place].shape:
                raise CollectiveError(
                    f"rank {self.rank} awaits {receive[place].size} numbers, not {pieces[self.rank].size}"
                )
            receive[place] = pieces[self.rank]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._exchange(("barrier",), None)

    def abort(self, status: int = 1) -> None:
        """Make every rank of this world raise."""
        error = SystemExit(status)
        self._meeting.fail(self.rank, error)
        raise error

    def _exchange(self, call: tuple[Any, ...], thing: Any) -> list[Any]:
        meeting = self._meeting
        meeting.brought[self.rank] = (call, thing)
        meeting.wait(self.rank, call)
        brought = list(meeting.brought)
        meeting.wait(self.rank, call)
        for rank, (other_call, _) in enumerate(brought):
            if other_call != call:
                raise CollectiveError(f"rank {self.rank} called {call} while rank {rank} called {other_call}")
        return [thing for _, thing in brought]


class _Meeting:
    """What the ranks of one world share.

    A barrier that all have reached counts as passed, also for a rank that has not woken up when another one fails after
    it; `threading.Barrier` would break there.
    """

    def __init__(self, size: int, timeout_seconds: float | None, share_memory: bool) -> None:
        if size < 1:
            raise ValueError(f"a world has 1 rank or more, got {size}")
        self.size, self.share_memory = size, share_memory
        self.brought: list[Any] = [None] * size
        self.error: BaseException | None = None
        self.turn = threading.Condition()  # a rank that works alone holds it, and lets go of it to wait
        self._timeout_seconds = timeout_seconds
        self._arrived = 0
        self._passed = 0  # barriers so far

    def wait(self, rank: int, call: tuple[Any, ...]) -> None:
        with self.turn:
            number = self._passed
            if self.error is None:
                self._arrived += 1
            if self._arrived == self.size:
                self._arrived, self._passed = 0, number + 1
                self.turn.notify_all()
            self.turn.wait_for(lambda: self._passed > number or self.error is not None, self._timeout_seconds)
            if self._passed == number:
                failed = f"another rank failed: {self.error!r}"
                reason = failed if self.error is not None else f"no answer in {self._timeout_seconds} s"
                raise CollectiveError(f"rank {rank} could not complete {call[0]}: {reason}")

    def fail(self, rank: int, error: BaseException) -> None:
        with self.turn:
            if self.error is None or (
                isinstance(self.error, CollectiveError) and not isinstance(error, CollectiveError)
            ):
                error.add_note(f"raised on rank {rank} of {self.size}")
                self.error = error
            self.turn.notify_all()
