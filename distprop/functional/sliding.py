"""Windows that slide along one axis: the sums over them, and their adjoint.

Arrays here are `(outer, length, inner)`, contiguous, with the axis in the middle: rows of channels-last images are
`(images, height, width·channels)`, columns `(images·rows, width, channels)`. Each element of the kernel meets one
strided slice of the pixels; where it would meet the border it is left out, so there is no border to write. Every step
is one NumPy call over long runs of numbers, however few channels there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distprop.functional.windows import Window, copy_pixels
from distprop.tape import Array

LONG_RUN = 1024  # bytes: with a stride, pixels that are shorter are brought together first


@dataclass(frozen=True, slots=True)
class Meeting:
    """The outputs that see a pixel through one element of the kernel, and these pixels, each stride-th one."""

    outputs: slice
    pixels: slice

    @property
    def count(self) -> int:
        """How many outputs."""
        return self.outputs.stop - self.outputs.start


@dataclass(frozen=True, slots=True)
class Axis:
    """Output q sees those of the pixels q·stride − padding + k, k < kernel, that lie in 0 … length − 1."""

    kernel: int
    stride: int
    padding: int
    outputs: int
    length: int

    @classmethod
    def of(cls, window: Window, axis: int, length: int) -> Axis:
        """The rows (`axis` 0) or the columns (1) of images with so many."""
        w = window
        return cls(w.kernel[axis], w.stride[axis], w.padding[axis], w.output[axis], length)

    def seen_by(self, outputs: slice) -> tuple[Axis, slice]:
        """(the axis with these outputs alone, the pixels that they see; all pixels if these are all outputs)."""
        if outputs == slice(0, self.outputs):
            return self, slice(0, self.length)
        first = outputs.start * self.stride - self.padding
        stop = (outputs.stop - 1) * self.stride - self.padding + self.kernel
        start = min(max(first, 0), self.length)
        pixels = slice(start, max(start, min(stop, self.length)))
        return self._part(outputs, pixels), pixels

    def seeing(self, pixels: slice) -> tuple[Axis, slice]:
        """(the axis with these pixels alone, the outputs that see them; all outputs if these are all pixels)."""
        if pixels == slice(0, self.length):
            return self, slice(0, self.outputs)
        first = -((self.kernel - 1 - self.padding - pixels.start) // self.stride)
        stop = (pixels.stop - 1 + self.padding) // self.stride + 1
        start = min(max(first, 0), self.outputs)
        outputs = slice(start, max(start, min(stop, self.outputs)))
        return self._part(outputs, pixels), outputs

    def _part(self, outputs: slice, pixels: slice) -> Axis:
        padding = self.padding - outputs.start * self.stride + pixels.start
        sizes = outputs.stop - outputs.start, pixels.stop - pixels.start
        return Axis(self.kernel, self.stride, padding, *sizes)

    def meetings(self) -> list[Meeting]:
        """Of the elements of the kernel that meet any pixel, the one that meets most first."""
        found = []
        for offset in range(-self.padding, self.kernel - self.padding):
            start = max(0, -(offset // self.stride))
            stop = min(self.outputs, (self.length - 1 - offset) // self.stride + 1)
            if start < stop:
                first, last = start * self.stride + offset, (stop - 1) * self.stride + offset
                found.append(Meeting(slice(start, stop), slice(first, last + 1, self.stride)))
        return sorted(found, key=lambda meeting: -meeting.count)


def sums(pixels: Array, axis: Axis, out: Array) -> None:
    """The sum of the pixels that each output sees."""
    meetings = axis.meetings()
    _fill_around(out, [meeting.outputs for meeting in meetings])
    phases: dict[int, Array] = {}
    for number, meeting in enumerate(meetings):
        met = pixels[:, meeting.pixels]
        if not _in_long_runs(pixels, axis):
            first, phase = divmod(meeting.pixels.start, axis.stride)
            if phase not in phases:
                phases[phase] = np.empty_like(pixels[:, phase :: axis.stride], order="C")
                copy_pixels(pixels[:, phase :: axis.stride], phases[phase])
            met = phases[phase][:, first : first + meeting.count]
        target = out[:, meeting.outputs]
        if number == 0:
            copy_pixels(met, target)
        else:
            target += met


def spread(grad: Array, axis: Axis, out: Array) -> None:
    """The adjoint of `sums`: to each pixel the sum of g over the outputs that see it."""
    meetings = axis.meetings()
    for phase in range(min(axis.stride, axis.length)):  # pixels of one phase are seen through the same elements
        part = out[:, phase :: axis.stride]
        own = [meeting for meeting in meetings if meeting.pixels.start % axis.stride == phase]
        places = [slice(m.pixels.start // axis.stride, m.pixels.start // axis.stride + m.count) for m in own]
        total = part if len(own) < 2 or _in_long_runs(out, axis) else np.empty_like(part, order="C")
        _fill_around(total, places)
        for number, (meeting, place) in enumerate(zip(own, places, strict=True)):
            if number == 0:
                copy_pixels(grad[:, meeting.outputs], total[:, place])
            else:
                total[:, place] += grad[:, meeting.outputs]
        if total is not part:
            copy_pixels(total, part)


def _in_long_runs(pixels: Array, axis: Axis) -> bool:
    return axis.stride == 1 or pixels.shape[2] * pixels.itemsize >= LONG_RUN


def _fill_around(out: Array, places: Sequence[slice]) -> None:
    """Zeros wherever the first of the places does not reach."""
    first = places[0] if places else slice(0, 0)
    out[:, : first.start] = 0
    out[:, first.stop :] = 0
