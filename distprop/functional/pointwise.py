"""Elementwise work in pieces that stay in the cache.

A formula such as x·σ(x) takes several NumPy calls, each a pass over memory, and its temporaries are as large as x. Here
the formula is applied to one piece of some thousand numbers after the other: the temporaries are small, the passes run
in the second-level cache, and only the last one of each formula writes to memory, into the `out` that it is given.
`rowwise` does the same for whole rows.

Formulas are made of arithmetic, exp, log and tanh, for which NumPy has vector routines on every processor. expm1 and
log1p have them with AVX-512 only and take twenty times as long elsewhere; np.maximum(x, 0) takes twice as long as
arithmetic, np.where many times as long (`benchmarks/passes.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from distprop.allocator import aligned_like
from distprop.functional.short_buffers import short_buffers
from distprop.tape import Array, Out, gradients_needed
from distprop.tensor import Tensor, record

Value: TypeAlias = Callable[..., Any]  # (x, out), and with keep (x, out, kept)
Derivative: TypeAlias = Callable[[Array, Array, Array, Array], Any]  # (g, x or what was kept, y, out)

CHUNK = 65536  # numbers: 256 KiB of float32, so that three or four arrays fit into a second-level cache of 1 MiB


def pointwise(x: Tensor, value: Value, derivative: Derivative, keep: bool = False, piece: int | None = None) -> Tensor:
    """Record y, which `value(x, out)` writes into `out`, and the gradient, which `derivative(g, x, y, out)` writes.

    With `keep` the forward pass keeps what the derivative needs in place of x, one number for each element: the calls
    are `value(x, out, kept)`, `kept` being None where no gradient is needed, and `derivative(g, kept, y, out)`.
    The calls for the value get up to `piece` numbers at a time, `CHUNK` by default.
    The result has the memory layout of x, so channels-last images stay so.
    """
    data = _compact(x.data)
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


def in_pieces(function: Callable[..., Any], first: Array, *others: Array | None, size: int | None = None) -> None:
    """Call `function` with one piece after the other of arrays that are compact, of one shape and of one layout.

    A piece has up to `size` numbers, `CHUNK` by default. None and single numbers among `others` are passed as they are.
    """
    size = CHUNK if size is None else size
    if first.size <= size:
        function(first, *others)
        return
    flat = [a.ravel("K") if a is not None and a.ndim else a for a in (first, *others)]
    _in_blocks(function, first.size, size, flat)


def in_rows(function: Callable[..., Any], first: Array, *others: Array | None) -> None:
    """Call `function` with some rows after the other of C-contiguous arrays `(..., length)`, each with its own length.

    None and single numbers among `others` are passed as they are.
    """
    if first.size:
        length = first.shape[-1]
        rows = [a.reshape(-1, a.shape[-1]) if a is not None and a.ndim else a for a in (first, *others)]
        with short_buffers():
            _in_blocks(function, first.size // length, max(1, 2 * CHUNK // length), rows)  # fewer arrays, slower calls


def laid_out_as(model: Array, array: Array) -> Array:
    """`array` in the memory layout of `model`, a compact array."""
    if array.strides == model.strides and array.dtype == model.dtype:
        return array
    copy = np.empty_like(model)
    copy[...] = array
    return copy


def like(model: Array, place: Array | None) -> Array:
    """`place`, where a gradient is wanted, if it has the memory layout of `model`, else a new array."""
    return aligned_like(model) if place is None or place.strides != model.strides else place


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


def _in_blocks(function: Callable[..., Any], count: int, step: int, arrays: Sequence[Array | None]) -> None:
    for start in range(0, count, step):
        function(*[a[start : start + step] if a is not None and a.ndim else a for a in arrays])


def _compact(array: Array) -> Array:
    """`array` itself if its elements fill one stretch of memory in some order of the axes, else a copy."""
    if array.flags.c_contiguous or np.empty_like(array).strides == array.strides:
        return array
    return np.ascontiguousarray(array)
