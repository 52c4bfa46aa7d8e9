"""Arrays put together, cut apart and chosen from; the derivative does the opposite to the gradient."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from distprop.functional.check import same_dtype, valid_axis
from distprop.tape import Array, Out, sum_to
from distprop.tensor import Operand, Tensor, as_tensor, record


def concatenate(tensors: Sequence[Operand], dim: int = 0) -> Tensor:
    """The tensors one after the other along `dim`; their other axes agree. Derivative: each gets its piece of g.

    Raises:
        ValueError: nothing to join, or lengths that differ along another axis.
        IndexError: `dim` out of range.
        TypeError: the dtypes differ or are not floating point.
    """
    inputs = _several("concatenate", tensors)
    axis = valid_axis("concatenate", dim, inputs[0].shape)
    for number, x in enumerate(inputs):
        if x.ndim != inputs[0].ndim or _without(x.shape, axis) != _without(inputs[0].shape, axis):
            raise ValueError(
                f"concatenate along dim {axis} got shape {inputs[0].shape} first and {x.shape} as number {number}; "
                f"all other axes must agree"
            )
    bounds = list(accumulate((x.shape[axis] for x in inputs), initial=0))

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        pieces = (grad[_along(axis, slice(a, b))] for a, b in pairwise(bounds))
        return [piece if x.requires_grad else None for x, piece in zip(inputs, pieces, strict=True)]

    return record(np.concatenate([x.data for x in inputs], axis=axis), inputs, vjp)


def stack(tensors: Sequence[Operand], dim: int = 0) -> Tensor:
    """The tensors, all of one shape, side by side along a new axis `dim`. Derivative: each gets its entry of g.

    Raises:
        ValueError: nothing to join, or shapes that differ.
        IndexError: `dim` out of range.
        TypeError: the dtypes differ or are not floating point.
    """
    inputs = _several("stack", tensors)
    axis = valid_axis("stack", dim, (len(inputs), *inputs[0].shape))
    for number, x in enumerate(inputs):
        if x.shape != inputs[0].shape:
            raise ValueError(
                f"stack got shape {inputs[0].shape} first and {x.shape} as number {number}; all must agree"
            )

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        entries = np.moveaxis(grad, axis, 0)
        return [entry if x.requires_grad else None for x, entry in zip(inputs, entries, strict=True)]

    return record(np.stack([x.data for x in inputs], axis=axis), inputs, vjp)


def split(input: Operand, split_size_or_sections: int | Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """Pieces of x along `dim`: of so many entries each, the last maybe fewer, or of the lengths given. They are views.

    Derivative: the pieces' gradients side by side. They are written into one array while the walk goes on, and the
    parts of pieces that lead nowhere stay 0.

    Raises:
        TypeError: sizes that are no integers.
        ValueError: a size below 1, or lengths that do not add up.
        IndexError: `dim` out of range.
    """
    x = as_tensor(input)
    axis = valid_axis("split", dim, x.shape)
    count = x.shape[axis]
    if isinstance(split_size_or_sections, int | np.integer):
        size = int(split_size_or_sections)
        if size < 1:
            raise ValueError(f"split needs pieces of at least 1 entry, got {size}")
        sections = [min(size, count - start) for start in range(0, max(count, 1), size)]
    else:
        try:
            sections = [operator.index(length) for length in split_size_or_sections]
        except TypeError:
            raise TypeError(
                f"split takes a number of entries, or lengths, which are integers; got {split_size_or_sections!r}"
            ) from None
        if sum(sections) != count or min(sections, default=0) < 0:
            raise ValueError(
                f"split got lengths {sections} for dim {axis} of shape {x.shape}; they must add up to {count}"
            )
    # the pieces' common source, which nothing else can use: what its node has received is theirs to write into
    whole = x if x.node is None else record(x.data, (x,), lambda grad, out: [grad])
    source = whole.node

    def piece(index: tuple[slice, ...]) -> Tensor:
        def vjp(grad: Array, out: Out) -> list[Array | None]:
            if source is not None and source.grad is not None:
                source.grad[index] = grad
                return [None]
            dx = np.zeros(x.shape, x.dtype)
            dx[index] = grad
            return [dx]

        return record(x.data[index], (whole,), vjp)

    return tuple(piece(_along(axis, slice(a, b))) for a, b in pairwise(accumulate(sections, initial=0)))


def where(condition: Operand, input: Operand, other: Operand) -> Tensor:
    """x where the condition holds, else y; shapes broadcast, and a Python number takes the other one's dtype.

    Derivative: dx = g where the condition holds, else 0; dy the other way round.

    Raises:
        TypeError: a condition that is not boolean, or dtypes that differ.
        ValueError: shapes that do not broadcast.
    """
    chosen = as_tensor(condition).data
    if chosen.dtype != np.bool_:
        raise TypeError(f"where needs a boolean condition, got dtype {chosen.dtype}")
    x, y = _pair(input, other)
    same_dtype("where", input=x, other=y)
    try:
        np.broadcast_shapes(chosen.shape, x.shape, y.shape)
    except ValueError:
        raise ValueError(
            f"where got shapes that do not broadcast: condition {chosen.shape}, input {x.shape}, other {y.shape}"
        ) from None
    zero = np.zeros((), x.dtype)

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        dx = sum_to(np.where(chosen, grad, zero), x.shape) if x.requires_grad else None
        dy = sum_to(np.where(chosen, zero, grad), y.shape) if y.requires_grad else None
        return [dx, dy]

    return record(np.where(chosen, x.data, y.data), (x, y), vjp)


def _pair(input: Operand, other: Operand) -> tuple[Tensor, Tensor]:
    """Both as tensors; a Python number in the other one's dtype."""
    if isinstance(input, int | float) and not isinstance(other, int | float):
        y = as_tensor(other)
        return Tensor(np.asarray(input, y.dtype)), y
    x = as_tensor(float(input) if isinstance(input, int) else input)
    return x, Tensor(np.asarray(other, x.dtype)) if isinstance(other, int | float) else as_tensor(other)


def _several(operation: str, tensors: Sequence[Operand]) -> tuple[Tensor, ...]:
    inputs = tuple(as_tensor(x) for x in tensors)
    if not inputs:
        raise ValueError(f"{operation} needs at least one tensor")
    same_dtype(operation, **{f"number {i}": x for i, x in enumerate(inputs)})
    return inputs


def _along(axis: int, part: slice) -> tuple[slice, ...]:
    return (slice(None),) * axis + (part,)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]
