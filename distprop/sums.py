"""Sums over axes, as exact for many rows as for few."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROWS = 1024  # so many, and fewer than twice as many, are added one after the other


def sum_over(
    x: NDArray[Any], axes: tuple[int, ...], keepdims: bool = False, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """`x.sum(axes)`; axes count from 0.

    NumPy sums pairwise along the innermost axis only. Along others it adds row after row, so that 17 million ones in
    float32 are 16.8 million. Here such an axis is first folded: its parts of `_ROWS` or more are added up. These are
    additions of long rows, which takes less time, too, but for wide arrays that are not contiguous.
    """
    for axis in axes:
        while x.shape[axis] >= 2 * _ROWS and _row_after_row(x, axis, axes):
            x = _folded(x, axis)
    return np.asarray(x.sum(axis=axes, keepdims=keepdims, out=out))


def _row_after_row(x: NDArray[Any], axis: int, axes: tuple[int, ...]) -> bool:
    """Whether numbers that are not to be added lie closer to each other than those along `axis`."""
    kept = [abs(x.strides[i]) for i in range(x.ndim) if i not in axes and x.shape[i] > 1]
    return min(kept, default=np.inf) <= abs(x.strides[axis])


def _folded(x: NDArray[Any], axis: int) -> NDArray[Any]:
    """`count` sums of the numbers that lie `count` apart along `axis`."""
    count = x.shape[axis] // _ROWS
    rows = x.shape[axis] // count
    whole, rest = np.split(x, [rows * count], axis)
    sums = whole.reshape(*x.shape[:axis], rows, count, *x.shape[axis + 1 :]).sum(axis=axis)
    np.split(sums, [rest.shape[axis]], axis)[0][...] += rest
    return sums
