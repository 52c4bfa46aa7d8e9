"""Images changed at random, a new way in every epoch: more data for nothing.

What happens to an image is a function of (seed, epoch, its position in the dataset, the number of the transform), never
of the rank, of the batch it is in, or of what was drawn before. A transform says how many random numbers an image takes
and gets them as a row of a table that is drawn for the whole epoch, like the order of the examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distprop.data.dataset import Dataset, at_epoch
from distprop.functional.check import integer, real
from distprop.random import Stream, generator


class Transform(Protocol):
    """A change of images. One of your own needs these two names, and no base class."""

    @property
    def draws(self) -> int:
        """How many random numbers an image takes."""

    def __call__(self, images: NDArray[Any], numbers: NDArray[np.float64]) -> NDArray[Any]:
        """New images from `(n, channels, height, width)` and `numbers (n, draws)`, uniform on [0, 1)."""


class Augmented:
    """`dataset` with its first array changed by `transforms`, one after the other; the others stay as they are.

    A `Loader` says which epoch it is; asked directly, this is epoch 0. Evaluate on the dataset itself.

    >>> from distprop.data.dataset import ArrayDataset
    >>> images = ArrayDataset(np.ones((5, 3, 32, 32), np.float32), np.arange(5))
    >>> train = Augmented(images, [RandomCrop(28), RandomHorizontalFlip()], seed=1)
    >>> x, y = train[np.array([3, 0])]
    >>> x.shape, y
    ((2, 3, 28, 28), array([3, 0]))
    """

    def __init__(self, dataset: Dataset, transforms: Sequence[Transform], *, seed: int = 0, epoch: int = 0) -> None:
        self.dataset, self.transforms, self.seed, self.epoch = dataset, tuple(transforms), seed, epoch

    def at_epoch(self, epoch: int) -> Augmented:
        """The images of another epoch."""
        return Augmented(at_epoch(self.dataset, epoch), self.transforms, seed=self.seed, epoch=epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: NDArray[np.int64] | int) -> tuple[NDArray[Any], ...]:
        if isinstance(indices, int | np.integer):  # one example; a transform takes many
            return tuple(array[0] for array in self[np.array([indices])])
        images, *rest = self.dataset[indices]
        for transform, table in zip(self.transforms, self._tables, strict=True):
            images = transform(images, table[indices])
        return images, *rest

    @cached_property
    def _tables(self) -> list[NDArray[np.float64]]:
        """The numbers of each transform, `(length, draws)`: filled row by row, so no row depends on the length."""
        return [
            generator(self.seed, Stream.AUGMENT, self.epoch, number).random((len(self), transform.draws))
            for number, transform in enumerate(self.transforms)
        ]


@dataclass(eq=False)
class RandomCrop:
    """A window of `size` × `size` pixels, anywhere in the image after a border of `padding` zeros was put around it.

    `RandomCrop(32, padding=4)` is the usual one for CIFAR (He et al., 2015, arXiv:1512.03385).
    """

    size: int
    padding: int = 0
    draws = 2

    def __post_init__(self) -> None:
        integer("RandomCrop", size=self.size, padding=self.padding)
        if self.size < 1 or self.padding < 0:
            raise ValueError(f"{self}: the size must be 1 or more, and the padding 0 or more")

    def __call__(self, images: NDArray[Any], numbers: NDArray[np.float64]) -> NDArray[Any]:
        """Images `(n, channels, size, size)`."""
        _check(self, images)
        room = np.array(images.shape[2:]) + 2 * self.padding - self.size
        if room.min() < 0:
            raise ValueError(f"{self} got images of shape {images.shape}, too small for it even with the padding")
        padded = _pad(images, self.padding, self.padding)
        return _windows(padded, numbers, room, (self.size, self.size))


@dataclass(eq=False)
class RandomShift:
    """The image moved by up to `pixels` whole pixels up or down and left or right; zeros come in from outside."""

    pixels: int
    draws = 2

    def __post_init__(self) -> None:
        integer("RandomShift", pixels=self.pixels)
        if self.pixels < 0:
            raise ValueError(f"{self}: the number of pixels must be 0 or more")

    def __call__(self, images: NDArray[Any], numbers: NDArray[np.float64]) -> NDArray[Any]:
        """Images of the same shape."""
        _check(self, images)
        padded = _pad(images, self.pixels, self.pixels)
        return _windows(padded, numbers, np.full(2, 2 * self.pixels), images.shape[2:])


@dataclass(eq=False)
class RandomHorizontalFlip:
    """The image mirrored left to right, with probability `p`."""

    p: float = 0.5
    draws = 1

    def __post_init__(self) -> None:
        real("RandomHorizontalFlip", p=self.p)
        if not 0 <= self.p <= 1:
            raise ValueError(f"{self}: the probability must be between 0 and 1")

    def __call__(self, images: NDArray[Any], numbers: NDArray[np.float64]) -> NDArray[Any]:
        """Images of the same shape."""
        _check(self, images)
        return np.where(numbers[:, :, None, None] < self.p, images[..., ::-1], images)


@dataclass(eq=False)
class RandomRotation:
    """The image turned about its middle by an angle uniform on ±`degrees`; zeros come in from outside.

    A pixel is the bilinear mean of the four that surround the place it comes from.
    """

    degrees: float
    draws = 1

    def __post_init__(self) -> None:
        real("RandomRotation", degrees=self.degrees)

    def __call__(self, images: NDArray[Any], numbers: NDArray[np.float64]) -> NDArray[Any]:
        """Images of the same shape, floating point."""
        _check(self, images)
        if images.dtype.kind != "f":
            raise TypeError(f"{self} got images of dtype {images.dtype}; means of pixels need floating point")
        height, width = images.shape[2:]
        angle = np.deg2rad((2 * numbers - 1) * self.degrees)[:, :, None]  # (n, 1, 1), counter-clockwise
        down, right = np.arange(height)[:, None] - (height - 1) / 2, np.arange(width) - (width - 1) / 2
        y = right * np.sin(angle) + down * np.cos(angle) + (height - 1) / 2  # where each pixel comes from (n, h, w)
        x = right * np.cos(angle) - down * np.sin(angle) + (width - 1) / 2
        return _bilinear(images, y, x)


def _bilinear(images: NDArray[Any], y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[Any]:
    """The images at the places (y, x) `(n, height, width)` between their pixels; outside they are 0."""
    n, channels, height, width = images.shape
    padded = _pad(images, 1, 2)  # the places below reach from −1 to height + 1
    row, plane = width + 3, (width + 3) * (height + 3)
    y, x = np.clip(y, -1, height), np.clip(x, -1, width)
    top, left = np.floor(y), np.floor(x)
    below, beside = (y - top).astype(images.dtype), (x - left).astype(images.dtype)
    corner = ((top + 1) * row + left + 1).astype(np.intp)[:, None]
    corner = corner + plane * np.arange(n * channels).reshape(n, channels, 1, 1)
    result = np.zeros_like(images)
    for step, weight in (
        (0, (1 - below) * (1 - beside)),
        (1, (1 - below) * beside),
        (row, below * (1 - beside)),
        (row + 1, below * beside),
    ):
        result += padded.reshape(-1)[step:].take(corner) * weight[:, None]  # five times as fast as take_along_axis
    return result


def _pad(images: NDArray[Any], before: int, after: int) -> NDArray[Any]:
    return np.pad(images, ((0, 0), (0, 0), (before, after), (before, after)))


def _windows(
    images: NDArray[Any], numbers: NDArray[np.float64], room: NDArray[np.int64], shape: tuple[int, ...]
) -> NDArray[Any]:
    """A window of `shape` from each image, whose upper left corner is uniform on 0..room in both directions."""
    top, left = (numbers * (room + 1)).astype(np.intp).T
    views = np.lib.stride_tricks.sliding_window_view(images, shape, axis=(2, 3))
    return views[np.arange(len(images)), :, top, left]


def _check(transform: Transform, images: NDArray[Any]) -> None:
    if images.ndim != 4:
        raise ValueError(f"{transform} got images of shape {images.shape}; it needs (n, channels, height, width)")
