"""The three products behind every convolution, on contiguous `(batch, height, width, channels)` arrays.

What is called convolution is a correlation, y[q, o] = Σ_k Σ_c x[q·stride − padding + k·dilation, c] w[o, c, k]. It is
linear in x and in w, so its derivatives are products of the same kind: `correlate` computes y, `weight_gradient` and
`input_gradient` are its adjoints. A transposed convolution is `input_gradient` as the value and `correlate` as the
derivative. Each is one matrix product for each block of windows (see `distprop.functional.windows`).

A faster way for some window, such as Winograd's for 3×3, is a file of its own with the same three products.
"""

from __future__ import annotations

import numpy as np

from distprop.functional.windows import Pair, Patches, Window, blocks, gather, scatter
from distprop.tape import Array


def correlate(images: Array, weight: Array, bias: Array | None, window: Window) -> Array:
    """y: `images` `(n, h, w, c)`, `weight` `(o, c, kh, kw)`, `bias` `(o,)` to `(n, *window.output, o)`."""
    value = np.empty((len(images), *window.output, len(weight)), images.dtype)
    matrix = _kernel_rows(weight).T
    patches = Patches()
    for where, part, block in gather(images, window, _bytes_per_window(images, window)):
        target = value[where].reshape(-1, len(weight))
        np.matmul(patches.of(block, part), matrix, out=target)
        if bias is not None:
            target += bias
    return value


def weight_gradient(images: Array, grad: Array, window: Window) -> Array:
    """dw[o, c, k] = Σ_q g[q, o] x[q·stride − padding + k·dilation, c], a view `(o, c, kh, kw)`."""
    outputs, channels = grad.shape[3], images.shape[3]
    total = np.zeros((outputs, window.kernel[0] * window.kernel[1] * channels), images.dtype)
    product = np.empty_like(total)
    patches = Patches()
    for where, part, block in gather(images, window, _bytes_per_window(images, window)):
        np.matmul(grad[where].reshape(-1, outputs).T, patches.of(block, part), out=product)
        total += product
    return total.reshape(outputs, *window.kernel, channels).transpose(0, 3, 1, 2)


def input_gradient(grad: Array, weight: Array, window: Window, size: Pair, bias: Array | None = None) -> Array:
    """dx[p, c] = Σ_k Σ_o g[q, o] w[o, c, k] over all q, k with q·stride − padding + k·dilation = p, `(n, *size, c)`.

    `bias` `(c,)`, if there is one, is added; a transposed convolution has one.
    """
    if window.stride == (1, 1):
        return correlate(grad, _reversed(weight), bias, _reversed_window(window, size))
    channels = weight.shape[1]
    dx = np.zeros((len(grad), *size, channels), grad.dtype)
    matrix = _kernel_rows(weight)
    memory = np.empty(0, grad.dtype)
    for where, part, block in scatter(dx, window, _bytes_per_window(dx, window)):
        rows = grad[where].reshape(-1, len(weight))
        needed = len(rows) * matrix.shape[1]
        memory = memory if memory.size >= needed else np.empty(needed, grad.dtype)
        windows = np.matmul(rows, matrix, out=memory[:needed].reshape(len(rows), -1))
        windows = windows.reshape(-1, *part.output, *window.kernel, channels)
        for i, j, (down, across) in part.shifts():
            block[:, down, across] += windows[:, :, :, i, j]
    if bias is not None:
        dx += bias
    return dx


def gradients(images: Array, grad: Array, weight: Array, window: Window) -> tuple[Array, Array]:
    """(`input_gradient`, `weight_gradient`). At stride 1 one matrix of the windows of g serves both:

    dw[o, c, k] = Σ_p x[p, c] g[p + padding − k·dilation, o], and the same windows of g times w are dx.
    """
    if window.stride != (1, 1):
        return input_gradient(grad, weight, window, _size(images)), weight_gradient(images, grad, window)
    outputs, channels = weight.shape[:2]
    backwards = _reversed_window(window, _size(images))
    dx = np.empty_like(images)
    matrix = _reversed(weight).transpose(2, 3, 1, 0).reshape(-1, channels)
    total = np.zeros((channels, len(matrix)), images.dtype)
    product = np.empty_like(total)
    patches = Patches()
    for where, part, block in gather(grad, backwards, _bytes_per_window(grad, window)):
        windows = patches.of(block, part)
        np.matmul(windows, matrix, out=dx[where].reshape(-1, channels))
        np.matmul(images[where].reshape(-1, channels).T, windows, out=product)
        total += product
    dw = total.reshape(channels, *window.kernel, outputs)[:, ::-1, ::-1].transpose(3, 0, 1, 2)
    return dx, dw


def bias_gradient(grad: Array, out: Array | None = None) -> Array:
    """db[o] = Σ_q g[q, o]."""
    rows = grad.reshape(-1, grad.shape[3])
    return np.matmul(np.ones(len(rows), grad.dtype), rows, out=out)


def _kernel_rows(weight: Array) -> Array:
    """`(o, c, kh, kw)` as a matrix with the columns of `Patches`: `(o, kh·kw·c)`."""
    return weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)


def _reversed(weight: Array) -> Array:
    """The kernel of the derivative at stride 1: turned by 180°, inputs and outputs exchanged; a view."""
    return weight[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)


def _reversed_window(window: Window, size: Pair) -> Window:
    """At stride 1, the windows of g that an image of `size` sees."""
    extent, padding = window.extent, window.padding
    return Window(
        window.kernel, (1, 1), window.dilation, (extent[0] - 1 - padding[0], extent[1] - 1 - padding[1]), size
    )


def _size(images: Array) -> Pair:
    return images.shape[1], images.shape[2]


def _bytes_per_window(images: Array, window: Window) -> int:
    return window.kernel[0] * window.kernel[1] * images.shape[3] * images.itemsize
