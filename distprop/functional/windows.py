"""Windows that slide over images, in blocks that fit into a processor's cache.

Arrays here are `(batch, height, width, channels)`, contiguous: channels last, so that the numbers a window takes from
one row lie side by side. A convolution and a pooling walk over their output in blocks, some images or some rows of one
image at a time. For a block `gather` cuts out the part of the input that its windows see, with its border; `scatter`,
the other way round, adds what a block gives back; `patches` makes a matrix with one window in each row, which turns a
convolution into a matrix product. The whole of that matrix (im2col) never exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from distprop.tape import Array

SHORT_ROW = 12  # numbers; see `_patches_of`

Pair: TypeAlias = tuple[int, int]
Where: TypeAlias = tuple[slice, slice]


@dataclass(frozen=True, slots=True)
class Window:
    """Which input pixels each output pixel sees; every pair is (height, width).

    Output row r sees the input rows r·stride − padding + i·dilation for i < kernel; what lies outside is border. The
    padding is that before the first row (it may be negative: rows nobody sees); behind the last it follows from
    `output`, the number of positions of the window.
    """

    kernel: Pair
    stride: Pair
    dilation: Pair
    padding: Pair
    output: Pair

    @property
    def extent(self) -> Pair:
        """How many rows and columns one window spans."""
        return self.dilation[0] * (self.kernel[0] - 1) + 1, self.dilation[1] * (self.kernel[1] - 1) + 1

    @property
    def reach(self) -> Pair:
        """How many rows and columns all windows span together."""
        (rows, columns), (sh, sw), (height, width) = self.output, self.stride, self.extent
        return (rows - 1) * sh + height, (columns - 1) * sw + width

    @property
    def is_pointwise(self) -> bool:
        """Whether a window is one pixel and the windows are side by side."""
        return self.kernel == (1, 1) and self.stride == (1, 1)

    def turned_round(self, size: Pair) -> Window:
        """Without stride: the windows of y that the pixels of an image of `size` see, the kernel turned by 180°."""
        (height, width), padding = self.extent, self.padding
        return Window(self.kernel, (1, 1), self.dilation, (height - 1 - padding[0], width - 1 - padding[1]), size)

    def shifts(self) -> Iterator[tuple[int, int, Where]]:
        """(i, j, the slices of a block that the kernel's element i, j meets) in row-major order."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        down, across = (self.output[0] - 1) * sh + 1, (self.output[1] - 1) * sw + 1
        for i in range(kh):
            for j in range(kw):
                yield i, j, (slice(i * dh, i * dh + down, sh), slice(j * dw, j * dw + across, sw))


def channels_last(x: Array) -> Array:
    """`(batch, channels, height, width)` or `(batch, channels, length)` as a contiguous array with channels last.

    Costs nothing where the memory already is; a length becomes one column, which blocks can cut.
    """
    return np.ascontiguousarray((x if x.ndim == 4 else x[..., None]).transpose(0, 2, 3, 1))


def channels_second(y: Array, ndim: int = 4) -> Array:
    """The opposite of `channels_last`: a view with the user's order of axes."""
    return y.transpose(0, 3, 1, 2) if ndim == 4 else y[:, :, 0].transpose(0, 2, 1)


def blocks(batch: int, size: Pair, positions: int) -> Iterator[Where]:
    """Cut `batch` images of `size` into blocks (images, rows) of about `positions` pixels.

    Whole images where one image is small enough, else rows of one image. All blocks but the last ones have one size.
    """
    rows, columns = size
    fitting = max(1, positions // max(1, columns))  # rows
    if fitting >= rows:
        for images in _equal_parts(batch, fitting // rows):
            yield images, slice(0, rows)
    else:
        for image in range(batch):
            for some in _equal_parts(rows, fitting):
                yield slice(image, image + 1), some


def _equal_parts(length: int, at_most: int) -> Iterator[slice]:
    parts = -(-length // at_most)
    step = -(-length // max(1, parts))
    for start in range(0, length, max(1, step)):
        yield slice(start, min(start + step, length))


@dataclass(slots=True)
class Block:
    """Some images, or some rows of one image, and the pixels that their windows see."""

    where: Where
    """The place in the output: slices of images and of rows."""
    window: Window
    """The windows of this block alone."""
    pixels: Array
    """`(images, height, width, channels)`, contiguous, with the border; perhaps more rows than the windows see."""


def gather(images: Array, window: Window, positions: int) -> Iterator[Block]:
    """Each block with its pixels: a view of `images` if there is no border, else a copy that the next overwrites."""
    shared: Array | None = None
    for where, part, source, target in _walk(images.shape, window, positions):
        if target is None:
            yield Block(where, part, images[source[0], source[1].start :])
            continue
        count, rows = where[0].stop - where[0].start, part.reach[0]
        if shared is None:
            shared = np.zeros((count, *part.reach, images.shape[3]), images.dtype)
            pixels = shared
        elif pixels.shape[:2] != (count, rows):
            pixels = shared[:count, :rows]
        if part is not window:  # rows of one image: the block before had its border elsewhere
            pixels[:, : target[0].start] = 0
            pixels[:, target[0].stop :] = 0
        pixels[:, target[0], target[1]] = images[source]
        yield Block(where, part, pixels)


def scatter(images: Array, window: Window, positions: int) -> Iterator[Block]:
    """The adjoint of `gather`, with `images` of zeros: each block's pixels are zeros, and what they are when the next
    block is asked for is added to `images`, without the border.
    """
    shared: Array | None = None
    for where, part, source, target in _walk(images.shape, window, positions):
        alone = part is window or window.extent[0] <= window.stride[0]  # no other block meets these pixels
        if target is None and alone:
            yield Block(where, part, images[source[0], source[1].start :])
            continue
        down, across = target or (slice(None), slice(images.shape[2]))
        if shared is None:
            shared = np.empty((where[0].stop - where[0].start, *part.reach, images.shape[3]), images.dtype)
        pixels = shared[: where[0].stop - where[0].start, : part.reach[0]]
        pixels[...] = 0
        yield Block(where, part, pixels)
        if alone:
            images[source] = pixels[:, down, across]
        else:
            images[source] += pixels[:, down, across]


def copy_pixels(source: Array, target: Array) -> None:
    """`target[...] = source`, the last axis as one item of many bytes: faster than as many numbers."""
    item = np.dtype((np.void, source.shape[-1] * source.itemsize))
    target.view(item)[...] = source.view(item)


def patches(images: Array, window: Window, positions: int) -> Iterator[tuple[Where, Array]]:
    """For each block the matrix of its windows: one row a window, kernel height × kernel width × channels columns.

    The next block overwrites it.
    """
    memory: Array | None = None
    seen: Array | None = None
    for block in gather(images, window, positions):
        n, height, width, channels = block.pixels.shape
        rows, columns = block.window.output
        if window.is_pointwise and width == columns and (n == 1 or height == rows):
            yield block.where, block.pixels[:, :rows].reshape(-1, channels)
            continue
        if block.pixels is not seen:
            seen = block.pixels
            size = n * rows * columns * window.kernel[0] * window.kernel[1] * channels
            if memory is None:
                memory = np.empty(size, images.dtype)
            matrix, target, source = _patches_of(block, memory[:size])
        target[...] = source
        yield block.where, matrix


def _patches_of(block: Block, memory: Array) -> tuple[Array, Array, Array]:
    """(the matrix of the windows, still empty; a view of it; the view of the block's pixels to be copied there).

    NumPy copies one item of many bytes much faster than as many numbers. So one row of the kernel is one item, and
    where that is short, the matrix lies column by column in memory and is filled by long rows of pixels.
    """
    (kh, kw), (sh, sw), (dh, dw) = block.window.kernel, block.window.stride, block.window.dilation
    n, height, width, channels = block.pixels.shape
    pixel = channels * memory.itemsize
    image, row = height * width * pixel, width * pixel
    positions = (n, *block.window.output)
    if kw * channels < SHORT_ROW:
        by_column = (dh * row, dw * pixel, memory.itemsize, image, sh * row, sw * pixel)
        source = np.ndarray((kh, kw, channels, *positions), memory.dtype, block.pixels, strides=by_column)
        return memory.reshape(kh * kw * channels, -1).T, memory.reshape(source.shape), source
    together = kw if dw == 1 else 1
    item = np.dtype((np.void, together * pixel))
    by_window = (image, sh * row, sw * pixel, dh * row, dw * pixel)
    source = np.ndarray((*positions, kh, kw // together), item, block.pixels, strides=by_window)
    return memory.reshape(-1, kh * kw * channels), memory.view(item).reshape(source.shape), source


_Step: TypeAlias = tuple[Where, Window, tuple[slice, slice, slice], tuple[slice, slice] | None]


def _walk(shape: tuple[int, ...], window: Window, positions: int) -> Iterator[_Step]:
    """For each block: its place, its windows, the pixels of the images that they see, and where in the block those lie.

    The last is None if nothing has a border.
    """
    bordered = window.padding != (0, 0) or window.reach[0] > shape[1] or window.reach[1] > shape[2]
    across, place_across = _overlap(-window.padding[1], window.reach[1], shape[2])
    seen: slice | None = None
    for images, rows in blocks(shape[0], window.output, positions):
        if rows != seen:
            seen, count = rows, rows.stop - rows.start
            part = window if count == window.output[0] else replace(window, output=(count, window.output[1]))
            top = rows.start * window.stride[0] - window.padding[0]
            down, place_down = _overlap(top, part.reach[0], shape[1])
        yield (images, rows), part, (images, down, across), (place_down, place_across) if bordered else None


def _overlap(first: int, count: int, length: int) -> tuple[slice, slice]:
    """The part of the axis 0 … length−1 that lies in first … first+count−1, counted from 0 and from `first`."""
    start = min(max(first, 0), length)
    stop = min(max(first + count, start), length)
    place = min(max(start - first, 0), count)
    return slice(start, stop), slice(place, place + stop - start)
