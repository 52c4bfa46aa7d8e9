"""Sums whose numbers cross the network in 16 bits, half of float32; what rounding takes off is sent with the next ones.

Only the network sees 16 bits: the ranks of a node add in float32 as always, and so does whoever adds up what came in.
Each number is rounded twice, before it is sent and when the sum goes back, and both errors are kept and added to the
next step's numbers (error feedback), so that over the steps nothing is lost, however small: Seide et al., 2014,
"1-bit stochastic gradient descent"; Karimireddy et al., 2019, arXiv:1901.09847.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from distprop.comm.base import Communicator
from distprop.comm.recorder import recorded

Wire: TypeAlias = Literal["bf16", "fp16"]
Array: TypeAlias = NDArray[Any]

WIRES = ("bf16", "fp16")
_LARGEST_FP16 = 65504.0
_PIECE = 65536  # numbers, so that the passes over a piece stay in the second-level cache


class WireSum:
    """Sums one message over the ranks again and again, in 16 bits between nodes.

    Args:
        comm: the ranks. Those that share memory add up there first. A single node rounds nothing.
        wire: "bf16" has float32's range and a relative error of up to 2⁻⁸; "fp16" one of 2⁻¹¹, and what is above 65,504
            or below 6·10⁻⁸ waits for the next steps.
        narrow: so many numbers at the front are rounded; those behind, counts and flags, travel as they are.

    Raises:
        ValueError: another `wire`.
        TypeError: by `allreduce`, for numbers that are not float32.
    """

    def __init__(self, comm: Communicator, wire: Wire, narrow: int) -> None:
        check_wire(wire)
        self._comm, self._wire, self._narrow = comm, wire, narrow
        self._sent: _Rounding | None = None  # this rank's, or its node's, numbers
        self._summed: _Rounding | None = None  # the part of the sum that this rank makes

    @recorded
    def allreduce(self, array: Array) -> Array:
        """Replace `array` by the sum over the ranks, the same bits on all. Collective."""
        if array.dtype != np.float32:
            raise TypeError(f"wire={self._wire!r} is for float32 parameters, not for {array.dtype}")
        node = self._comm.node
        if node and node.arrays(array):
            node.sum(array, self._sum_between)
        elif node and node.size == self._comm.size:  # no memory to share, but no network to cross either
            self._comm.allreduce(array)
        elif self._comm.size > 1:
            self._sum_between(self._comm, array, 0)
        return array

    def rescale(self, factor: float) -> None:
        """The last sum was multiplied by `factor` afterwards, and so is what rounding has left of it."""
        for rounding in (self._sent, self._summed):
            if rounding is not None:
                rounding.error *= np.float32(factor)

    def _sum_between(self, across: Communicator, total: Array, start: int) -> None:
        """Sum `total`, which begins at number `start` of the message, over the ranks `across`."""
        rounded = min(max(self._narrow - start, 0), len(total))
        self._sum_rounded(across, total[:rounded])
        if rounded < len(total):
            across.allreduce(total[rounded:])

    def _sum_rounded(self, across: Communicator, total: Array) -> None:
        """Each rank gets one slice from all, adds it up in float32, and sends the sum to all."""
        bounds = [len(total) * number // across.size for number in range(across.size + 1)]
        slices = [slice(*ends) for ends in itertools.pairwise(bounds)]
        part = total[slices[across.rank]]
        if self._sent is None or self._summed is None:
            self._sent, self._summed = _Rounding(self._wire, len(total)), _Rounding(self._wire, len(part))
        received = np.empty((across.size, len(part)), np.uint16)
        places = [slice(number * len(part), (number + 1) * len(part)) for number in range(across.size)]
        across.alltoall(self._sent.round(total), slices, received.reshape(-1), places)
        _decode_sum(self._wire, received, part)
        codes = np.empty(len(total), np.uint16)
        across.alltoall(self._summed.round(part), [slice(0, len(part))] * across.size, codes, slices)
        _decode_sum(self._wire, codes[None], total)  # its own part as well: all ranks have the same bits


class _Rounding:
    """Rounds arrays of one length, each with the error of the one before added."""

    def __init__(self, wire: Wire, length: int) -> None:
        self.wire = wire
        self.error = np.zeros(length, np.float32)
        self.codes = np.empty(length, np.uint16)

    def round(self, values: Array) -> Array:
        """The codes of `values` plus what the last call left over; overwritten by the next call."""
        for start in range(0, len(values), _PIECE):
            piece = slice(start, start + _PIECE)
            error, codes = self.error[piece], self.codes[piece]
            error += values[piece]
            codes[...] = encode(self.wire, error)
            with np.errstate(invalid="ignore"):
                error -= decode(self.wire, codes)
                if not math.isfinite(error.sum()):  # a gradient was not finite: that step's trouble, not the next ones'
                    error[~np.isfinite(error)] = 0
        return self.codes


def encode(wire: Wire, values: Array) -> Array:
    """float32 numbers to the nearest 16-bit codes, `uint16`; halfway to the even one."""
    if wire == "fp16":
        return np.clip(values, -_LARGEST_FP16, _LARGEST_FP16).astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    odd += bits
    odd += 0x7FFF
    odd >>= 16
    return odd.astype(np.uint16)


def decode(wire: Wire, codes: Array) -> Array:
    """The float32 numbers that `encode` made `codes` of, as rounded."""
    if wire == "fp16":
        return codes.view(np.float16).astype(np.float32)
    bits = codes.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def check_wire(wire: str) -> None:
    """Refuse what is no format of the wire."""
    if wire not in WIRES:
        raise ValueError(f"wire must be None, for float32, or one of {', '.join(map(repr, WIRES))}; got {wire!r}")


def _decode_sum(wire: Wire, rows: Array, out: Array) -> None:
    """Σ over the `rows` of codes, in float32 and in their order, a piece that stays in the cache at a time."""
    for start in range(0, len(out), _PIECE):
        piece = slice(start, start + _PIECE)
        out[piece] = decode(wire, rows[0, piece])
        for row in rows[1:]:
            out[piece] += decode(wire, row[piece])
