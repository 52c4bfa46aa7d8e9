"""Pooling: the largest or the mean of the pixels in each window. Memory is channels-last, as in `conv`.

Nothing is gathered: for each element of the kernel the pixels that it meets are one strided view of the image, and the
result is a maximum or a sum over as many views as the kernel has elements, in blocks that stay in the cache. Sums, and
maxima where it pays, are made along one axis, then along the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from distprop.functional.check import floating
from distprop.functional.geometry import Size, pair, pooling_window
from distprop.functional.windows import Block, Pair, Where, Window, channels_last, channels_second, gather, scatter
from distprop.tape import Array, Out, gradients_needed
from distprop.tensor import Operand, Tensor, as_tensor, record

BLOCK_BYTES = 1 << 18  # of outputs: measured on a second-level cache of 2 MiB; twice as much is 3 to 30 % slower

Share: TypeAlias = Callable[[Where, int, Array | None], Array]


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
    kernel = pair("max_pool2d", "kernel_size", kernel_size, 1)
    window = pooling_window("max_pool2d", x.shape, kernel, stride, padding, dilation, ceil_mode)
    images = channels_last(x.data)
    shape = images.shape
    (kh, kw), remember = kernel, gradients_needed((x,))
    passes = [window]
    if kw * window.stride[0] + kh < kh * kw:  # the largest of each row, then of these, has the same winner for less
        passes = [_along(1, window, shape[1]), _along(0, window, window.output[1])]
    value, winners = images, []
    for part in passes:
        value, winner = _largest(value, part, remember)
        winners.append(winner)

    def vjp(grad: Array, out: Out) -> list[Array]:
        g = channels_last(grad)
        sizes = [shape, *(winner.shape for winner in winners)]
        for number in reversed(range(len(passes))):
            g = _spread(sizes[number], g.dtype, passes[number], partial(_if_won, g, winners[number]))
        return [channels_second(g)]

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
    kernel = pair("avg_pool2d", "kernel_size", kernel_size, 1)
    window = pooling_window("avg_pool2d", x.shape, kernel, stride, padding, 1, ceil_mode)
    if divisor_override == 0:
        raise ValueError("avg_pool2d: divisor_override must not be 0")
    images = channels_last(x.data)
    shape = images.shape
    shares = _shares(window, (shape[1], shape[2]), count_include_pad, divisor_override).astype(x.dtype)
    if shares.min() == shares.max():
        shares = shares[0, 0]  # a multiplication by one number takes half the time
    down, across = _along(0, window, shape[2]), _along(1, window, window.output[0])
    strips = (shape[0], *down.output, shape[3])
    value = _sums(_sums(images, down), across)
    value *= shares

    def vjp(grad: Array, out: Out) -> list[Array]:
        g = channels_last(grad) * shares
        for part, size in ((across, strips), (down, shape)):
            g = _spread(size, g.dtype, part, partial(_whole, g))
        return [channels_second(g)]

    return record(channels_second(value), (x,), vjp)


def adaptive_avg_pool2d(input: Operand, output_size: int | Sequence[int | None]) -> Tensor:
    """The mean over `output_size` windows that cover the image: row r is the rows ⌊r·h/rows⌋ … ⌈(r + 1)·h/rows⌉ − 1.

    Shapes: x `(batch, channels, height, width)`, y `(batch, channels, *output_size)`; None keeps a length.
    As a product, Y = A X Bᵀ for each channel, A and B being the means over rows and columns: dX = Aᵀ g B.

    Raises:
        ValueError: an output size below 1, or x of other than 4 axes.
        TypeError: x is not floating point.
    """
    x = _images("adaptive_avg_pool2d", input)
    n, channels, height, width = x.shape
    if isinstance(output_size, Sequence) and len(output_size) == 2:
        output_size = [
            size if length is None else length for length, size in zip(output_size, x.shape[2:], strict=True)
        ]
    rows, columns = pair("adaptive_avg_pool2d", "output_size", output_size, 1)
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


def _along(axis: int, window: Window, others: int) -> Window:
    """The windows along one axis alone, `others` being how many rows or columns there are of the other."""
    pairs = (window.kernel, 1), (window.stride, 1), (window.dilation, 1), (window.padding, 0), (window.output, others)
    return Window(*((own[0], other) if axis == 0 else (other, own[1]) for own, other in pairs))


def _sums(images: Array, window: Window) -> Array:
    """The sum of the pixels of each window."""
    value = np.empty((len(images), *window.output, images.shape[3]), images.dtype)
    for block in gather(images, window, _positions(images)):
        total = value[block.where]
        for number, met in enumerate(_met(_phases(block), block.window)):
            if number == 0:
                total[...] = met
            else:
                total += met
    return value


def _whole(grad: Array, where: Where, number: int, out: Array | None) -> Array:
    """A `Share`: all of the gradient."""
    return grad[where] if out is None else np.positive(grad[where], out=out)


def _if_won(grad: Array, winner: Array, where: Where, number: int, out: Array | None) -> Array:
    """A `Share`: the gradient where this element of the kernel won; floats multiply faster with floats."""
    return np.multiply(grad[where], (winner[where] == number).view(np.uint8).astype(grad.dtype), out=out)


def _largest(images: Array, window: Window, remember: bool) -> tuple[Array, Array]:
    """(the largest pixel of each window, which of the kernel's elements met it), the latter only if asked for."""
    elements = window.kernel[0] * window.kernel[1]
    shape = (len(images), *window.output, images.shape[3])
    value = np.empty(shape, images.dtype)
    winner = np.zeros(shape if remember else (0, *shape[1:]), np.min_scalar_type(elements - 1))
    for block in gather(images, window, _positions(images), border=-np.inf):
        largest, won = value[block.where], winner[block.where]
        for number, met in enumerate(_met(_phases(block), block.window)):
            if number == 0:
                largest[...] = met
                continue
            if remember:
                larger = np.greater(met, largest).view(np.uint8)
                np.maximum(won, np.multiply(larger, number, dtype=won.dtype), out=won)
            np.maximum(largest, met, out=largest)
    return value, winner


def _shares(window: Window, size: Pair, count_include_pad: bool, divisor: int | None) -> Array:
    """1/m for each position of the window, `(rows, columns, 1)`; a window's pixels are rows times columns."""
    if divisor is not None:
        return np.full((*window.output, 1), 1 / divisor)
    counts = []
    for axis in (0, 1):
        padding = window.padding[axis]
        first = np.arange(window.output[axis]) * window.stride[axis] - padding
        last = np.minimum(first + window.kernel[axis], size[axis] + (padding if count_include_pad else 0))
        counts.append(last - (first if count_include_pad else np.maximum(first, 0)))
    return 1 / np.multiply.outer(*counts)[:, :, None]


def _means(length: int, parts: int, dtype: np.dtype[Any]) -> Array:
    """The matrix `(parts, length)` that takes means over the parts."""
    places = np.arange(length)
    first = np.arange(parts)[:, None] * length // parts
    last = -(-(np.arange(parts)[:, None] + 1) * length // parts)
    inside = (first <= places) & (places < last)
    return (inside / (last - first)).astype(dtype)


def _spread(shape: tuple[int, ...], dtype: np.dtype[Any], window: Window, share: Share) -> Array:
    """The adjoint: each element of the kernel adds `share(where, number, out=None)` to the pixels that it meets."""
    apart = all(extent <= stride for extent, stride in zip(window.extent, window.stride, strict=True))
    tiled = window.kernel == window.extent == window.stride and window.padding == (0, 0) and window.reach == shape[1:3]
    dx = (np.empty if tiled else np.zeros)(shape, dtype)
    for block in scatter(dx, window, _positions(dx)):
        parts = dict(_parts(block))
        if window.stride[1] == 1:
            phases = parts
        else:
            phases = {start: (np.empty if apart else np.zeros)(part.shape, dtype) for start, part in parts.items()}
        for number, met in enumerate(_met(phases, block.window)):
            if apart:
                share(block.where, number, met)
            else:
                met += share(block.where, number, None)
        for start, part in parts.items():
            if phases is not parts:
                _copy(phases[start], part)
    return dx


def _phases(block: Block) -> dict[Pair, Array]:
    """`_parts`, each row of them in one piece: all pixels of a row that one element of the kernel meets."""
    if block.window.stride[1] == 1:
        return dict(_parts(block))
    phases = {}
    for start, part in _parts(block):
        phases[start] = np.empty(part.shape, part.dtype)
        _copy(part, phases[start])
    return phases


def _parts(block: Block) -> Iterator[tuple[Pair, Array]]:
    """The pixels of a block, each stride-th row and column from each (row, column) that the kernel needs."""
    (kh, kw), (sh, sw), (dh, dw) = block.window.kernel, block.window.stride, block.window.dilation
    height, width = block.window.reach
    for row in sorted({i * dh % sh for i in range(kh)}):
        for column in sorted({j * dw % sw for j in range(kw)}):
            yield (row, column), block.pixels[:, row:height:sh, column:width:sw]


def _met(phases: dict[Pair, Array], window: Window) -> Iterator[Array]:
    """For each element of the kernel, row by row, the pixels that it meets: `(images, rows, columns, channels)`."""
    (kh, kw), (sh, sw), (dh, dw) = window.kernel, window.stride, window.dilation
    for i in range(kh):
        for j in range(kw):
            row, column = i * dh // sh, j * dw // sw
            phase = phases[i * dh % sh, j * dw % sw]
            yield phase[:, row : row + window.output[0], column : column + window.output[1]]


def _copy(source: Array, target: Array) -> None:
    """`target[...] = source`, all channels of a pixel as one item: more than twice as fast for 32 of them."""
    item = np.dtype((np.void, source.shape[3] * source.itemsize))
    target.view(item)[...] = source.view(item)


def _images(operation: str, input: Operand) -> Tensor:
    x = as_tensor(input)
    floating(operation, x)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"{operation} got x of shape {x.shape}; it must be (batch, channels, height, width), none but batch 0"
        )
    return x


def _positions(images: Array) -> int:
    return max(1, BLOCK_BYTES // (images.shape[3] * images.itemsize))
