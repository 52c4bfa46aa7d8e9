"""What the norms of rows have in common: the mean and the scale of each row, and products of rows with columns."""

from __future__ import annotations

import numpy as np

from distprop.allocator import aligned_empty
from distprop.tape import Array

_SHORT = 256  # numbers of a row; for shorter ones vecdot takes twice matmul's time, of longer ones it is twice as exact


class Moments:
    """For each row the mean, s = 1/√(var + ε), and what is taken off the row first, 0 for most.

    var is ⟨x²⟩ − ⟨x⟩², two products by BLAS. Where the mean is more than twice the standard deviation that would cost
    digits, so there the mean is taken off the row, and the mean is that of what is left. It depends on no other row.
    """

    def __init__(self, count: int, dtype: np.dtype[np.floating]) -> None:
        self.mean, self.shift = np.zeros((2, count), dtype)
        self.scale = np.empty(count, dtype)

    def measure(self, rows: Array, block: slice, eps: float, centred: bool) -> Array:
        """Fill in a block of the rows; returns it as it is to be used, shifted."""
        x, mean, scale = rows[block], self.mean[block], self.scale[block]
        with np.errstate(over="ignore", invalid="ignore"):
            var = _variance(x, mean) if centred else np.vecdot(x, x) / x.shape[1]
            if centred:
                far = ~(mean * mean <= 4 * var)
                if far.any():
                    self.shift[block][far] = mean[far]
                    x = self.shifted(rows, block)
                    var = _variance(x, mean)
            np.sqrt(var + x.dtype.type(eps), out=scale)
        np.reciprocal(scale, out=scale)
        return x

    def shifted(self, rows: Array, block: slice) -> Array:
        """A block of the rows with what is to be taken off them taken off."""
        shift = self.shift[block]
        return rows[block] - shift[:, None] if shift.any() else rows[block]


def _variance(x: Array, mean: Array) -> Array:
    """⟨x²⟩ − ⟨x⟩², and the mean in place."""
    sum_rows = np.matmul if x.shape[1] <= _SHORT else np.vecdot
    sum_rows(x, np.ones(x.shape[1], x.dtype), out=mean)
    mean /= x.shape[1]
    return np.maximum(np.vecdot(x, x) / x.shape[1] - mean * mean, 0)


class Outer:
    """a_i u_j + b_i v_j for the rows i of a block and the columns j, as a product of `(rows, 2)` with `(2, columns)`.

    BLAS makes it in a third of the time of `a[:, None] * u`, even where b is 0: for an inner axis of one NumPy has a
    slow loop of its own.
    """

    def __init__(self, rows: int, columns: int, dtype: np.dtype[np.floating]) -> None:
        self._pairs = np.empty((rows, 2), dtype)
        self._result = aligned_empty((rows, columns), dtype)

    def __call__(self, a: Array, b: Array | float, uv: Array) -> Array:
        """The matrix, overwritten by the next call; `uv` is `(2, columns)`."""
        pairs = self._pairs[: len(a)]
        pairs[:, 0], pairs[:, 1] = a, b
        return np.matmul(pairs, uv, out=self._result[: len(a)])
