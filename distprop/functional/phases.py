"""The pixels of strided windows as flat arrays.

Pixels that are a stride apart are brought together, an array for each phase of rows and columns, with the border around
them. All phases have one shape, so the pixels that one element of the kernel meets are a phase shifted by so many
numbers: one run of memory for a whole block of windows, however few channels there are. One run it has to be: NumPy's
maxima and comparisons of floats begin every run by clearing the processor's exception flags, which takes as long as a
thousand numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from distprop.functional.windows import Pair, Where, Window, blocks, copy_pixels
from distprop.tape import Array


@dataclass(frozen=True)
class Layout:
    """Where the pixels of a block of windows lie in the phases.

    (q, r) of phase (a, b) is pixel (q·stride + a − padding, r·stride + b − padding) of the images, or border. Output
    (q, r) lies at (q, r); what follows the last column and the last row of outputs has no meaning.
    """

    window: Window
    images: tuple[int, ...]
    """The shape: (images, height, width, channels)."""
    kept: dict[object, Array] = field(default_factory=dict, repr=False)
    """Memory that the next block of this layout uses again."""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of a phase: (images, rows, columns, channels)."""
        w = self.window
        rows, columns = (w.output[axis] + (w.extent[axis] - 1) // w.stride[axis] for axis in (0, 1))
        return self.images[0], rows, columns, self.images[3]

    @cached_property
    def size(self) -> int:
        """How many numbers a phase has."""
        images, rows, columns, channels = self.shape
        return images * rows * columns * channels

    @cached_property
    def rows(self) -> list[tuple[int, int]]:
        """For each row of the kernel: the phase of the rows that it meets, and how many numbers later."""
        _, _, columns, channels = self.shape
        kernel, stride, dilation = self.window.kernel[0], self.window.stride[0], self.window.dilation[0]
        return [(i * dilation % stride, i * dilation // stride * columns * channels) for i in range(kernel)]

    @cached_property
    def columns(self) -> list[tuple[int, int]]:
        """The same for each column of the kernel."""
        kernel, stride, dilation = self.window.kernel[1], self.window.stride[1], self.window.dilation[1]
        return [(j * dilation % stride, j * dilation // stride * self.shape[3]) for j in range(kernel)]

    @cached_property
    def first_elements(self) -> tuple[Array, Array]:
        """(the column, the number) of the first element of the kernel that meets no border before it, for each output.

        Both flat, as the smallest integers that can count the kernel's elements.
        """
        w = self.window
        rows, columns = (
            np.clip(-((np.arange(count) * stride - padding) // dilation), 0, kernel - 1)
            for count, stride, padding, dilation, kernel in zip(
                self.shape[1:3], w.stride, w.padding, w.dilation, w.kernel, strict=True
            )
        )
        small, channels = np.min_scalar_type(w.kernel[0] * w.kernel[1] - 1), self.shape[3]
        if not (rows.any() or columns.any()):
            return np.zeros(self.size, small), np.zeros(self.size, small)
        in_row = np.repeat(columns.astype(small), channels)
        numbers = np.repeat(np.add.outer(rows * w.kernel[1], columns).astype(small), channels)
        return np.tile(in_row, self.images[0] * len(rows)), np.tile(numbers, self.images[0])

    @cached_property
    def places(self) -> dict[Pair, tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """For each phase that the kernel meets: (rows, columns) of its pixels in the images, and the same in itself."""
        found = {}
        for row, column in product(dict(self.rows), dict(self.columns)):
            (rows, inner_rows), (columns, inner_columns) = self._along(0, row), self._along(1, column)
            found[row, column] = (rows, columns), (inner_rows, inner_columns)
        return found

    def _along(self, axis: int, phase: int) -> tuple[slice, slice]:
        stride, offset = self.window.stride[axis], phase - self.window.padding[axis]
        start = max(0, -(offset // stride))
        stop = max(start, min(self.shape[axis + 1], (self.images[axis + 1] - 1 - offset) // stride + 1))
        return slice(start * stride + offset, stop * stride + offset, stride), slice(start, stop)

    def flat(self, name: object, dtype: np.dtype[Any], length: int) -> Array:
        """Memory for so many numbers, the same whenever the name is."""
        if name not in self.kept:
            self.kept[name] = np.empty(length, dtype)
        return self.kept[name]

    def frame(self, name: object, dtype: np.dtype[Any], inside: tuple[slice, slice], border: float) -> Array:
        """Memory for a phase, `border` but inside, which is for others to set."""
        if name not in self.kept:
            frame = self.kept[name] = np.empty(self.shape, dtype)
            rows, columns = inside
            frame[:, : rows.start] = border
            frame[:, rows.stop :] = border
            frame[:, rows, : columns.start] = border
            frame[:, rows, columns.stop :] = border
        return self.kept[name]

    def outputs(self, flat: Array) -> Array:
        """The outputs, `(images, rows, columns, channels)`, in a flat phase or as much of one as they need."""
        (_, height, width, channels), (rows, columns) = self.shape, self.window.output
        strides = (height * width * channels, width * channels, channels, 1)
        shape = (self.images[0], rows, columns, channels)
        return np.ndarray(shape, flat.dtype, flat, strides=[number * flat.itemsize for number in strides])


def layouts(images: tuple[int, ...], window: Window, positions: int) -> Iterator[tuple[Where, slice, Layout]]:
    """Blocks of about so many windows over images of this shape: the outputs, the rows of pixels, and their layout."""
    layout: Layout | None = None
    for some, rows in blocks(images[0], window.output, positions):
        part = replace(window, output=(rows.stop - rows.start, window.output[1]))
        top = rows.start * window.stride[0] - window.padding[0]
        seen = slice(min(max(top, 0), images[1]), min(max(top + part.reach[0], 0), images[1]))
        part = replace(part, padding=(seen.start - top, window.padding[1]))
        shape = (some.stop - some.start, seen.stop - seen.start, *images[2:])
        if layout is None or layout.window != part or layout.images != shape:
            layout = Layout(part, shape)
        yield (some, rows), seen, layout


def phases(images: Array, layout: Layout, border: float) -> dict[Pair, Array]:
    """The phases that the kernel meets, flat; the next block of this layout overwrites them."""
    for phase, (pixels, inside) in layout.places.items():
        frame = layout.frame(phase, images.dtype, inside, border)
        copy_pixels(images[:, *pixels], frame[:, *inside])
    return {phase: layout.kept[phase].reshape(-1) for phase in layout.places}
