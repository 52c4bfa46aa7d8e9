"""Elementwise work in pieces that stay in the cache.

A formula such as x·σ(x) takes several NumPy calls, each a pass over memory, and its temporaries are as large as x. Here
the formula is applied to one piece of some thousand numbers after the other: the temporaries are small, the passes run
in the second-level cache, and only the last one of each formula writes to memory, into the `out` that it is given.

Formulas are made of arithmetic, exp, log and tanh, for which NumPy has vector routines on every processor. expm1 and
log1p have them with AVX-512 only and take twenty times as long elsewhere; np.maximum(x, 0) takes twice as long as
arithmetic, np.where many times as long (`benchmarks/passes.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distprop.allocator import aligned_like
from distprop.tape import Array

CHUNK = 65536  # numbers: 256 KiB of float32, so that three or four arrays fit into a second-level cache of 1 MiB


def in_pieces(function: Callable[..., Any], first: Array, *others: Array | None, size: int | None = None) -> None:
    """Call `function` with one piece after the other of arrays that are compact, of one shape and of one layout.

    A piece has up to `size` numbers, `CHUNK` by default. None and single numbers among `others` are passed as they are.
    """
    size = CHUNK if size is None else size
    if first.size <= size:
        function(first, *others)
        return
    flat = [a.ravel("K") if a is not None and a.ndim else a for a in (first, *others)]
    in_blocks(function, first.size, size, flat)


def in_blocks(function: Callable[..., Any], count: int, step: int, arrays: Sequence[Array | None]) -> None:
    """Call `function` with `step` after `step` of the first axis, which has the length `count`, of all arrays.

    None and single numbers among them are passed as they are.
    """
    for start in range(0, count, step):
        function(*[a[start : start + step] if a is not None and a.ndim else a for a in arrays])


def compact(array: Array) -> Array:
    """`array` itself if its elements fill one stretch of memory in some order of the axes, else a copy."""
    if array.flags.c_contiguous or np.empty_like(array).strides == array.strides:
        return array
    return np.ascontiguousarray(array)


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
