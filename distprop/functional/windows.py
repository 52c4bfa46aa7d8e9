"""Windows that slide over images, in blocks that fit into a processor's cache.

Arrays here are `(batch, height, width, channels)`, contiguous: channels last, so that the numbers a window takes from
one row lie side by side. A convolution and a pooling walk over their output in blocks, some images or some rows of one
image at a time. For a block `gather` cuts out the part of the input that its windows see, with its border, and
`scatter`, the other way round, adds what a block gives back; `patches` makes a matrix with one window in each row, which
turns a convolution into a matrix product. The whole of that matrix (im2col) never exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from distprop.tape import Array

BLOCK_BYTES = 512 * 1024  # half of a second-level cache of today
FEW_NUMBERS = 12  # below this many side by side, a matrix is filled faster column by column

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
        return _extent(self.kernel, self.dilation)

    @property
    def reach(self) -> Pair:
        """How many rows and columns all windows span together."""
        return self.span(0, self.output[0]), self.span(1, self.output[1])

    @property
    def is_pointwise(self) -> bool:
        """Whether a window is one pixel and the windows are side by side."""
        return self.kernel == (1, 1) and self.stride == (1, 1)

    def span(self, axis: int, positions: int) -> int:
        """How many rows (axis 0) or columns (axis 1) that many positions of the window span."""
        return (positions - 1) * self.stride[axis] + self.extent[axis]

    def shifts(self) -> Iterator[tuple[int, int, Where]]:
        """(i, j, the slices of a block that the kernel's element i, j meets) in row-major order."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        down, across = (self.output[0] - 1) * sh + 1, (self.output[1] - 1) * sw + 1
        for i in range(kh):
            for j in range(kw):
                yield i, j, (slice(i * dh, i * dh + down, sh), slice(j * dw, j * dw + across, sw))


def _extent(kernel: Pair, dilation: Pair) -> Pair:
    return dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1


def channels_last(x: Array) -> Array:
    """`(batch, channels, height, width)` or `(batch, channels, length)` as a contiguous array with channels last.

    Costs nothing where the memory already is; a length becomes one row.
    """
    return np.ascontiguousarray(x[:, :, None].transpose(0, 2, 3, 1) if x.ndim == 3 else x.transpose(0, 2, 3, 1))


def channels_second(y: Array, ndim: int = 4) -> Array:
    """The opposite of `channels_last`: a view with the user's order of axes."""
    return y.transpose(0, 3, 1, 2) if ndim == 4 else y[:, 0].transpose(0, 2, 1)


def blocks(batch: int, window: Window, bytes_per_position: int) -> Iterator[Where]:
    """Cut `batch` outputs into blocks (images, rows) that hold about `BLOCK_BYTES`.

    Whole images where one image is small enough, else rows of one image; nearly all blocks are of one size.
    """
    rows = window.output[0]
    fitting = max(1, BLOCK_BYTES // max(1, window.output[1] * bytes_per_position))  # rows
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


def gather(
    images: Array, window: Window, bytes_per_position: int, border: float = 0.0
) -> Iterator[tuple[Where, Window, Array]]:
    """For each block of the output: where it is, its windows, and the pixels that they see, border included.

    The pixels, `(images, height, width, channels)`, are a view of `images` where there is no border, else a copy that
    the next block overwrites.
    """
    bordered = _has_border(images.shape, window)
    buffer: Array | None = None
    for where in blocks(len(images), window, bytes_per_position):
        part, source, place = _meeting(images.shape, window, where)
        if not bordered:
            yield where, part, images[source[0], source[1].start :]  # to the end: contiguous
            continue
        if buffer is None:
            count = where[0].stop - where[0].start
            buffer = np.full((count, *part.reach, images.shape[3]), border, images.dtype)
        block = buffer[: where[0].stop - where[0].start, : part.reach[0]]
        if part.output != window.output:  # another block may have left pixels where this one has its border
            block[:, : place[0].start] = border
            block[:, place[0].stop :] = border
        block[:, place[0], place[1]] = images[source]
        yield where, part, block


def scatter(images: Array, window: Window, bytes_per_position: int) -> Iterator[tuple[Where, Window, Array]]:
    """The adjoint of `gather`: what is added to the yielded pixels is added to `images`, and the border is dropped."""
    bordered = _has_border(images.shape, window)
    buffer: Array | None = None
    for where in blocks(len(images), window, bytes_per_position):
        part, source, place = _meeting(images.shape, window, where)
        if not bordered:
            yield where, part, images[source[0], source[1].start :]
            continue
        if buffer is None:
            count = where[0].stop - where[0].start
            buffer = np.empty((count, *part.reach, images.shape[3]), images.dtype)
        block = buffer[: where[0].stop - where[0].start, : part.reach[0]]
        block[...] = 0
        yield where, part, block
        images[source] += block[:, place[0], place[1]]


def _has_border(shape: tuple[int, ...], window: Window) -> bool:
    return window.padding != (0, 0) or window.reach[0] > shape[1] or window.reach[1] > shape[2]


def _meeting(
    shape: tuple[int, ...], window: Window, where: Where
) -> tuple[Window, tuple[slice, slice, slice], tuple[slice, slice]]:
    """A block's own windows, the pixels of the images that they see, and where in the block those lie."""
    images, rows = where
    count = rows.stop - rows.start
    part = window if count == window.output[0] else _with_rows(window, count)
    top = rows.start * window.stride[0] - window.padding[0]
    down, place_down = _overlap(top, part.reach[0], shape[1])
    across, place_across = _overlap(-window.padding[1], part.reach[1], shape[2])
    return part, (images, down, across), (place_down, place_across)


def _with_rows(window: Window, rows: int) -> Window:
    return Window(window.kernel, window.stride, window.dilation, window.padding, (rows, window.output[1]))


def _overlap(first: int, count: int, length: int) -> tuple[slice, slice]:
    """The part of the axis 0 … length−1 that lies in first … first+count−1, counted from 0 and from `first`."""
    start = min(max(first, 0), length)
    stop = min(max(first + count, start), length)
    place = min(max(start - first, 0), count)
    return slice(start, stop), slice(place, place + stop - start)


class Patches:
    """The matrix of a block's windows: one row a window, `kernel height × kernel width × channels` columns.

    Makes one matrix after the other in the same memory; a 1×1 kernel needs none.
    """

    def __init__(self) -> None:
        self._memory: Array = np.empty(0)

    def of(self, block: Array, window: Window) -> Array:
        """The matrix of a contiguous block from `gather`; the next call overwrites it."""
        (kh, kw), (rows, columns) = window.kernel, window.output
        n, height, width, channels = block.shape
        if window.is_pointwise and (n == 1 or height == rows) and width == columns:
            return block[:, :rows].reshape(n * rows * columns, channels)
        shape = (n, rows, columns, kh, kw, channels)
        size = int(np.prod(shape))
        if self._memory.size < size or self._memory.dtype != block.dtype:
            self._memory = np.empty(size, block.dtype)
        memory = self._memory[:size]
        if kw * channels < FEW_NUMBERS:
            by_column = memory.reshape(kh, kw, channels, n, rows, columns)
            by_column[...] = _view(block, shape, block.dtype, window).transpose(3, 4, 5, 0, 1, 2)
            return memory.reshape(-1, n * rows * columns).T
        # NumPy copies an item of many bytes at once far faster than as many numbers: one kernel row is one item.
        together = kw if window.dilation[1] == 1 else 1
        item = np.dtype((np.void, together * channels * block.itemsize))
        target = memory.view(item).reshape(n, rows, columns, kh, kw // together)
        target[...] = _view(block, target.shape, item, window)
        return memory.reshape(n * rows * columns, -1)


def _view(block: Array, shape: tuple[int, ...], item: np.dtype[Any], window: Window) -> Array:
    """All windows of a block without copying, of axes (image, row, column, kernel row, kernel column[, channel])."""
    _, height, width, channels = block.shape
    pixel = channels * block.itemsize
    row = width * pixel
    image = height * row
    (sh, sw), (dh, dw) = window.stride, window.dilation
    strides = (image, sh * row, sw * pixel, dh * row, dw * pixel, block.itemsize)[: len(shape)]
    return np.ndarray(shape, item, buffer=block, strides=strides)
