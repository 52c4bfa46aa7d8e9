"""Normalisation of each example by itself: layer, group and root-mean-square norm, one computation for all three.

The input is seen as rows, each of which is normalised: a group of channels of one image, or the last axes of one token.
The work goes through memory once, in blocks that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distprop.functional.check import floating, same_dtype
from distprop.tape import Array, Out
from distprop.tensor import Operand, Tensor, as_tensor, record

_BLOCK = 65536  # numbers; with four such blocks in float32 a pass stays within 1 MB


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
    x, weight, bias = _tensors("layer_norm", input, weight, bias)
    return _normalise(x, weight, bias, _Rows(_row_length("layer_norm", x, normalized_shape, weight, bias)), eps)


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
    x, weight, _ = _tensors("rms_norm", input, weight, None)
    cut = _Rows(_row_length("rms_norm", x, normalized_shape, weight, None), centred=False)
    return _normalise(x, weight, None, cut, float(np.finfo(x.dtype).eps) if eps is None else eps)


def group_norm(
    input: Operand,
    num_groups: int,
    weight: Operand | None = None,
    bias: Operand | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = γ x̂ + β with x̂ = (x − mean)/√(var + ε) over each of `num_groups` groups of channels of each example.

    Shapes: x `(batch, channels, ...)`, γ = weight and β = bias `(channels,)`. The result is contiguous, whatever the
    memory layout of x. Derivative: as for `layer_norm`, a row being the group. Source: Wu and He, 2018,
    arXiv:1803.08494.

    Raises:
        ValueError: the groups do not divide the channels, or weight or bias is not one number a channel.
        TypeError: the dtypes differ or are not floating point.
    """
    x, weight, bias = _tensors("group_norm", input, weight, bias)
    if x.ndim < 2:
        raise ValueError(f"group_norm needs x of shape (batch, channels, ...), got {x.shape}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm got {channels} channels; {num_groups} groups do not divide them")
    _check_affine("group_norm", x, (channels,), weight, bias)
    size = int(np.prod(x.shape[2:], dtype=np.int64))
    return _normalise(x, weight, bias, _Rows(channels // num_groups * size, num_groups, size), eps)


@dataclass(frozen=True)
class _Rows:
    """How a tensor is cut into rows, and where γ and β belong: `groups` rows are as wide as γ's pattern."""

    length: int
    groups: int = 1
    repeat: int = 1  # how often each number of γ and β stands in the pattern
    centred: bool = True

    @property
    def width(self) -> int:
        return self.groups * self.length

    def of(self, array: Array) -> Array:
        return np.ascontiguousarray(array).reshape(-1, self.length) if self.length else array.reshape(0, 1)

    def pattern(self, parameter: Tensor | None) -> Array | None:
        return None if parameter is None else np.repeat(parameter.data.reshape(-1), self.repeat)

    def blocks(self, rows: Array) -> Iterator[slice]:
        step = self.groups * max(1, _BLOCK // max(1, self.width))
        return (slice(start, start + step) for start in range(0, len(rows), step))


def _normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, cut: _Rows, eps: float) -> Tensor:
    """Normalise each row, then apply γ and β."""
    rows = cut.of(x.data)
    value, mean, scale = np.empty_like(rows), np.zeros(len(rows), x.dtype), np.empty(len(rows), x.dtype)
    gamma, beta, ones = cut.pattern(weight), cut.pattern(bias), np.ones(rows.shape[1], x.dtype)
    for block in cut.blocks(rows):
        y = value[block]
        if cut.centred:
            m = np.matmul(rows[block], ones, out=mean[block])
            m /= cut.length
            np.subtract(rows[block], m[:, None], out=y)
        else:
            y[...] = rows[block]
        s = np.vecdot(y, y, out=scale[block])
        s /= cut.length
        s += eps
        np.sqrt(s, out=s)
        np.reciprocal(s, out=s)
        y *= s[:, None]
        wide = y.reshape(-1, cut.width)
        if gamma is not None:
            wide *= gamma
        if beta is not None:
            wide += beta
    inputs = tuple(tensor for tensor in (x, weight, bias) if tensor is not None)

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        wanted = [tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)]
        dx, *patterns = _derivative(cut, cut.of(grad), rows, gamma, mean, scale, wanted)
        gradients = [None if dx is None else dx.reshape(x.shape)]
        for tensor, pattern in zip((weight, bias), patterns, strict=True):
            if tensor is not None:
                gradients.append(None if pattern is None else _fold(pattern, cut.repeat, tensor, out[len(gradients)]))
        return gradients

    return record(value.reshape(x.shape), inputs, vjp)


def _derivative(
    cut: _Rows, grad: Array, rows: Array, gamma: Array | None, mean: Array, scale: Array, wanted: Sequence[bool]
) -> tuple[Array | None, Array | None, Array | None]:
    """dx, and dγ and dβ as patterns of `width` numbers; None for what is not wanted. x̂ is computed anew from x."""
    dx = np.empty_like(rows) if wanted[0] else None
    dgamma = np.zeros(cut.width, rows.dtype) if wanted[1] else None
    dbeta = np.zeros(cut.width, rows.dtype) if wanted[2] else None
    ones, spare = np.ones(max(rows.shape), rows.dtype), np.empty_like(rows[: cut.groups + _BLOCK // max(1, cut.length)])
    for block in cut.blocks(rows):
        g, s = grad[block], scale[block]
        wide_g, h, normal = g.reshape(-1, cut.width), np.empty_like(g) if dx is None else dx[block], spare[: len(g)]
        each = ones[: len(wide_g)]
        np.subtract(rows[block], mean[block][:, None], out=normal)
        normal *= s[:, None]
        if dbeta is not None:
            dbeta += each @ wide_g
        if dgamma is not None:
            np.multiply(g, normal, out=h)
            dgamma += each @ h.reshape(-1, cut.width)
        if dx is None:
            continue
        if gamma is None:
            h[...] = g
        else:
            np.multiply(wide_g, gamma, out=h.reshape(-1, cut.width))
        along = np.vecdot(h, normal)
        along /= cut.length
        normal *= along[:, None]
        if cut.centred:
            normal += (h @ ones[: cut.length] / cut.length)[:, None]
        h -= normal
        h *= s[:, None]
    return dx, dgamma, dbeta


def _fold(pattern: Array, repeat: int, parameter: Tensor, out: Array | None) -> Array:
    """Add up the places of each number of γ or β in the pattern."""
    if repeat == 1 and out is None:
        return pattern.reshape(parameter.shape)
    total = pattern.reshape(*parameter.shape, repeat).sum(axis=-1, out=out)
    return np.asarray(total)


def _tensors(
    operation: str, input: Operand, weight: Operand | None, bias: Operand | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x = as_tensor(input)
    parameters = {name: as_tensor(p) for name, p in (("weight", weight), ("bias", bias)) if p is not None}
    floating(operation, x)
    same_dtype(operation, x=x, **parameters)
    return x, parameters.get("weight"), parameters.get("bias")


def _row_length(
    operation: str, x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> int:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(f"{operation} over the last axes {shape} got x of shape {x.shape}; it must end in {shape}")
    _check_affine(operation, x, shape, weight, bias)
    return int(np.prod(shape, dtype=np.int64))


def _check_affine(
    operation: str, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> None:
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != shape:
            raise ValueError(
                f"{operation} of x of shape {x.shape} got a {name} of shape {parameter.shape}; it must be {shape}"
            )
