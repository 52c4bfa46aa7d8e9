"""The products of `distprop.functional.correlate` a row of the kernel at a time, and all groups of channels at once.

A row of the kernel meets the pixels of one row in windows of its own width. These strips are copied once and serve all
rows of the kernel: for 3×3 a third of im2col is written. Each product is with a part of the kernel that stays in the
first-level cache, and of a size at which OpenBLAS multiplies the numbers where they lie instead of packing them first:
114 instead of 55 GFLOP/s for 3×3, 32 channels and 64 outputs. `matmul` runs through many such products in one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from distprop.functional.windows import Block, Where, Window, gather
from distprop.tape import Array

SMALL_PRODUCT = 1_000_000  # multiplications up to which OpenBLAS packs nothing
FEWEST_POSITIONS = 32  # in a small product, lest the calls of BLAS be most of it
SHORTEST_STRIP = 24  # numbers, lest adding up the products of the rows be most of it
BLOCK_BYTES = 1 << 19  # of strips, so that the second-level cache holds them until the last row of the kernel


def suits(channels: int, outputs: int, window: Window) -> bool:
    """Whether these products are the faster ones for that many channels and outputs in a group."""
    strip = window.kernel[1] * channels
    if window.kernel == (1, 1):
        return False  # nothing to share
    return strip >= SHORTEST_STRIP and FEWEST_POSITIONS * strip * outputs <= SMALL_PRODUCT


def correlate(images: Array, weight: Array, bias: Array | None, window: Window, groups: int) -> Array:
    """See `correlate.correlate`."""
    value = np.empty((len(images), *window.output, len(weight)), images.dtype)
    kernel = _kernel_rows(weight, groups)
    row = None if bias is None else np.tile(bias, window.output[1])  # longer runs: a third of the time
    memory: Array | None = None
    for where, strips in _strips(images, window, groups):
        target = value[where]
        if memory is None:
            memory = np.empty_like(target)
        _sum_of_products(strips, kernel, target, memory)
        if row is not None:
            lines = target.reshape(*target.shape[:2], -1)
            lines += row
    return value


def weight_gradient(images: Array, grad: Array, window: Window, groups: int) -> Array:
    """See `correlate.weight_gradient`."""
    outputs, channels = grad.shape[3] // groups, images.shape[3] // groups
    total = np.zeros((window.kernel[0], groups, outputs, window.kernel[1] * channels), images.dtype)
    for where, strips in _strips(images, window, groups):
        _add_products(_by_group(grad[where], groups), strips, total)
    total = total.reshape(window.kernel[0], grad.shape[3], window.kernel[1], channels)
    return total.transpose(1, 3, 0, 2)


def gradients(images: Array, grad: Array, weight: Array, window: Window, groups: int) -> tuple[Array, Array]:
    """See `correlate.gradients`; `weight` and `window` are those that lead from g to dx: the kernel `turned_round`.

    The strips of g serve both: dw[o, c, k] = Σ_p x[p, c] g[p + padding − k·dilation, o].
    """
    outputs, channels = grad.shape[3] // groups, images.shape[3] // groups
    dx = np.empty_like(images)
    kernel = _kernel_rows(weight, groups)
    total = np.zeros((window.kernel[0], groups, channels, window.kernel[1] * outputs), images.dtype)
    memory: Array | None = None
    for where, strips in _strips(grad, window, groups):
        if memory is None:
            memory = np.empty_like(dx[where])
        _sum_of_products(strips, kernel, dx[where], memory)
        _add_products(_by_group(images[where], groups), strips, total)
    total = total.reshape(window.kernel[0], groups, channels, window.kernel[1], outputs)[::-1, :, :, ::-1]
    return dx, total.transpose(1, 4, 2, 0, 3).reshape(grad.shape[3], channels, *window.kernel)


def turned_round(weight: Array, groups: int) -> Array:
    """The kernel turned by 180°, with inputs and outputs of each group exchanged."""
    outputs, channels, *size = weight.shape
    turned = weight[:, :, ::-1, ::-1].reshape(groups, outputs // groups, channels, *size)
    return turned.swapaxes(1, 2).reshape(groups * channels, outputs // groups, *size)


def _strips(images: Array, window: Window, groups: int) -> Iterator[tuple[Where, list[Array]]]:
    """For each block its place and what each row of the kernel meets there.

    That is `(groups, images, positions, kernel width · channels/groups)`. The next block overwrites it.
    """
    (kh, kw), (sh, _), (dh, _) = window.kernel, window.stride, window.dilation
    channels = images.shape[3] // groups
    memory: Array | None = None
    seen: Array | None = None
    for block in gather(images, window, max(1, BLOCK_BYTES // (kw * images.shape[3] * images.itemsize))):
        n, (rows, columns) = len(block.pixels), block.window.output
        if block.pixels is not seen:
            seen = block.pixels
            most = rows + dh * (kh - 1) // sh
            if memory is None:
                memory = np.empty(sh * groups * n * most * columns * kw * channels, images.dtype)
            phases = memory[: sh * groups * n * most * columns * kw * channels]
            phases = phases.reshape(sh, groups, n, most, columns, kw * channels)
            copies = list(_copies(block, phases))
            strips = [
                phases[i * dh % sh, :, :, i * dh // sh :][:, :, :rows].reshape(groups, n, rows * columns, -1)
                for i in range(kh)
            ]
        for target, source in copies:
            target[...] = source
        yield block.where, strips


def _copies(block: Block, phases: Array) -> Iterator[tuple[Array, Array]]:
    """(a view of `phases`, the view of the block's pixels to be copied there), for each phase of the stride.

    NumPy copies one item of many bytes much faster than as many numbers, so a strip is one item where its pixels lie
    side by side, and as many as the kernel is wide otherwise.
    """
    (kh, kw), (sh, sw), (dh, dw) = block.window.kernel, block.window.stride, block.window.dilation
    _, groups, n, _, columns, _ = phases.shape
    _, height, width, channels = block.pixels.shape
    pixel = channels * block.pixels.itemsize
    row, image = width * pixel, height * width * pixel
    together = kw if groups == 1 and dw == 1 else 1
    item = np.dtype((np.void, pixel // groups * together))
    for phase in {i * dh % sh for i in range(kh)}:
        rows = block.window.output[0] + max(i * dh // sh for i in range(kh) if i * dh % sh == phase)
        target = phases[phase].view(item)[:, :, :rows]
        shape = (groups, n, rows, columns)
        strides = (pixel // groups, image, sh * row, sw * pixel)
        for j in range(kw // together):
            yield (
                target[..., j],
                np.ndarray(shape, item, block.pixels, offset=phase * row + j * dw * pixel, strides=strides),
            )


def _sum_of_products(strips: Sequence[Array], kernel: Array, target: Array, memory: Array) -> None:
    """target = Σ_i strips[i] kernel[i]; `memory` is as large as `target`."""
    groups = kernel.shape[1]
    more = memory[: len(target), : target.shape[1]]
    for i, (strip, part) in enumerate(zip(strips, kernel, strict=True)):
        out = _by_group(more if i else target, groups)
        cuts = (_small_products(a, part[0].size) for a in (strip, out))
        for rows, product in zip(*cuts, strict=True):
            np.matmul(rows, part[:, None, None], out=product)
        if i:
            target += more


def _add_products(others: Array, strips: Sequence[Array], total: Array) -> None:
    """total[i] += othersᵀ strips[i]"""
    for strip, sum_of_strip in zip(strips, total, strict=True):
        cuts = (_small_products(a, sum_of_strip[0].size) for a in (others, strip))
        for a, b in zip(*cuts, strict=True):
            sum_of_strip += np.matmul(a.swapaxes(3, 4), b).sum((1, 2))


def _small_products(rows: Array, numbers: int) -> Iterator[Array]:
    """`(groups, images, positions, n)` as `(groups, images, products, positions, n)`, equal ones and perhaps the rest.

    Each position is multiplied with so many `numbers`.
    """
    groups, images, positions, n = rows.shape
    products = -(-positions // max(1, SMALL_PRODUCT // numbers))
    step = -(-positions // products)
    whole = positions // step * step
    yield rows[:, :, :whole].reshape(groups, images, -1, step, n)
    if whole < positions:
        yield rows[:, :, None, whole:]


def _kernel_rows(weight: Array, groups: int) -> Array:
    """`(kernel height, groups, kernel width · channels/groups, outputs/groups)`, contiguous."""
    outputs, channels, height, width = weight.shape
    rows = weight.reshape(groups, outputs // groups, channels, height, width).transpose(3, 0, 4, 2, 1)
    return np.ascontiguousarray(rows).reshape(height, groups, width * channels, outputs // groups)


def _by_group(images: Array, groups: int) -> Array:
    """A view `(groups, images, positions, channels/groups)`."""
    n, height, width, channels = images.shape
    return images.reshape(n, height * width, groups, channels // groups).transpose(2, 0, 1, 3)
