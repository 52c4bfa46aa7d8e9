"""Normalisation of groups of channels of each image by itself.

A row is the group of one image, `(channels of the group · pixels)`, and has one mean and one variance; within it each
channel has its own γ and β. So everything but the few numbers a channel is a sum or a product over runs of pixels. The
work goes through memory once, in blocks that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distprop.allocator import aligned_empty, aligned_like
from distprop.functional.norm import affine_inputs, check_affine, placed
from distprop.functional.rows import Moments
from distprop.tape import Array, Out
from distprop.tensor import Operand, Tensor, record

_BLOCK = 32768  # numbers


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
    x, weight, bias = affine_inputs("group_norm", input, weight, bias)
    if x.ndim < 2:
        raise ValueError(f"group_norm needs x of shape (batch, channels, ...), got {x.shape}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm got {channels} channels; {num_groups} groups do not divide them")
    check_affine("group_norm", x, (channels,), weight, bias)
    cut = _Groups(channels, channels // num_groups, int(np.prod(x.shape[2:], dtype=np.int64)))
    rows = cut.rows(x.data)
    value, moments = aligned_like(rows), Moments(len(rows), x.dtype)
    gamma = np.ones(channels, x.dtype) if weight is None else weight.data
    beta = np.zeros(channels, x.dtype) if bias is None else bias.data
    for block in cut.blocks(rows):
        data = cut.by_channel(moments.measure(rows, block, eps, centred=True))
        slope = cut.times(moments.scale[block], gamma, block)
        level = beta[cut.channels(block)] - cut.repeated(moments.mean[block]) * slope
        y = np.multiply(data, slope[:, None], out=cut.by_channel(value[block]))
        y += level[:, None]

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        dx = aligned_like(rows) if x.requires_grad else None
        sums = _derivative(cut, cut.rows(grad), rows, gamma, moments, dx)
        gradients = [None if dx is None else dx.reshape(x.shape)]
        for tensor, each in ((weight, sums[0]), (bias, sums[1])):
            if tensor is not None:
                total = each.reshape(-1, channels).sum(axis=0) if tensor.requires_grad else None
                gradients.append(None if total is None else placed(total, tensor, out[len(gradients)]))
        return gradients

    inputs = tuple(tensor for tensor in (x, weight, bias) if tensor is not None)
    return record(value.reshape(x.shape), inputs, vjp)


def _derivative(
    cut: _Groups, grad: Array, rows: Array, gamma: Array, moments: Moments, dx: Array | None
) -> tuple[Array, Array]:
    """Σ g x̂ and Σ g over the pixels of each channel of each example, and dx in place.

    With s = 1/√(var + ε), so that x̂ = (x − mean) s: dx = s γg − a x + b with a = s³ (⟨γg x⟩ − mean ⟨γg⟩) and
    b = a mean − s ⟨γg⟩.
    """
    length = rows.shape[1]
    products, levels = np.empty((2, len(rows) * cut.each), rows.dtype)
    spare = aligned_empty((min(cut.step, len(rows)), length), rows.dtype)
    ones = np.ones(max(1, cut.pixels), rows.dtype)
    for block in cut.blocks(rows):
        g, x, s, mean = grad[block], moments.shifted(rows, block), moments.scale[block], moments.mean[block]
        inner = slice(block.start * cut.each, block.stop * cut.each)
        np.vecdot(cut.by_channel(g), cut.by_channel(x), out=products[inner])
        np.vecdot(cut.by_channel(g), ones, out=levels[inner])
        if dx is not None:
            factors = gamma[cut.channels(block)]
            product, level = ((factors * a[inner]).reshape(len(g), -1).sum(axis=1) for a in (products, levels))
            along = s * s * s * (product - mean * level) / length
            h = np.multiply(x, along[:, None], out=spare[: len(g)])
            h += (s * level / length - along * mean)[:, None]
            slope = cut.times(s, gamma, block)
            np.multiply(cut.by_channel(g), slope[:, None], out=cut.by_channel(dx[block]))
            dx[block] -= h
    products -= cut.repeated(moments.mean) * levels
    products *= cut.repeated(moments.scale)
    return products, levels


@dataclass(frozen=True)
class _Groups:
    """How images are cut into rows: `each` of the channels to a row."""

    number: int  # of channels
    each: int
    pixels: int

    @property
    def step(self) -> int:
        """Rows in a block."""
        return max(1, _BLOCK // max(1, self.each * self.pixels))

    def rows(self, array: Array) -> Array:
        length = self.each * self.pixels
        return np.ascontiguousarray(array).reshape(-1, length) if length else np.empty((0, 1), array.dtype)

    def by_channel(self, rows: Array) -> Array:
        return rows.reshape(-1, max(1, self.pixels))

    def blocks(self, rows: Array) -> Iterator[slice]:
        return (slice(start, min(start + self.step, len(rows))) for start in range(0, len(rows), self.step))

    def channels(self, block: slice) -> Array:
        """The number of each channel of a block."""
        return np.arange(block.start * self.each, block.stop * self.each) % self.number

    def times(self, scale: Array, gamma: Array, block: slice) -> Array:
        """s γ of each channel of a block."""
        return gamma[self.channels(block)] * self.repeated(scale)

    def repeated(self, numbers: Array) -> Array:
        """Numbers of rows as numbers of channels."""
        return np.repeat(numbers, self.each)
