"""What layer, group and root-mean-square norm have in common: the moments of each row, spread over the row by BLAS."""

from __future__ import annotations

import numpy as np

from distprop.allocator import aligned_empty
from distprop.functional.short_buffers import LENGTH
from distprop.tape import Array

_SHORT = 256  # numbers of a row; for shorter ones vecdot takes twice matmul's time, of longer ones it is twice as exact


class Moments:
    """For each row the mean, s = 1/√(var + ε), and what is taken off the row first, 0 for most.

    var is ⟨x²⟩ − ⟨x⟩², two products by BLAS. Where the mean is more than twice the standard deviation that would cost
    digits, so there the mean is taken off the row, and the mean is that of what is left. It depends on no other row.
    """

    def __init__(self, count: int, length: int, dtype: np.dtype[np.floating]) -> None:
        self.mean, self.shift = np.zeros((2, count), dtype)
        self.scale = np.empty(count, dtype)
        self._ones = np.ones(length, dtype)

    def measure(self, rows: Array, block: slice, eps: float, centred: bool) -> Array:
        """Fill in a block of the rows; returns it as it is to be used, shifted."""
        x, mean, scale = rows[block], self.mean[block], self.scale[block]
        var = np.vecdot(x, x, out=scale)
        var /= len(self._ones)
        if centred:
            squared = self._mean_squared(x, mean)
            var -= squared
            if not (4 * var >= squared).all():
                far = ~(4 * var >= squared)
                self.shift[block][far] = mean[far]
                x = self.shifted(rows, block)
                np.vecdot(x, x, out=var)
                var /= len(self._ones)
                var -= self._mean_squared(x, mean)
                np.maximum(var, 0, out=var)
        var += eps
        np.sqrt(var, out=scale)
        np.reciprocal(scale, out=scale)
        return x

    def shifted(self, rows: Array, block: slice) -> Array:
        """A block of the rows with what is to be taken off them taken off."""
        shift = self.shift[block]
        return rows[block] - shift[:, None] if shift.any() else rows[block]

    def _mean_squared(self, x: Array, mean: Array) -> Array:
        sum_rows = np.matmul if len(self._ones) <= _SHORT else np.vecdot
        sum_rows(x, self._ones, out=mean)
        mean /= len(self._ones)
        return np.square(mean)


class Outer:
    """a_i u_j + b_i v_j for the rows i of a block and the columns j, as a product of `(rows, 2)` with `(2, columns)`.

    BLAS makes it so fast that a product or a sum with it takes three quarters of the time of one with `a[:, None]`.
    Rows that do not fit into NumPy's short buffer are the exception: use it within `short_buffers`. It is two columns
    even if b is 0: for an inner axis of one NumPy has a loop of its own.
    """

    def __init__(self, rows: int, columns: int, dtype: np.dtype[np.floating]) -> None:
        self.ones = np.zeros((2, columns), dtype)
        self.ones[0] = 1
        self._pairs = np.zeros((rows, 2), dtype)
        self._result = aligned_empty((rows, columns), dtype)

    def __call__(self, a: Array, uv: Array | None = None) -> Array:
        """The matrix for b = 0, overwritten by the next call. `uv` is `(2, columns)`.

        Without it a row is all a_i, and what is returned broadcasts to the matrix.
        """
        if uv is None and len(self.ones[0]) >= LENGTH:
            return a[:, None]
        pairs = self._pairs[: len(a)]
        pairs[:, 0] = a
        return self.of_pairs(pairs, self.ones if uv is None else uv)

    def of_pairs(self, pairs: Array, uv: Array) -> Array:
        """The matrix for pairs (a_i, b_i), `(rows, 2)`, overwritten by the next call."""
        return np.matmul(pairs, uv, out=self._result[: len(pairs)])
