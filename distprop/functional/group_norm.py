"""Normalisation of groups of channels of each image by itself.

A row is the group of one image, `(channels of the group · pixels)`, and has one mean and one variance; within it each
channel has its own γ and β. So everything but the few numbers a channel is a sum or a product over runs of pixels. The
work goes through memory once, in blocks that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from distprop.allocator import aligned_like
from distprop.functional.check import affine_inputs, check_affine
from distprop.functional.moments import Moments, Outer
from distprop.functional.pointwise import placed
from distprop.functional.short_buffers import short_buffers
from distprop.sums import sum_over
from distprop.tape import Array, Out
from distprop.tensor import Operand, Tensor, record

_BLOCK = 65536  # numbers


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
    each = channels // num_groups
    pixels = math.prod(x.shape[2:])
    images = np.ascontiguousarray(x.data).reshape(len(x) * num_groups, each, pixels)
    gamma, beta = (
        np.tile(np.full(channels, default, x.dtype) if p is None else p.data, len(x)).reshape(-1, each)
        for p, default in ((weight, 1), (bias, 0))
    )
    value, moments = aligned_like(images), Moments(len(images), max(1, images[:1].size), x.dtype)
    by_channel = Outer(_step(images) * each, pixels, x.dtype)
    with short_buffers(over="ignore", invalid="ignore"):
        for block in _blocks(images):
            data = moments.measure(_rows(images), block, eps, centred=True)
            slope = gamma[block] * moments.scale[block, None]
            level = beta[block] - slope * moments.mean[block, None]
            y = value[block].reshape(-1, pixels)
            np.multiply(data.reshape(y.shape), by_channel(slope.reshape(-1)), out=y)
            y += by_channel(level.reshape(-1))

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        dx = aligned_like(images) if x.requires_grad else None
        with short_buffers():
            sums = _derivative(np.ascontiguousarray(grad).reshape(images.shape), images, gamma, moments, dx)
        gradients = [None if dx is None else dx.reshape(x.shape)]
        for tensor, each in ((weight, sums[0]), (bias, sums[1])):
            if tensor is not None:
                total = sum_over(each.reshape(-1, channels), (0,)) if tensor.requires_grad else None
                gradients.append(placed(total, tensor, out[len(gradients)]))
        return gradients

    inputs = tuple(tensor for tensor in (x, weight, bias) if tensor is not None)
    return record(value.reshape(x.shape), inputs, vjp)


def _derivative(grad: Array, images: Array, gamma: Array, moments: Moments, dx: Array | None) -> tuple[Array, Array]:
    """Σ g x̂ and Σ g over the pixels of each channel of each example, and dx in place.

    With s = 1/√(var + ε), so that x̂ = (x − mean) s: dx = s γg − a x + b with a = s³ (⟨γg x⟩ − mean ⟨γg⟩) and
    b = a mean − s ⟨γg⟩.
    """
    products, levels = np.zeros((2, *gamma.shape), images.dtype)
    each, pixels = images.shape[1:]
    rows, spare = _rows(images), aligned_like(_rows(images[: _step(images)]))
    by_row = Outer(len(spare), rows.shape[1], images.dtype)
    by_channel = Outer(len(spare) * each, pixels, images.dtype)
    for block in _blocks(images):
        g, s, mean = grad[block], moments.scale[block], moments.mean[block]
        x = moments.shifted(rows, block)
        np.vecdot(g, x.reshape(g.shape), out=products[block])
        np.vecdot(g, by_channel.ones[0], out=levels[block])
        if dx is not None:
            level = np.vecdot(gamma[block], levels[block]) / rows.shape[1]
            along = np.vecdot(gamma[block], products[block]) / rows.shape[1]
            along -= mean * level
            along *= s * s * s
            h = np.multiply(x, by_row(along), out=spare[: len(x)])
            h += by_row(s * level - along * mean)
            d = dx[block].reshape(-1, pixels)
            np.multiply(g.reshape(d.shape), by_channel((gamma[block] * s[:, None]).reshape(-1)), out=d)
            d -= h.reshape(d.shape)
    products -= moments.mean[:, None] * levels
    products *= moments.scale[:, None]
    return products, levels


def _rows(images: Array) -> Array:
    return images.reshape(len(images), math.prod(images.shape[1:]))


def _blocks(images: Array) -> Iterator[slice]:
    step = _step(images)
    return (slice(start, start + step) for start in range(0, len(images) if images.size else 0, step))


def _step(images: Array) -> int:
    return max(1, _BLOCK // max(1, images[:1].size))
