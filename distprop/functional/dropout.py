"""Dropout, with masks that are a function of (seed, step, row of the global batch), never of the rank.

See `distprop.random`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

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
    check_probability("dropout", p)
    if not training or p == 0:
        return x
    scale = dropout_scale(x.shape, p, x.dtype)

    def vjp(grad: Array, out: Out) -> list[Array]:
        return [grad * scale]

    return record(x.data * scale, (x,), vjp)


def dropout_scale(shape: tuple[int, ...], p: float, dtype: DTypeLike) -> Array:
    """What dropout multiplies with: 0 with probability `p`, else 1/(1 − p). The first axis is the batch."""
    rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    kept = row_bits(rows, width) >= np.uint32(min(p * 2**32, 2**32 - 1)) if p < 1 else np.zeros((rows, width), bool)
    return kept.reshape(shape) * np.asarray(1 / (1 - p) if p < 1 else 0, dtype)


def check_probability(operation: str, p: float) -> None:
    """Raise ValueError unless 0 ≤ p ≤ 1."""
    if not 0 <= p <= 1:
        raise ValueError(f"{operation} needs a probability between 0 and 1, got {p}")
