"""Max pooling with windows of any kind: which pixel of each is the largest, and its gradient's way back to it.

Windows are gathered nowhere: what an element of the kernel meets in a block of windows is one run of memory. Windows
that lie side by side have a faster way, in `distprop.functional.tiles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distprop.functional.phases import layouts, phases
from distprop.functional.windows import Window, blocks
from distprop.tape import Array

BLOCK_BYTES = 1 << 19  # of pixels: for a second-level cache of 2 MiB


def forward(images: Array, window: Window, remember: bool) -> tuple[Array, Array]:
    """The largest pixel of each window, and the number of the kernel's element that met it, counted row by row.

    Shapes: images `(batch, height, width, channels)`, both results `(batch, rows, columns, channels)`; the numbers are
    an array without a batch unless they are to be remembered. The largest of each row comes first, then that of these:
    so the first winner, row by row, is found for fewer comparisons.
    """
    n, _, _, channels = images.shape
    (kh, kw), (sh, sw) = window.kernel, window.stride
    value = np.empty((n, *window.output, channels), images.dtype)
    winner = np.empty((n if remember else 0, *window.output, channels), np.min_scalar_type(kh * kw - 1))
    for where, seen, layout in layouts(images.shape, window, _positions(images, (3 + sh * sw) / 2)):
        found = phases(images[where[0], seen], layout, -np.inf)
        width = layout.size - layout.columns[-1][1]  # as many numbers as all elements of a row meet
        length = width - layout.rows[-1][1]
        column, number = layout.first_elements  # the border does not win, not even from −∞
        best = layout.flat("all", images.dtype, length)
        if (kw - 1) * min(kh, sh) + kh >= kh * kw:  # rows first would take no fewer comparisons
            met = [found[a, b][down + shift :][:length] for a, down in layout.rows for b, shift in layout.columns]
            best, won = _first_largest(met, range(kh * kw) if remember else None, number[:length], best)
        else:
            in_row, columns = {}, {}
            for a in dict(layout.rows):
                met = [found[a, b][shift : shift + width] for b, shift in layout.columns]
                memory = layout.flat(a, images.dtype, width)
                in_row[a], columns[a] = _first_largest(met, range(kw) if remember else None, column[:width], memory)
            met = [in_row[a][shift:][:length] for a, shift in layout.rows]
            first, numbers = number[:length], None
            if remember:
                numbers = [columns[a][shift:][:length] for a, shift in layout.rows]
                numbers = [np.add(j, i * kw, dtype=j.dtype) for i, j in enumerate(numbers)]
                first = np.maximum(first, numbers[0])
            best, won = _first_largest(met, numbers, first, best)
        value[where] = layout.outputs(best)
        if remember:
            winner[where] = layout.outputs(won)
    return value, winner


def _first_largest(
    met: Sequence[Array], numbers: Sequence[Any] | None, first: Array, out: Array
) -> tuple[Array, Array]:
    """(the largest of some arrays, the number of the first that has it); without numbers, which increase, only that.

    `first` has the number of array 0; where array 0 is border, that of the first array that is not border.
    """
    best, won = met[0], first
    for place in range(1, len(met)):
        if numbers is not None:
            larger = np.greater(met[place], best).view(np.uint8)
            won = np.maximum(won, np.multiply(larger, numbers[place], dtype=won.dtype))
        best = np.maximum(best, met[place], out=out)
    return best, won


def backward(grad: Array, winner: Array, shape: tuple[int, ...], window: Window) -> Array:
    """dx, of the `shape` of the images: each g is added to the pixel that won, in the order of the outputs.

    `grad` and `winner` are `(batch, rows, columns, channels)`, the latter as `forward` gives it.
    """
    n, _, width, channels = shape
    (kh, kw), (sh, sw), (dh, dw) = window.kernel, window.stride, window.dilation
    steps = np.add.outer(np.arange(kh) * dh * width, np.arange(kw) * dw).reshape(-1) * channels
    blind = np.logical_or.outer(*(_blind(window, axis, shape[axis + 1]) for axis in (0, 1)))
    some_blind = blind.any()
    if some_blind:
        grad = np.where(blind[:, :, None], 0, grad)
    dx = np.empty(shape, grad.dtype)
    first: Array | None = None
    for some, rows in blocks(n, window.output, _positions(dx, sh * sw)):
        block = (some.stop - some.start, rows.stop - rows.start, window.output[1], channels)
        if first is None or first.shape != block:
            first = _first_pixels(block, shape, window)
        if rows.start == 0:
            dx[some] = 0
        pixel = (steps + rows.start * sh * width * channels).take(winner[some, rows], mode="clip")
        pixel += first
        if some_blind:
            pixel[:, blind[rows]] = 0
        np.add.at(dx[some].reshape(-1), pixel.reshape(-1), grad[some, rows].reshape(-1))
    return dx


def _first_pixels(block: tuple[int, ...], shape: tuple[int, ...], window: Window) -> Array:
    """Where in the memory of a block's images the element 0 of each window is, or would be were there no border."""
    images, rows, columns, channels = map(np.arange, block)
    rows = rows * window.stride[0] - window.padding[0]
    columns = columns * window.stride[1] - window.padding[1]
    _, height, width, count = shape
    rows = images[:, None] * height + rows
    return ((rows[:, :, None] * width + columns) * count)[:, :, :, None] + channels


def _blind(window: Window, axis: int, length: int) -> Array:
    """Which windows see none of the rows (`axis` 0) or columns; with a dilation they can straddle a small image."""
    first = np.arange(window.output[axis]) * window.stride[axis] - window.padding[axis]
    pixels = np.add.outer(first, np.arange(window.kernel[axis]) * window.dilation[axis])
    outside: Array = (pixels < 0) | (pixels >= length)
    return np.logical_and.reduce(outside, axis=1)


def _positions(images: Array, pixels: float) -> int:
    """How many windows a block has if each needs so many pixels."""
    return max(1, int(BLOCK_BYTES / (images.shape[3] * images.itemsize * pixels)))
