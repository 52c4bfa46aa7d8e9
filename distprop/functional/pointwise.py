"""Elementwise work in pieces that stay in the cache.

A formula such as x·σ(x) takes several NumPy calls, each a pass over memory, and its temporaries are as large as x. Here
the formula is applied to one piece of some thousand numbers after the other: the temporaries are small, the passes run
in the second-level cache, and the formula is written as before. `rowwise` does the same for whole rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from distprop.tape import Array, Out
from distprop.tensor import Tensor, record

Value: TypeAlias = Callable[[Array], Array]
Derivative: TypeAlias = Callable[[Array, Array, Array], Array]

CHUNK = 32768  # numbers: 128 KiB of float32, so that half a dozen temporaries fit into a second-level cache of 1 MiB


def pointwise(x: Tensor, value: Value, derivative: Derivative) -> Tensor:
    """Record y = `value`(x), whose gradient is `derivative`(g, x, y), for elementwise functions.

    The result has the memory layout of x, so channels-last images stay so.
    """
    data = _compact(x.data)
    result = np.empty_like(data)
    _in_pieces(value, (data,), result)

    def vjp(grad: Array, out: Out) -> list[Array]:
        gradient = np.empty_like(data)
        _in_pieces(derivative, (_laid_out_as(data, grad), data, result), gradient)
        return [gradient]

    return record(result, (x,), vjp)


def rowwise(x: Tensor, dim: int, value: Value, derivative: Derivative) -> Tensor:
    """Record y = `value`(x), whose gradient is `derivative`(g, x, y), for functions of the rows along `dim`.

    Both get matrices `(rows, length)` and return one of the same shape.
    """
    data = np.ascontiguousarray(np.moveaxis(x.data, dim, -1))
    result = np.empty_like(data)
    _in_rows(value, (data,), result)

    def vjp(grad: Array, out: Out) -> list[Array]:
        gradient = np.empty_like(data)
        _in_rows(derivative, (np.ascontiguousarray(np.moveaxis(grad, dim, -1)), data, result), gradient)
        return [np.moveaxis(gradient, -1, dim)]

    return record(np.moveaxis(result, -1, dim), (x,), vjp)


def in_pieces(function: Callable[..., Array], *inputs: Array) -> Array:
    """`function` of several arrays of one shape, piece by piece; a new array like the first."""
    arrays = [np.ascontiguousarray(array) for array in inputs]
    result = np.empty_like(arrays[0])
    _in_pieces(function, tuple(arrays), result)
    return result


def _in_pieces(function: Callable[..., Array], inputs: tuple[Array, ...], result: Array) -> None:
    if result.size <= CHUNK:
        result[...] = function(*inputs)
        return
    flat = [array.ravel("K") for array in (*inputs, result)]  # views: all are compact and of one layout
    for start in range(0, result.size, CHUNK):
        *pieces, target = [array[start : start + CHUNK] for array in flat]
        target[...] = function(*pieces)


def _in_rows(function: Callable[..., Array], inputs: tuple[Array, ...], result: Array) -> None:
    if not result.size:
        return
    length = result.shape[-1]
    rows = [array.reshape(-1, length) for array in (*inputs, result)]
    step = max(1, CHUNK // length)
    for start in range(0, len(rows[-1]), step):
        *pieces, target = [array[start : start + step] for array in rows]
        target[...] = function(*pieces)


def _compact(array: Array) -> Array:
    """`array` itself if its elements fill one stretch of memory in some order of the axes, else a copy."""
    return array if np.empty_like(array).strides == array.strides else np.ascontiguousarray(array)


def _laid_out_as(model: Array, array: Array) -> Array:
    """`array` in the memory layout of `model`."""
    if array.strides == model.strides and array.dtype == model.dtype:
        return array
    copy = np.empty_like(model)
    copy[...] = array
    return copy
