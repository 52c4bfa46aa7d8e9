"""The fully connected layer: one matrix product forward, two backward."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from distprop.functional.check import same_dtype
from distprop.tape import Array, Out
from distprop.tensor import Operand, Tensor, as_tensor, record


def linear(input: Operand, weight: Operand, bias: Operand | None = None) -> Tensor:
    """y = x Wᵀ + b.

    Shapes: x `(..., in_features)`, W `(out_features, in_features)`, b `(out_features,)`, y `(..., out_features)`.
    Derivative: dx = g W, dW = gᵀ x, db = Σ g over all leading axes.

    Where W has more rows than a matrix x, y is computed as yᵀ = W xᵀ and lies so in memory, one feature after the
    other: BLAS packs a large W 15 to 20 % faster when it is not the transposed factor. dx lies as x does.

    Raises:
        ValueError: the last axis of x is not in_features, or b is not one number for each row of W.
        TypeError: the dtypes differ.
    """
    x, weight = as_tensor(input), as_tensor(weight)
    bias = None if bias is None else as_tensor(bias)
    data, w = x.data, weight.data
    if w.ndim != 2 or data.ndim == 0 or data.shape[-1] != w.shape[1]:
        raise ValueError(
            f"linear with a weight of shape {w.shape} (out, in) got x of shape {data.shape}; "
            f"its last axis must be {w.shape[-1]}"
        )
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if data.dtype.kind != "f" or w.dtype != data.dtype or (bias is not None and bias.dtype != w.dtype):
        same_dtype("linear", **dict(zip(("x", "weight", "bias"), inputs, strict=False)))
    if bias is not None and bias.shape != w.shape[:1]:
        raise ValueError(f"linear with a weight of shape {w.shape} (out, in) got a bias of shape {bias.shape}")
    is_matrix = data.ndim == 2
    rows = data if is_matrix else data.reshape(-1, data.shape[-1])
    by_feature = is_matrix and len(rows) < len(w)
    value = (w @ rows.T).T if by_feature else rows @ w.T
    if bias is not None:
        value += bias.data

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        g = grad if grad.ndim == 2 else grad.reshape(-1, grad.shape[-1])
        dx = dw = db = None
        if x.requires_grad:
            flipped = is_matrix and rows.flags.f_contiguous
            dx = (w.T @ g.T).T if flipped else (g @ w).reshape(data.shape)
        if weight.requires_grad:
            dw = np.matmul(g.T, rows, out=out[1])
        if bias is not None and bias.requires_grad:
            db = np.matmul(_ones(len(g), g.dtype), g, out=out[2])  # a third of the time of g.sum(axis=0)
        return [dx, dw, db][: len(inputs)]

    return record(value if is_matrix else value.reshape(*data.shape[:-1], len(w)), inputs, vjp)


@lru_cache(maxsize=32)
def _ones(count: int, dtype: np.dtype[Any]) -> Array:
    return np.ones(count, dtype)
