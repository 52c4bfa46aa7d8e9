"""Transposed convolutions, where they can be had for less than the adjoints of `distprop.functional.correlate`.

A stride s that divides the kernel cuts the result into tiles of s by s pixels, and all pixels of a tile see the same
pixels of x, each through elements of the kernel of its own. So all of them come from one correlation without stride,
with a kernel s times smaller and s² times as many outputs: nothing overlaps, and each pixel is written once.
"""

from __future__ import annotations

import numpy as np

from distprop.functional.phases import layouts
from distprop.functional.windows import Pair, Window, patches
from distprop.tape import Array

BLOCK_BYTES = 2 << 20  # of windows: each product packs the kernel anew


def has_tiles(window: Window) -> bool:
    """Whether `tiled_input_gradient` can do it: the stride, of more than one pixel, divides the kernel."""
    (kh, kw), (sh, sw) = window.kernel, window.stride
    return window.stride != (1, 1) and window.dilation == (1, 1) and kh % sh == 0 and kw % sw == 0


def tiled_input_gradient(grad: Array, weight: Array, window: Window, size: Pair) -> Array:
    """`correlate.input_gradient`: the tile (u, v) of dx is Σ_j g[u − j] w[j·stride + …] for j < kernel/stride."""
    (kh, kw), (sh, sw), (top, left) = window.kernel, window.stride, window.padding
    down, across = kh // sh, kw // sw
    outputs, channels = weight.shape[:2]
    first = top // sh, left // sw  # the tile of the first pixel; tiles are counted from the first of the padding
    last = (top + size[0] - 1) // sh, (left + size[1] - 1) // sw
    count = last[0] - first[0] + 1, last[1] - first[1] + 1
    correlated = Window((down, across), (1, 1), (1, 1), (down - 1 - first[0], across - 1 - first[1]), count)
    tiles = Window(window.stride, window.stride, (1, 1), (top % sh, left % sw), count)
    kernel = weight.reshape(outputs, channels, down, sh, across, sw)[:, :, ::-1, :, ::-1]
    matrix = kernel.transpose(2, 4, 0, 3, 5, 1).reshape(down * across * outputs, sh * sw * channels)
    dx = np.empty((len(grad), *size, channels), grad.dtype)
    positions = max(1, BLOCK_BYTES // (len(matrix) * grad.itemsize))
    blocks = zip(patches(grad, correlated, positions), layouts(dx.shape, tiles, positions), strict=True)
    for (_, windows), ((some, _), seen, layout) in blocks:
        product = (windows @ matrix).reshape(*layout.shape[:3], sh, sw, channels)
        for phase, (pixels, inside) in layout.places.items():
            dx[some, seen][:, *pixels] = product[:, *inside, *phase]
    return dx


def gradients(images: Array, grad: Array, weight: Array, window: Window, positions: int = 0) -> tuple[Array, Array]:
    """(dx, dw) of a transposed convolution, `correlate` of g and `weight_gradient`: the windows of g serve both.

    There are so many `positions` in a block, or as many as `BLOCK_BYTES` hold.
    """
    inputs, outputs = weight.shape[:2]
    dx = np.empty_like(images)
    matrix = weight.transpose(2, 3, 1, 0).reshape(-1, inputs)
    total = np.zeros((inputs, len(matrix)), images.dtype)
    product = np.empty_like(total)
    for where, windows in patches(grad, window, positions or max(1, BLOCK_BYTES // (len(matrix) * grad.itemsize))):
        np.matmul(windows, matrix, out=dx[where].reshape(-1, inputs))
        total += np.matmul(images[where].reshape(-1, inputs).T, windows, out=product)
    return dx, total.reshape(inputs, *window.kernel, outputs).transpose(0, 3, 1, 2)
