"""The three products behind every convolution, on contiguous `(batch, height, width, channels)` arrays.

What is called convolution is a correlation, y[q, o] = Σ_k Σ_c x[q·stride − padding + k·dilation, c] w[o, c, k]. It is
linear in x and in w, so its derivatives are products of the same kind: `correlate` computes y, `weight_gradient` and
`input_gradient` are its adjoints. A transposed convolution is `input_gradient` as the value and `correlate` as the
derivative. Each is one matrix product for each block of windows (see `distprop.functional.windows`).

A faster way for some windows is a file of its own with the same products.
"""

from __future__ import annotations

import numpy as np

from distprop.functional.transposed import gradients as adjoint_gradients
from distprop.functional.transposed import has_tiles, tiled_input_gradient
from distprop.functional.windows import Pair, Window, patches, scatter
from distprop.tape import Array

BLOCK_BYTES = 2 << 20  # of windows: each product packs the kernel anew, so smaller blocks cost more than cache misses
SMALL_PRODUCT = 1_000_000  # multiplications up to which OpenBLAS packs nothing: twice as fast for a few channels


def correlate(images: Array, weight: Array, bias: Array | None, window: Window) -> Array:
    """y: `images` `(n, h, w, c)`, `weight` `(o, c, kh, kw)`, `bias` `(o,)` to `(n, *window.output, o)`."""
    outputs = len(weight)
    value = np.empty((len(images), *window.output, outputs), images.dtype)
    matrix = weight.transpose(0, 2, 3, 1).reshape(outputs, -1).T
    if matrix.size < 4096:
        matrix = np.ascontiguousarray(matrix)  # pays for small products only
    row = None if bias is None else np.tile(bias, window.output[1])  # longer runs: a third of the time
    for where, windows in patches(images, window, _positions(images, window, outputs)):
        target = value[where].reshape(-1, outputs)
        np.matmul(windows, matrix, out=target)
        if row is not None:
            target = target.reshape(-1, window.output[1] * outputs)
            target += row
    return value


def weight_gradient(images: Array, grad: Array, window: Window) -> Array:
    """dw[o, c, k] = Σ_q g[q, o] x[q·stride − padding + k·dilation, c], a view `(o, c, kh, kw)`."""
    outputs, channels = grad.shape[3], images.shape[3]
    total = np.zeros((outputs, window.kernel[0] * window.kernel[1] * channels), images.dtype)
    product = np.empty_like(total)
    for where, windows in patches(images, window, _positions(images, window, outputs)):
        total += np.matmul(grad[where].reshape(-1, outputs).T, windows, out=product)
    return total.reshape(outputs, *window.kernel, channels).transpose(0, 3, 1, 2)


def input_gradient(grad: Array, weight: Array, window: Window, size: Pair) -> Array:
    """dx[p, c] = Σ_k Σ_o g[q, o] w[o, c, k] over all q, k with q·stride − padding + k·dilation = p, `(n, *size, c)`.

    A stride that divides the kernel makes tiles of it (see `distprop.functional.transposed`). Else, with a stride, or
    where windows of g would be mostly border, each block of g is multiplied with the kernel and the
    windows that come out are added up where they overlap; else it is a correlation of g with the kernel turned round.
    """
    if has_tiles(window):
        return tiled_input_gradient(grad, weight, window, size)
    if is_correlation(window, size):
        return correlate(grad, weight[:, :, ::-1, ::-1].transpose(1, 0, 2, 3), None, window.turned_round(size))
    outputs, channels = weight.shape[:2]
    dx = np.zeros((len(grad), *size, channels), grad.dtype)
    matrix = weight.transpose(0, 2, 3, 1).reshape(outputs, -1)
    memory: Array | None = None
    for block in scatter(dx, window, _positions(dx, window, outputs)):
        rows = grad[block.where].reshape(-1, outputs)
        if memory is None:
            memory = np.empty((len(rows), matrix.shape[1]), grad.dtype)
        windows = np.matmul(rows, matrix, out=memory[: len(rows)])
        windows = windows.reshape(-1, *block.window.output, *window.kernel, channels)
        for i, j, (down, across) in block.window.shifts():
            block.pixels[:, down, across] += windows[:, :, :, i, j]
    return dx


def gradients(images: Array, grad: Array, weight: Array, window: Window) -> tuple[Array, Array]:
    """(`input_gradient`, `weight_gradient`). Where dx is a correlation, its windows of g serve both:

    dw[o, c, k] = Σ_p x[p, c] g[p + padding − k·dilation, o].
    """
    size = (images.shape[1], images.shape[2])
    if not is_correlation(window, size):
        return input_gradient(grad, weight, window, size), weight_gradient(images, grad, window)
    turned = weight[:, :, ::-1, ::-1].swapaxes(0, 1)
    positions = _positions(grad, window, images.shape[3])
    dx, dw = adjoint_gradients(images, grad, turned, window.turned_round(size), positions)
    return dx, dw[:, :, ::-1, ::-1].swapaxes(0, 1)


def is_correlation(window: Window, size: Pair) -> bool:
    """Whether dx is best computed as a correlation: no stride, and g is not much smaller than x."""
    return window.stride == (1, 1) and 4 * window.output[0] * window.output[1] >= 3 * size[0] * size[1]


def _positions(images: Array, window: Window, others: int) -> int:
    """How many windows of `images` a block has, for a product with a matrix of that many rows or columns."""
    length = window.kernel[0] * window.kernel[1] * images.shape[3]
    small = SMALL_PRODUCT // max(1, length * others)
    return small if small >= 1500 else max(1, BLOCK_BYTES // (length * images.itemsize))
