"""Arrays with a margin around them: a constant, or what the array itself has near by."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np

from distprop.tape import Array, Out
from distprop.tensor import Operand, Tensor, as_tensor, record

PadMode: TypeAlias = Literal["constant", "reflect", "replicate", "circular"]


def pad(input: Operand, pad: Sequence[int], mode: PadMode = "constant", value: float | None = None) -> Tensor:
    """x with a margin around it; a negative width cuts entries off.

    `pad` has two widths, before and after, for each axis from the last one on: (left, right, top, bottom) for images.
    The margin is `value`, 0 by default; or x mirrored at its first and last entries ("reflect"), these entries
    themselves ("replicate"), or x anew ("circular"). Derivative: the part of g that x was copied to, and to it is added
    what g has where entries were copied into the margin. Unlike PyTorch's, the other modes take any axes.

    Raises:
        TypeError: widths that are no integers.
        ValueError: another mode, an odd number of widths or too many, a length that would be negative, a margin wider
            than what it is copied from, or a `value` for another mode than "constant".
    """
    x = as_tensor(input)
    try:
        pad = [operator.index(width) for width in pad]
    except TypeError:
        raise TypeError(f"pad takes integers, two widths for each axis, last axis first; got {pad!r}") from None
    if mode not in get_args(PadMode):
        raise ValueError(f"pad knows the modes {', '.join(get_args(PadMode))}; got {mode!r}")
    if value is not None and mode != "constant":
        raise ValueError(f"pad with mode {mode!r} takes no value, got {value}")
    if len(pad) % 2 or len(pad) > 2 * x.ndim:
        raise ValueError(f"pad takes two widths for each axis, last axis first; got {tuple(pad)} for shape {x.shape}")
    widths = [(0, 0)] * (x.ndim - len(pad) // 2) + list(zip(pad[-2::-2], pad[-1::-2], strict=True))
    shape = tuple(n + before + after for n, (before, after) in zip(x.shape, widths, strict=True))
    kept = tuple(slice(max(-b, 0), n - max(-a, 0)) for n, (b, a) in zip(x.shape, widths, strict=True))
    inner = x.data[kept]
    margins = [(max(b, 0), max(a, 0)) for b, a in widths]
    if min(shape, default=0) < 0 or any(s.stop < s.start for s in kept):
        raise ValueError(f"pad by {tuple(pad)} would make shape {shape} of {x.shape}")
    for n, margin in zip(inner.shape, margins, strict=True):
        if any(margin) and max(margin) > _widest(mode, n):
            raise ValueError(
                f"pad by {tuple(pad)} with mode {mode!r} needs {max(margin)} entries to copy where shape {x.shape} has "
                f"{_widest(mode, n)}"
            )
    result = np.empty_like(inner, shape=shape)  # in the order in memory that x has
    if mode == "constant":
        result.fill(value or 0)
    result[tuple(slice(b, b + n) for n, (b, _) in zip(inner.shape, margins, strict=True))] = inner
    if mode != "constant":
        for axis, margin in enumerate(margins):
            before, within, after = _parts(result, axis, *margin)
            copied = _copied(mode, within.shape[-1], *margin)
            for part, source in zip((before, after), copied, strict=True):
                part[...] = within[..., source]

    def vjp(grad: Array, out: Out) -> list[Array]:
        for axis, margin in enumerate(margins):
            before, within, after = _parts(grad, axis, *margin)
            if mode != "constant" and any(margin):
                within = within.copy("K")
                for part, source in zip((before, after), _copied(mode, within.shape[-1], *margin), strict=True):
                    within[..., source] += part.sum(axis=-1, keepdims=True) if mode == "replicate" else part
            grad = np.moveaxis(within, -1, axis)
        if inner.shape == x.shape:
            return [grad]
        dx = np.zeros(x.shape, x.dtype)
        dx[kept] = grad
        return [dx]

    return record(result, (x,), vjp)


def _parts(padded: Array, axis: int, before: int, after: int) -> tuple[Array, Array, Array]:
    """The margin before, what is within, and the margin after; views whose last axis is `axis`."""
    moved = np.moveaxis(padded, axis, -1)
    end = moved.shape[-1] - after
    return moved[..., :before], moved[..., before:end], moved[..., end:]


def _copied(mode: PadMode, length: int, before: int, after: int) -> tuple[slice, slice]:
    """Which entries of an axis of `length` the margins before and after are copies of."""
    if mode == "reflect":  # the edge itself is not repeated
        return slice(before, 0, -1), slice(-2, -2 - after, -1)
    if mode == "replicate":
        return slice(0, 1), slice(length - 1, length)
    return slice(length - before, length), slice(0, after)


def _widest(mode: PadMode, length: int) -> float:
    """The widest margin of an axis."""
    if mode == "constant" or (mode == "replicate" and length):
        return np.inf
    return max(length - 1, 0) if mode == "reflect" else length
