"""Normalisation of each example by itself over its last axes: layer norm and root-mean-square norm.

The input is seen as rows, each of which is normalised, such as a token. The work goes through memory once, in blocks
that stay in the cache. `distprop.functional.group_norm` does the same for groups of channels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from distprop.allocator import aligned_empty, aligned_like
from distprop.functional.check import affine_inputs, check_affine
from distprop.functional.moments import Moments, Outer
from distprop.functional.pointwise import placed
from distprop.functional.short_buffers import short_buffers
from distprop.tape import Array, Out
from distprop.tensor import Operand, Tensor, record

_BLOCK = 65536  # numbers: measured on a second-level cache of 2 MiB; twice as many are 14 to 33 % slower


def layer_norm(
    input: Operand,
    normalized_shape: int | Sequence[int],
    weight: Operand | None = None,
    bias: Operand | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = γ x̂ + β with x̂ = (x − mean)/√(var + ε) over the last axes, whose lengths are `normalized_shape`.

    Shapes: x `(..., *normalized_shape)`, γ = weight and β = bias `normalized_shape`. var divides by the count.
    Derivative: dx = (γg − ⟨γg⟩ − x̂ ⟨γg x̂⟩)/√(var + ε), ⟨ ⟩ being the mean over a row; dγ = Σ g x̂ and dβ = Σ g
    over the rows. Source: Ba et al., 2016, arXiv:1607.06450.

    Raises:
        ValueError: x does not end in `normalized_shape`, or weight or bias has another shape.
        TypeError: the dtypes differ or are not floating point.
    """
    x, weight, bias = affine_inputs("layer_norm", input, weight, bias)
    return _normalise(x, weight, bias, _row_length("layer_norm", x, normalized_shape, weight, bias), eps)


def rms_norm(
    input: Operand, normalized_shape: int | Sequence[int], weight: Operand | None = None, eps: float | None = None
) -> Tensor:
    """y = γ x̂ with x̂ = x/√(⟨x²⟩ + ε), ⟨ ⟩ being the mean over the last axes; ε is the dtype's smallest step by default.

    Shapes: x `(..., *normalized_shape)`, γ = weight `normalized_shape`.
    Derivative: dx = (γg − x̂ ⟨γg x̂⟩)/√(⟨x²⟩ + ε); dγ = Σ g x̂. Source: Zhang and Sennrich, 2019, arXiv:1910.07467.

    Raises:
        ValueError: x does not end in `normalized_shape`, or weight has another shape.
        TypeError: the dtypes differ or are not floating point.
    """
    x, weight, _ = affine_inputs("rms_norm", input, weight, None)
    length = _row_length("rms_norm", x, normalized_shape, weight, None)
    return _normalise(x, weight, None, length, float(np.finfo(x.dtype).eps) if eps is None else eps, centred=False)


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, length: int, eps: float, centred: bool = True
) -> Tensor:
    """Normalise each row of `length` numbers, then apply γ and β: y = x ⊙ s γ + (β − mean s γ)."""
    rows = np.ascontiguousarray(x.data).reshape(-1, length) if length else x.data.reshape(0, 1)
    gamma = np.zeros((2, rows.shape[1]), x.dtype)
    gamma[0] = 1 if weight is None else weight.data.reshape(-1)
    gamma_beta = gamma.copy()
    if bias is not None:
        gamma_beta[1] = bias.data.reshape(-1)
    levels = np.full((len(rows), 2), -1, x.dtype)  # mean s, −1
    value, moments = aligned_like(rows), Moments(*rows.shape, x.dtype)
    outer = Outer(_step(rows), rows.shape[1], x.dtype)
    with short_buffers(over="ignore", invalid="ignore"):
        for block in _blocks(rows):
            data = moments.measure(rows, block, eps, centred)
            scale = moments.scale[block]
            y = np.multiply(data, outer(scale, gamma), out=value[block])
            if centred:
                np.multiply(scale, moments.mean[block], out=levels[block, 0])
                y -= outer.of_pairs(levels[block], gamma_beta)

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        wanted = [tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)]
        g = np.ascontiguousarray(grad).reshape(rows.shape)
        with short_buffers():
            dx, *sums = _derivative(g, rows, gamma, moments, wanted, centred)
        gradients = [None if dx is None else dx.reshape(x.shape)]
        for tensor, total in zip((weight, bias), sums, strict=True):
            if tensor is not None:
                gradients.append(placed(total, tensor, out[len(gradients)]))
        return gradients

    inputs = tuple(tensor for tensor in (x, weight, bias) if tensor is not None)
    return record(value.reshape(x.shape), inputs, vjp)


def _derivative(
    grad: Array, rows: Array, gamma: Array, moments: Moments, wanted: Sequence[bool], centred: bool
) -> tuple[Array | None, Array | None, Array | None]:
    """dx, dγ and dβ; None for what is not wanted.

    `gamma` has a second row of zeros. With s = 1/√(var + ε), so that x̂ = (x − mean) s: dγ = Σ s g x − Σ s mean g
    over the rows, and dx = s γg − a x + b with a = s³ (⟨γg x⟩ − mean ⟨γg⟩) and b = a mean − s ⟨γg⟩.
    """
    length, mean, scale = rows.shape[1], moments.mean, moments.scale
    dx = aligned_like(rows) if wanted[0] else None
    sums = np.zeros((2, length), rows.dtype)
    products = aligned_empty((_step(rows), length), rows.dtype)
    outer = Outer(_step(rows), length, rows.dtype)
    weights = np.ones((2, len(rows)), rows.dtype)
    np.multiply(-scale, mean, out=weights[0])
    share, cube = scale / length, scale * scale * scale / length
    for block in _blocks(rows):
        g = grad[block]
        sums += weights[:, block] @ g
        if dx is None and not wanted[1]:
            continue
        x = moments.shifted(rows, block)
        product = np.multiply(g, x, out=products[: len(g)])
        sums[0] += scale[block] @ product
        if dx is None:
            continue
        level, along = g @ gamma[0], product @ gamma[0]
        along -= mean[block] * level
        along *= cube[block]
        np.multiply(x, outer(along), out=product)
        if centred:
            level *= share[block]
            along *= mean[block]
            level -= along
            product += outer(level)
        np.multiply(g, outer(scale[block], gamma), out=dx[block])
        dx[block] -= product
    return dx, sums[0] if wanted[1] else None, sums[1] if wanted[2] else None


def _step(rows: Array) -> int:
    return min(max(1, _BLOCK // rows.shape[1]), len(rows))


def _blocks(rows: Array) -> Iterator[slice]:
    step = max(1, _step(rows))
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _row_length(
    operation: str, x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> int:
    shape = lengths(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(f"{operation} over the last axes {shape} got x of shape {x.shape}; it must end in {shape}")
    check_affine(operation, x, shape, weight, bias)
    return math.prod(shape)


def lengths(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """One length or several, also NumPy's integers, as Python's."""
    several: Any = normalized_shape if np.ndim(normalized_shape) else (normalized_shape,)
    return tuple(operator.index(length) for length in several)
