"""Operations that are one formula for each number, or for each row, worked out in pieces that stay in the cache.

See `distprop.pieces`. A formula is two functions, for the value and for the derivative; both write into an `out`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from distprop.allocator import aligned_like
from distprop.functional.short_buffers import short_buffers
from distprop.pieces import CHUNK, compact, in_blocks, in_pieces, laid_out_as, like
from distprop.tape import Array, Out, gradients_needed
from distprop.tensor import Tensor, record

Value: TypeAlias = Callable[..., Any]  # (x, out), and with keep (x, out, kept)
Derivative: TypeAlias = Callable[[Array, Array, Array, Array], Any]  # (g, x or what was kept, y, out)


def pointwise(x: Tensor, value: Value, derivative: Derivative, keep: bool = False, piece: int | None = None) -> Tensor:
    """Record y, which `value(x, out)` writes into `out`, and the gradient, which `derivative(g, x, y, out)` writes.

    With `keep` the forward pass keeps what the derivative needs in place of x, one number for each element: the calls
    are `value(x, out, kept)`, `kept` being None where no gradient is needed, and `derivative(g, kept, y, out)`.
    The calls for the value get up to `piece` numbers at a time, `CHUNK` by default.
    The result has the memory layout of x, so channels-last images stay so.
    """
    data = compact(x.data)
    y, *kept = _outputs(x, data, keep)
    in_pieces(value, data, y, *kept, size=piece)
    saved = kept[0] if keep else data

    def vjp(grad: Array, out: Out) -> list[Array]:
        gradient = like(y, out[0])
        in_pieces(derivative, laid_out_as(y, grad), saved, y, gradient)
        return [gradient]

    return record(y, (x,), vjp)


def rowwise(x: Tensor, dim: int, value: Value, derivative: Derivative, keep: bool = False) -> Tensor:
    """`pointwise` for functions of the rows along `dim`: they get matrices `(rows, length)`. `dim` counts from 0."""
    data = np.ascontiguousarray(np.moveaxis(x.data, dim, -1))
    y, *kept = _outputs(x, data, keep)
    in_rows(value, data, y, *kept)
    saved = kept[0] if keep else data
    last = dim == x.ndim - 1

    def vjp(grad: Array, out: Out) -> list[Array]:
        gradient = like(y, out[0] if last else None)
        in_rows(derivative, np.ascontiguousarray(np.moveaxis(grad, dim, -1)), saved, y, gradient)
        return [gradient if last else np.moveaxis(gradient, -1, dim)]

    return record(np.moveaxis(y, -1, dim), (x,), vjp)


def in_rows(function: Callable[..., Any], first: Array, *others: Array | None) -> None:
    """Call `function` with some rows after the other of C-contiguous arrays `(..., length)`, each with its own length.

    None and single numbers among `others` are passed as they are.
    """
    if first.size:
        length = first.shape[-1]
        rows = [a.reshape(-1, a.shape[-1]) if a is not None and a.ndim else a for a in (first, *others)]
        with short_buffers():
            in_blocks(function, first.size // length, max(1, 2 * CHUNK // length), rows)  # fewer arrays, slower calls


def placed(gradient: Array | None, parameter: Tensor, out: Array | None) -> Array | None:
    """A parameter's gradient in its shape and dtype, and in its place in the buffer of all gradients if it has one."""
    if gradient is None:
        return None
    gradient = gradient.reshape(parameter.shape)
    if out is None:
        return gradient.astype(parameter.dtype, copy=False)
    out[...] = gradient
    return out


def row_sums(matrix: Array) -> Array:
    """Σ_j a_ij as `(rows, 1)`, each row on its own; a product with ones takes a third of the time of sum(axis=1)."""
    return np.vecdot(matrix, np.ones(matrix.shape[-1], matrix.dtype))[:, None]


def _outputs(x: Tensor, data: Array, keep: bool) -> tuple[Array, *tuple[Array | None, ...]]:
    """Room for y, and with `keep` for what the derivative needs, which is None where there is going to be none."""
    y = aligned_like(data)
    if not keep:
        return (y,)
    return y, aligned_like(data) if gradients_needed((x,)) else None
