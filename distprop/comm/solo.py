"""A world of one: every collective is already done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from distprop.comm.base import Array, check_contiguous, check_root, check_summable


class SoloCommunicator:
    """The communicator of a single process; needs no MPI."""

    rank = 0
    size = 1
    node = None

    def allocate(self, length: int, dtype: DTypeLike) -> NDArray[Any]:
        """Ordinary memory."""
        return np.zeros(length, dtype)

    def allreduce(self, array: Array) -> Array:
        """The sum over one rank: `array` itself."""
        check_summable(array)
        return array

    def broadcast(self, array: Array, root: int = 0) -> Array:
        """What rank 0 holds: `array` itself."""
        check_root(root, self.size)
        check_contiguous(array)
        return array

    def allgather(self, message: bytes) -> list[bytes]:
        """The one message there is."""
        return [message]

    def alltoall(
        self, send: Array, send_slices: Sequence[slice], receive: Array, receive_slices: Sequence[slice]
    ) -> None:
        """What rank 0 sends to itself."""
        receive[receive_slices[0]] = send[send_slices[0]]

    def barrier(self) -> None:
        """Nobody to wait for."""

    def abort(self, status: int = 1) -> None:
        """Leave the process with `status`."""
        raise SystemExit(status)
