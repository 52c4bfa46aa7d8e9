"""The products of `distprop.functional.correlate` for 3×3 windows without stride, by Winograd's F(2×2, 3×3).

Four pixels d_0 … d_3 of a row and a kernel w_0 … w_2 give two pixels of the result by four multiplications, not six:
y = Aᵀ((G w) ⊙ (Bᵀ d)). Over rows and columns, tiles of 4×4 pixels give 2×2 results by 16 multiplications, not 36. Each
of the 16 is one matrix product over the channels of all tiles of a block; Bᵀ and Aᵀ are additions of whole slices, for
which a block lies in memory as `(rows, columns, images, channels)`. The 16 factors of a tile are less than half of its
windows' numbers, too. Rounding is relative to the largest pixel of a tile, and a pixel that is not finite spoils it.

Source: Lavin and Gray, 2016, arXiv:1509.09308.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from distprop.functional.correlate import turned_round
from distprop.functional.windows import Pair, Where, Window, blocks, overlap
from distprop.tape import Array

BLOCK_BYTES = 1 << 21  # of factors and products of a block, in a second-level cache of 2 MiB
FEWEST_CHANNELS = 8  # of either side of a group: fewer leave no work for the products

_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def suits(window: Window, channels: int, outputs: int, groups: int = 1) -> bool:
    """Whether the products are possible this way, and faster."""
    return (
        window.kernel == (3, 3)
        and window.stride == window.dilation == (1, 1)
        and min(window.output) > 1
        and min(channels, outputs) >= FEWEST_CHANNELS * groups
    )


def correlate(images: Array, weight: Array, bias: Array | None, window: Window, groups: int = 1) -> Array:
    """See `correlate.correlate`; group i of the channels meets group i of the kernels alone."""
    outputs, channels = len(weight), images.shape[3]
    value = np.empty((len(images), *window.output, outputs), images.dtype)
    kernel = _kernel(weight, images.dtype)
    for where, rows, columns in _blocks(window, len(images), channels + outputs, images.itemsize):
        factors = _factors(images, window, where, columns)
        shape = factors.shape[2:5]
        products = np.empty((4, 4, *shape, outputs), images.dtype)
        flat = products.reshape(4, 4, -1, outputs)
        for ours, theirs in _groups(channels, outputs, groups):
            np.matmul(factors.reshape(4, 4, -1, channels)[..., ours], kernel[..., theirs], out=flat[..., theirs])
        if bias is not None:
            products[1, 1] += bias  # which all four results of a tile contain once
        strips, result = products[:2], np.empty((2 * rows, 2 * columns, shape[2], outputs), images.dtype)
        _results(products, strips[0], strips[1])
        for i in (0, 1):
            _results(strips[i], result[i::2, 0::2], result[i::2, 1::2])
        some, down = where
        target = value[some, 2 * down.start : 2 * down.stop]
        _copy(result.transpose(2, 0, 1, 3)[:, : target.shape[1], : target.shape[2]], target)
    return value


def input_gradient(grad: Array, weight: Array, window: Window, size: Pair, groups: int = 1) -> Array:
    """See `correlate.input_gradient`; without a stride it is a correlation with the kernel turned round."""
    outputs, channels = weight.shape[:2]
    by_group = weight[:, :, ::-1, ::-1].reshape(groups, outputs // groups, channels, 3, 3)
    turned = by_group.swapaxes(1, 2).reshape(groups * channels, -1, 3, 3)
    return correlate(grad, turned, None, turned_round(window, size), groups)


def weight_gradient(images: Array, grad: Array, window: Window, groups: int = 1) -> Array:
    """See `correlate.weight_gradient`; the adjoint of `correlate`, dw = Gᵀ (Σ (Bᵀ d B) ⊗ (A g Aᵀ)) G."""
    channels, outputs = images.shape[3], grad.shape[3]
    total = np.zeros((4, 4, channels // groups, outputs), images.dtype)
    for where, rows, columns in _blocks(window, len(images), channels + outputs, images.itemsize):
        factors = _factors(images, window, where, columns)
        g = _pixels(grad, where[0], (2 * where[1].start, 0), (2 * rows, 2 * columns))
        strips = np.empty((4, rows, 2 * columns, *g.shape[2:]), grad.dtype)
        spread = np.empty((*factors.shape[:5], outputs), grad.dtype)
        _spread([g[0::2], g[1::2]], strips)
        for strip, target in zip(strips, spread, strict=True):
            _spread([strip[:, 0::2], strip[:, 1::2]], target)
        across, flat = factors.reshape(4, 4, -1, channels).swapaxes(2, 3), spread.reshape(4, 4, -1, outputs)
        for ours, theirs in _groups(channels, outputs, groups):
            total[..., theirs] += across[:, :, ours] @ flat[..., theirs]
    g = _G.astype(images.dtype) * np.array([[1], [1], [1], [-1]], images.dtype)  # the sign that `_spread` leaves out
    return np.tensordot(np.tensordot(g, total, (0, 0)), g, (1, 0)).transpose(2, 1, 0, 3)


def _kernel(weight: Array, dtype: np.dtype[Any]) -> Array:
    """G w Gᵀ, `(4, 4, channels, outputs)`."""
    g = _G.astype(dtype)
    return np.ascontiguousarray(np.tensordot(np.tensordot(g, weight, (1, 2)), g, (3, 1)).transpose(0, 3, 2, 1))


def _groups(channels: int, outputs: int, groups: int) -> Iterator[tuple[slice, slice]]:
    """The channels and the outputs of each group."""
    c, o = channels // groups, outputs // groups
    return ((slice(i * c, i * c + c), slice(i * o, i * o + o)) for i in range(groups))


def _blocks(window: Window, batch: int, channels: int, itemsize: int) -> Iterator[tuple[Where, int, int]]:
    """(images and rows of tiles, how many rows, how many columns); `channels` are those of both sides together."""
    tiles = replace(window, output=(-(-window.output[0] // 2), -(-window.output[1] // 2)))
    for where in blocks(batch, tiles, max(1, BLOCK_BYTES // (16 * channels * itemsize))):
        yield where, where[1].stop - where[1].start, tiles.output[1]


def _factors(images: Array, window: Window, where: Where, columns: int) -> Array:
    """Bᵀ d B for the tiles of a block, `(4, 4, rows, columns, images, channels)`."""
    rows = where[1].stop - where[1].start
    corner = (2 * where[1].start - window.padding[0], -window.padding[1])
    pixels = _pixels(images, where[0], corner, (2 * rows + 2, 2 * columns + 2))
    strips = np.empty((4, rows, *pixels.shape[1:]), images.dtype)
    factors = np.empty((4, 4, rows, columns, *pixels.shape[2:]), images.dtype)
    _differences([pixels[i : i + 2 * rows : 2] for i in range(4)], strips)
    for strip, target in zip(strips, factors, strict=True):
        _differences([strip[:, j : j + 2 * columns : 2] for j in range(4)], target)
    return factors


def _pixels(images: Array, some: slice, corner: Pair, size: Pair) -> Array:
    """The part of some images that begins at `corner`, zeros around them: `(*size, images, channels)`."""
    part = np.zeros((*size, some.stop - some.start, images.shape[3]), images.dtype)
    (down, to_down), (across, to_across) = (
        overlap(c, s, n) for c, s, n in zip(corner, size, images.shape[1:3], strict=True)
    )
    _copy(images[some, down, across].transpose(1, 2, 0, 3), part[to_down, to_across])
    return part


def _differences(d: Sequence[Array], out: Array) -> None:
    """Bᵀ d."""
    np.subtract(d[0], d[2], out=out[0])
    np.add(d[1], d[2], out=out[1])
    np.subtract(d[2], d[1], out=out[2])
    np.subtract(d[1], d[3], out=out[3])


def _results(m: Array, first: Array, second: Array) -> None:
    """Aᵀ m; `first` and `second` may be the first two of m."""
    np.add(m[0], m[1], out=first)
    first += m[2]
    np.subtract(m[1], m[2], out=second)
    second -= m[3]


def _spread(g: Sequence[Array], out: Array) -> None:
    """A g, but for the sign of the last."""
    out[0] = g[0]
    np.add(g[0], g[1], out=out[1])
    np.subtract(g[0], g[1], out=out[2])
    out[3] = g[1]


def _copy(source: Array, target: Array) -> None:
    """`target[...] = source`, all channels of a pixel as one item, which is faster."""
    item = np.dtype((np.void, source.shape[3] * source.itemsize))
    target.view(item)[...] = source.view(item)
