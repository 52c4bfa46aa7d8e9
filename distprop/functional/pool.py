"""Pooling: the largest or the mean of the pixels in each window. Memory is channels-last, as in `conv`.

Windows are gathered nowhere: what an element of the kernel meets in a block of windows is one array or view, and the
result is a maximum or a sum over these, in blocks that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distprop.functional import maxima, tiles
from distprop.functional.check import floating
from distprop.functional.geometry import Size, pair, pooling_window
from distprop.functional.short_buffers import short_buffers
from distprop.functional.sliding import Axis, spread, sums
from distprop.functional.windows import Pair, Window, blocks, channels_last, channels_second
from distprop.tape import Array, Out, gradients_needed
from distprop.tensor import Operand, Tensor, as_tensor, record

BLOCK_BYTES = 1 << 19  # of pixels: for a second-level cache of 2 MiB


def max_pool2d(
    input: Operand,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """y[n, c, q] = max over k of x[n, c, q·stride − padding + k·dilation]; the padding never wins.

    Shapes: x `(batch, channels, height, width)`, y `(batch, channels, rows, columns)`, where
    rows = (height + 2·padding − dilation·(kernel − 1) − 1) // stride + 1; `ceil_mode` rounds up instead. The stride is
    the kernel's size unless given.
    Derivative: g[q] goes to the pixel that won; among equal ones to the first, row by row, as in PyTorch.

    Raises:
        ValueError: a kernel larger than the padded image, padding of more than half of it, or x of other than 4 axes.
        TypeError: x is not floating point.
    """
    x = _images("max_pool2d", input)
    window = pooling_window("max_pool2d", x.shape, kernel_size, stride, padding, dilation, ceil_mode)
    images = channels_last(x.data)
    shape = images.shape
    way = tiles if tiles.suits(images, window) else maxima
    value, winner = way.forward(images, window, gradients_needed((x,)))

    def vjp(grad: Array, out: Out) -> list[Array]:
        return [channels_second(way.backward(channels_last(grad), winner, shape, window))]

    return record(channels_second(value), (x,), vjp)


def avg_pool2d(
    input: Operand,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """y[n, c, q] = 1/m Σ_k x[n, c, q·stride − padding + k]; shapes as in `max_pool2d`.

    m is `divisor_override`, or else the number of pixels in the window, those of the padding included unless
    `count_include_pad` is False. Derivative: g[q]/m to each pixel of the window.

    Raises:
        ValueError: a kernel larger than the padded image, padding of more than half of it, x of other than 4 axes, or a
            divisor of 0.
        TypeError: x is not floating point.
    """
    x = _images("avg_pool2d", input)
    window = pooling_window("avg_pool2d", x.shape, kernel_size, stride, padding, 1, ceil_mode)
    if divisor_override == 0:
        raise ValueError("avg_pool2d: divisor_override must not be 0")
    images = channels_last(x.data)
    n, height, width, channels = shape = images.shape
    columns = window.output[1]
    down, across = Axis.of(window, 0, height), Axis.of(window, 1, width)
    shares = _shares(window, (height, width), count_include_pad, divisor_override).astype(x.dtype)
    # a row is multiplied by one number or by as many as it has: twice as fast as pixel by pixel
    shares = shares[:, :1] if (shares == shares[:, :1]).all() else np.repeat(shares, channels, axis=1)
    value = np.empty((n, *window.output, channels), x.dtype)
    with short_buffers():
        for some, rows in blocks(n, window.output, _positions(images, window.stride[0] * window.stride[1])):
            own, seen = down.seen_by(rows)
            strips = np.empty((some.stop - some.start, own.outputs, width, channels), x.dtype)
            sums(_rows(images[some, seen]), own, _rows(strips))
            sums(_columns(strips), across, _columns(value[some, rows]))
            averages = _rows(value[some, rows])
            averages *= shares[rows]

    def vjp(grad: Array, out: Out) -> list[Array]:
        g = channels_last(grad)
        dx = np.empty(shape, g.dtype)
        with short_buffers():
            for some, rows in blocks(n, (height, width), _positions(dx, 1)):  # of pixels
                own, seeing = down.seeing(rows)
                strips = np.empty((some.stop - some.start, own.outputs, width, channels), g.dtype)
                parts = (_rows(g[some, seeing]) * shares[seeing]).reshape(-1, columns, channels)
                spread(parts, across, _columns(strips))
                spread(_rows(strips), own, _rows(dx[some, rows]))
        return [channels_second(dx)]

    return record(channels_second(value), (x,), vjp)


def adaptive_avg_pool2d(input: Operand, output_size: int | Sequence[int | None]) -> Tensor:
    """The mean over `output_size` windows that cover the image: row r is the rows ⌊r·h/rows⌋ … ⌈(r + 1)·h/rows⌉ − 1.

    Shapes: x `(batch, channels, height, width)`, y `(batch, channels, *output_size)`; None keeps a length.
    As a product, Y = A X Bᵀ for each channel, A and B being the means over rows and columns: dX = Aᵀ g B.
    So a number that is not finite reaches all outputs of its image and channel, and not those of its windows alone.

    Raises:
        ValueError: an output size below 1, or x of other than 4 axes.
        TypeError: x is not floating point.
    """
    x = _images("adaptive_avg_pool2d", input)
    n, channels, height, width = x.shape
    rows, columns = pair("adaptive_avg_pool2d", "output_size", output_size, 1, in_place_of_none=(height, width))
    if rows == columns == 1:
        return _mean_of_all(x)
    down, across = _means(height, rows, x.dtype), _means(width, columns, x.dtype)
    strips = down @ channels_last(x.data).reshape(n, height, width * channels)
    value = across @ strips.reshape(n * rows, width, channels)

    def vjp(grad: Array, out: Out) -> list[Array]:
        strips = across.T @ channels_last(grad).reshape(n * rows, columns, channels)
        dx = down.T @ strips.reshape(n, rows, width * channels)
        return [channels_second(dx.reshape(n, height, width, channels))]

    return record(channels_second(value.reshape(n, rows, columns, channels)), (x,), vjp)


def _mean_of_all(x: Tensor) -> Tensor:
    """The mean of each channel of each image, `(batch, channels, 1, 1)`; every pixel gets the same gradient."""
    n, channels, height, width = x.shape
    share = np.full((1, height * width), 1 / (height * width), x.dtype)
    value = share @ channels_last(x.data).reshape(n, height * width, channels)

    def vjp(grad: Array, out: Out) -> list[Array]:
        return [np.broadcast_to(grad * share[0, 0], (n, channels, height, width))]

    return record(channels_second(value[:, :, None]), (x,), vjp)


def _shares(window: Window, size: Pair, count_include_pad: bool, divisor: int | None) -> Array:
    """1/m for each position of the window, `(rows, columns)`; a window's pixels are rows times columns."""
    if divisor is not None:
        return np.full(window.output, 1 / divisor)
    counts = []
    for axis in (0, 1):
        padding = window.padding[axis]
        first = np.arange(window.output[axis]) * window.stride[axis] - padding
        last = np.minimum(first + window.kernel[axis], size[axis] + (padding if count_include_pad else 0))
        counts.append(last - (first if count_include_pad else np.maximum(first, 0)))
    return 1 / np.multiply.outer(*counts)


def _means(length: int, parts: int, dtype: np.dtype[Any]) -> Array:
    """The matrix `(parts, length)` that takes means over the parts."""
    places = np.arange(length)
    first = np.arange(parts)[:, None] * length // parts
    last = -(-(np.arange(parts)[:, None] + 1) * length // parts)
    inside = (first <= places) & (places < last)
    return (inside / (last - first)).astype(dtype)


def _images(operation: str, input: Operand) -> Tensor:
    x = as_tensor(input)
    floating(operation, x)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"{operation} got x of shape {x.shape}; it must be (batch, channels, height, width), none but batch 0"
        )
    return x


def _rows(images: Array) -> Array:
    """(images, height, width · channels)"""
    n, height, width, channels = images.shape
    return images.reshape(n, height, width * channels)


def _columns(images: Array) -> Array:
    """(images · rows, width, channels)"""
    n, height, width, channels = images.shape
    return images.reshape(n * height, width, channels)


def _positions(images: Array, pixels: int) -> int:
    """How many windows a block has if each needs so many pixels."""
    return max(1, BLOCK_BYTES // (images.shape[3] * images.itemsize * pixels))
