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
from distprop.functional.outer import Outer
from distprop.tape import Array, Out
from distprop.tensor import Operand, Tensor, record

_BLOCK = 32768  # numbers
_LONG = 1024  # a run of numbers for which NumPy's broadcasting is as fast as BLAS


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
    value = aligned_like(rows)
    mean, scale = np.empty((2, len(rows)), x.dtype)
    gamma = np.ones(channels, x.dtype) if weight is None else weight.data
    along_row, along_channel = _Spread(cut.step, rows), _Spread(cut.step * cut.each, cut.by_channel(rows))
    for block in cut.blocks(rows):
        m, s = mean[block], scale[block]
        np.matmul(rows[block], along_row.ones, out=m)
        m /= rows.shape[1]
        y = np.subtract(rows[block], along_row(m), out=value[block])
        np.vecdot(y, y, out=s)
        s /= rows.shape[1]
        s += eps
        np.sqrt(s, out=s)
        np.reciprocal(s, out=s)
        y = cut.by_channel(y)
        y *= along_channel(cut.times(s, gamma, block))
        if bias is not None:
            y += along_channel(bias.data[cut.channels(block)])

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        dx = aligned_like(rows) if x.requires_grad else None
        sums = _derivative(cut, cut.rows(grad), rows, gamma, mean, scale, dx)
        gradients = [None if dx is None else dx.reshape(x.shape)]
        for tensor, each in ((weight, sums[0]), (bias, sums[1])):
            if tensor is not None:
                total = each.reshape(-1, channels).sum(axis=0) if tensor.requires_grad else None
                gradients.append(None if total is None else placed(total, tensor, out[len(gradients)]))
        return gradients

    inputs = tuple(tensor for tensor in (x, weight, bias) if tensor is not None)
    return record(value.reshape(x.shape), inputs, vjp)


def _derivative(
    cut: _Groups, grad: Array, rows: Array, gamma: Array, mean: Array, scale: Array, dx: Array | None
) -> tuple[Array, Array]:
    """Σ g x̂ and Σ g over the pixels of each channel of each example, and dx in place.

    With d = x − mean and s = 1/√(var + ε), so that x̂ = d s: dx = s γg − (d s³ ⟨γg d⟩ + s ⟨γg⟩).
    """
    products, levels = np.empty((2, len(rows) * cut.each), rows.dtype)
    along_row, along_channel = _Spread(cut.step, rows), _Spread(cut.step * cut.each, cut.by_channel(rows))
    spare, spare_h = (aligned_empty((cut.step, rows.shape[1]), rows.dtype) for _ in range(2))
    for block in cut.blocks(rows):
        g, s, count = grad[block], scale[block], len(rows[block])
        d, h = spare[:count], spare_h[:count]
        inner = slice(block.start * cut.each, (block.start + count) * cut.each)
        np.subtract(rows[block], along_row(mean[block]), out=d)
        np.vecdot(cut.by_channel(g), cut.by_channel(d), out=products[inner])
        np.vecdot(cut.by_channel(g), along_channel.ones, out=levels[inner])
        if dx is not None:
            factors = gamma[cut.channels(block)]
            product, level = ((factors * a[inner]).reshape(count, -1).sum(axis=1) for a in (products, levels))
            d *= along_row(s**3 * product / rows.shape[1])
            d += along_row(s * level / rows.shape[1])
            np.multiply(cut.by_channel(g), along_channel(cut.times(s, gamma, block)), out=cut.by_channel(h))
            np.subtract(h, d, out=dx[block])
    products *= np.repeat(scale, cut.each)
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
        return gamma[self.channels(block)] * np.repeat(scale, self.each)


class _Spread:
    """A number for each row, to be combined with rows of `matrix`."""

    def __init__(self, count: int, matrix: Array) -> None:
        count, length = min(count, len(matrix)), matrix.shape[1]
        self.ones = np.ones(length, matrix.dtype)
        self._outer = Outer(count, length, matrix.dtype) if length < _LONG else None

    def __call__(self, numbers: Array) -> Array:
        return numbers[:, None] if self._outer is None else self._outer(numbers, self._outer.ones)
