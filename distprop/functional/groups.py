"""The products of `distprop.functional.correlate` for convolutions in groups of channels.

Group i of the input channels meets group i of the kernels alone, `weight` `(o, c/groups, kh, kw)`. Each group is a
convolution of its own; where a group is one input channel (depthwise), the products would be of one column, and the
kernel's elements are multiplied and added over whole rows of pixels instead.
"""

from __future__ import annotations

import numpy as np

from distprop.functional import correlate as single
from distprop.functional.windows import Pair, Window, gather, scatter
from distprop.tape import Array

BLOCK_BYTES = 1 << 18  # of outputs: a few arrays of this size stay in a second-level cache


def correlate(images: Array, weight: Array, bias: Array | None, window: Window, groups: int) -> Array:
    """See `correlate.correlate`."""
    if groups == 1:
        return single.correlate(images, weight, bias, window)
    if weight.shape[1] == 1:
        value = _depthwise(images, weight, window)
    else:
        parts = zip(_channels(images, groups), np.split(weight, groups), strict=True)
        value = np.concatenate([single.correlate(x, w, None, window) for x, w in parts], axis=3)
    if bias is not None:
        value += bias
    return value


def input_gradient(grad: Array, weight: Array, window: Window, size: Pair, groups: int) -> Array:
    """See `correlate.input_gradient`."""
    if groups == 1:
        return single.input_gradient(grad, weight, window, size)
    if weight.shape[1] == 1:
        return _depthwise_input_gradient(grad, weight, window, size, groups)
    parts = zip(_channels(grad, groups), np.split(weight, groups), strict=True)
    return np.concatenate([single.input_gradient(g, w, window, size) for g, w in parts], axis=3)


def weight_gradient(images: Array, grad: Array, window: Window, groups: int) -> Array:
    """See `correlate.weight_gradient`."""
    if groups == 1:
        return single.weight_gradient(images, grad, window)
    if images.shape[3] == groups:
        return _depthwise_weight_gradient(images, grad, window)
    parts = zip(_channels(images, groups), _channels(grad, groups), strict=True)
    return np.concatenate([single.weight_gradient(x, g, window) for x, g in parts])


def gradients(images: Array, grad: Array, weight: Array, window: Window, groups: int) -> tuple[Array, Array]:
    """See `correlate.gradients`."""
    if groups == 1:
        return single.gradients(images, grad, weight, window)
    size = (images.shape[1], images.shape[2])
    return input_gradient(grad, weight, window, size, groups), weight_gradient(images, grad, window, groups)


def _channels(images: Array, groups: int) -> list[Array]:
    return [np.ascontiguousarray(part) for part in np.split(images, groups, axis=3)]


def _depthwise(images: Array, weight: Array, window: Window) -> Array:
    """y[q, o] = Σ_k x[q·stride − padding + k·dilation, o // m] w[o, k], m being the outputs of one channel."""
    images = _once_for_each_kernel(images, weight)
    kernel = _along_rows(weight, window)
    value = np.zeros((len(images), *window.output, len(weight)), images.dtype)
    for block in gather(images, window, _positions(images)):
        target = value[block.where]
        product = np.empty_like(target)
        for i, j, (down, across) in block.window.shifts():
            target += np.multiply(block.pixels[:, down, across], kernel[i, j], out=product)
    return value


def _depthwise_input_gradient(grad: Array, weight: Array, window: Window, size: Pair, groups: int) -> Array:
    """dx[p, c] = Σ_k Σ_o g[q, o] w[o, k] over all q, k with q·stride − padding + k·dilation = p, and o // m = c."""
    kernel = _along_rows(weight, window)
    dx = np.zeros((len(grad), *size, len(weight)), grad.dtype)
    for block in scatter(dx, window, _positions(grad)):
        g = grad[block.where]
        product = np.empty_like(g)
        for i, j, (down, across) in block.window.shifts():
            block.pixels[:, down, across] += np.multiply(g, kernel[i, j], out=product)
    several = len(weight) // groups
    return dx if several == 1 else dx.reshape(*dx.shape[:3], groups, several).sum(axis=4)


def _depthwise_weight_gradient(images: Array, grad: Array, window: Window) -> Array:
    """dw[o, k] = Σ_q g[q, o] x[q·stride − padding + k·dilation, o // m]."""
    images = _once_for_each_kernel(images, grad.T)
    dw = np.zeros((*window.kernel, grad.shape[3]), grad.dtype)
    for block in gather(images, window, _positions(images)):
        g = grad[block.where]
        product = np.empty_like(g)
        ones = np.ones(g[..., 0].size, g.dtype)
        for i, j, (down, across) in block.window.shifts():
            np.multiply(block.pixels[:, down, across], g, out=product)
            dw[i, j] += ones @ product.reshape(len(ones), -1)
    return dw.transpose(2, 0, 1)[:, None]


def _once_for_each_kernel(images: Array, kernels: Array) -> Array:
    """The channels, each repeated for all of its outputs, so that channel o belongs to output o."""
    several = len(kernels) // images.shape[3]
    return images if several == 1 else np.repeat(images, several, axis=3)


def _along_rows(kernel: Array, window: Window) -> Array:
    """`(o, 1, kh, kw)` as `(kh, kw, columns, o)`: repeated, so that a row of pixels is one run of numbers."""
    return np.repeat(kernel.transpose(2, 3, 1, 0), window.output[1], axis=2)


def _positions(images: Array) -> int:
    return max(1, BLOCK_BYTES // (images.shape[3] * images.itemsize))
