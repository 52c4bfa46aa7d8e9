"""Dropout, with masks that are a function of (seed, step, row of the global batch), never of the rank.

See `distprop.random`.
"""

from __future__ import annotations

import numpy as np

from distprop.functional.check import floating
from distprop.random import row_bits
from distprop.tape import Array, Out
from distprop.tensor import Operand, Tensor, as_tensor, record


def dropout(input: Operand, p: float = 0.5, training: bool = True) -> Tensor:
    """Zero each element with probability `p` and divide the others by 1 − p; the identity when not `training`.

    The first axis is the batch. Derivative: the same mask, g ⊙ m/(1 − p).
    Source: Srivastava et al., 2014, JMLR 15.
    """
    x = as_tensor(input)
    floating("dropout", x)
    if not 0 <= p <= 1:
        raise ValueError(f"dropout needs a probability between 0 and 1, got {p}")
    if not training or p == 0:
        return x
    rows, width = (x.shape[0], x.data[:1].size) if x.ndim else (1, 1)
    kept = row_bits(rows, width) >= np.uint32(min(p * 2**32, 2**32 - 1)) if p < 1 else np.zeros((rows, width), bool)
    scale = kept.reshape(x.shape) * np.asarray(1 / (1 - p) if p < 1 else 0, x.dtype)

    def vjp(grad: Array, out: Out) -> list[Array]:
        return [grad * scale]

    return record(x.data * scale, (x,), vjp)
