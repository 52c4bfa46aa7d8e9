"""Max pooling whose windows lie side by side: no pixel is in two of them, so nothing is ever added up.

The pixels that one element of the kernel meets are copied together, a block of windows at a time, and compared in long
runs of memory; see `distprop.functional.phases` for why. `distprop.functional.maxima` has any other window.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distprop.functional.windows import Window, blocks, copy_pixels
from distprop.tape import Array

BLOCK_BYTES = 1 << 19  # of pixels: for a second-level cache of 2 MiB
_AS_INTEGERS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def suits(images: Array, window: Window) -> bool:
    """Whether the windows over these images lie side by side, without a border, and numbers have 8 bytes at most."""
    inside = window.reach[0] <= images.shape[1] and window.reach[1] <= images.shape[2]
    if not inside or images.itemsize not in _AS_INTEGERS:
        return False
    return window.kernel == window.stride and window.padding == (0, 0) and window.dilation == (1, 1)


def forward(images: Array, window: Window, remember: bool) -> tuple[Array, Array]:
    """As `maxima.forward`."""
    n, _, _, channels = images.shape
    count = window.kernel[0] * window.kernel[1]
    value = np.empty((n, *window.output, channels), images.dtype)
    winner = np.empty((n if remember else 0, *window.output, channels), np.min_scalar_type(count - 1))
    memory: Array | None = None
    for some, rows, elements in _blocks(images, window):
        best = value[some, rows]
        if memory is None:
            memory = np.empty((2, *best.shape), images.dtype)
            mask = np.empty(best.shape, bool)
        met, larger = memory[:, : len(best), : best.shape[1]], mask[: len(best), : best.shape[1]]
        copy_pixels(elements[0], best if count == 1 else met[0])
        if remember:
            winner[some, rows] = 0
        for number, element in enumerate(elements[1:], 1):
            copy_pixels(element, met[1])
            if remember:
                np.greater(met[1], met[0], out=larger)
                won = winner[some, rows]
                np.maximum(won, np.multiply(larger, won.dtype.type(number)), out=won)
            np.maximum(met[0], met[1], out=best if number == count - 1 else met[0])
    return value, winner


def backward(grad: Array, winner: Array, shape: tuple[int, ...], window: Window) -> Array:
    """As `maxima.backward`."""
    dx = np.empty(shape, grad.dtype)
    dx[:, window.reach[0] :] = 0
    dx[:, :, window.reach[1] :] = 0
    integers = _AS_INTEGERS[grad.itemsize]  # a number times 0 must be 0, be it infinite
    memory: Array | None = None
    for some, rows, elements in _blocks(dx, window):
        bits, won = grad[some, rows].view(integers), winner[some, rows]
        if memory is None:
            memory, mask = np.empty(won.shape, integers), np.empty(won.shape, bool)
        sent, here = memory[: len(won), : won.shape[1]], mask[: len(won), : won.shape[1]]
        for number, element in enumerate(elements):
            np.equal(won, number, out=here)
            np.multiply(bits, here, out=sent)
            copy_pixels(sent.view(grad.dtype), element)
    return dx


def _blocks(images: Array, window: Window) -> Iterator[tuple[slice, slice, list[Array]]]:
    """(images, rows of windows, for each element of the kernel a view of the pixels that it meets) of each block."""
    (kh, kw), width = window.kernel, window.reach[1]
    positions = max(1, BLOCK_BYTES // (kh * kw * images.shape[3] * images.itemsize))
    for some, rows in blocks(len(images), window.output, positions):
        pixels = images[some, rows.start * kh : rows.stop * kh, :width]
        yield some, rows, [pixels[:, i::kh, j::kw] for i in range(kh) for j in range(kw)]
