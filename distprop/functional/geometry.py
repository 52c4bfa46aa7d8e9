"""Kernel sizes, strides and paddings: how the user's numbers become the windows of `distprop.functional.windows`.

Everything is checked here, before anything is computed. A pair is (height, width); a length counts as one column.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from distprop.functional.windows import Pair, Window

Size: TypeAlias = int | Sequence[int]


def pair(
    operation: str,
    name: str,
    value: int | Sequence[int | None],
    least: int,
    axes: int = 2,
    in_place_of_none: Pair | None = None,
) -> Pair:
    """One integer for both axes or one for each, none below `least`; for `axes` 1 the width's is `least`.

    Of two, one that is None may be replaced by that of `in_place_of_none`.

    Raises:
        TypeError: not integers.
        ValueError: too many, too few or too small.
    """
    try:
        given: Sequence[Any] = value if isinstance(value, Sequence) else (value,)
        if in_place_of_none and len(given) == 2:
            given = [other if number is None else number for number, other in zip(given, in_place_of_none, strict=True)]
        numbers = tuple(operator.index(number) for number in given)
    except TypeError:
        raise TypeError(
            f"{operation}: {name} must be one integer{' or two' if axes == 2 else ''}, got {value!r}"
        ) from None
    if len(numbers) == 1:
        numbers *= axes
    if len(numbers) != axes or min(numbers) < least:
        raise ValueError(
            f"{operation}: {name} must be one integer{' or two' if axes == 2 else ''}, {least} or more, got {value!r}"
        )
    return (numbers[0], numbers[1]) if axes == 2 else (numbers[0], least)


def convolution_window(
    operation: str,
    shape: tuple[int, ...],
    kernel: Pair,
    stride: Size,
    padding: Size | str,
    dilation: Size,
) -> Window:
    """The windows of a convolution over x of `shape`, `(batch, channels, height, width)` or `(…, length)`.

    Raises:
        ValueError: an image without pixels, a kernel larger than the padded image, or padding "same" with a stride.
    """
    axes = len(shape) - 2
    if 0 in shape[2:]:
        raise ValueError(f"{operation} got x of shape {shape}, which has no pixels; only the batch may be 0")
    size = (shape[2], shape[3]) if axes == 2 else (shape[2], 1)
    strides, dilations = (
        pair(operation, name, value, 1, axes) for name, value in (("stride", stride), ("dilation", dilation))
    )
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    if padding == "same":
        if strides != (1, 1):
            raise ValueError(f'{operation}: padding "same" needs stride 1, got {stride!r}')
        before = ((extent[0] - 1) // 2, (extent[1] - 1) // 2)  # the odd one behind, as in PyTorch
        return Window(kernel, strides, dilations, before, size)
    if isinstance(padding, str) and padding != "valid":
        raise ValueError(f'{operation}: padding must be integers, "same" or "valid", got {padding!r}')
    before = (0, 0) if isinstance(padding, str) else pair(operation, "padding", padding, 0, axes)
    spare = [n + 2 * p - e for n, p, e in zip(size, before, extent, strict=True)]
    if min(spare) < 0:
        padded = " by ".join(str(n + 2 * p) for n, p in zip(shape[2:], before, strict=False))
        raise ValueError(
            f"{operation} got x of shape {shape}; with padding {padding!r} that is {padded}, less than the "
            f"{' by '.join(map(str, extent[:axes]))} of the kernel {kernel if axes == 2 else kernel[0]}"
            + (f" with dilation {dilation!r}" if dilations != (1, 1) else "")
        )
    return Window(kernel, strides, dilations, before, (spare[0] // strides[0] + 1, spare[1] // strides[1] + 1))


def transposed_window(
    operation: str,
    shape: tuple[int, ...],
    kernel: Pair,
    stride: Size,
    padding: Size,
    output_padding: Size,
    dilation: Size,
) -> tuple[Window, Pair]:
    """The windows of the convolution that leads from the result back to x of `shape`, and the result's size.

    Raises:
        ValueError: a result without pixels, or an output_padding that neither stride nor dilation can leave over.
    """
    strides, before, extra, dilations = (
        pair(operation, name, value, least)
        for name, value, least in (
            ("stride", stride, 1),
            ("padding", padding, 0),
            ("output_padding", output_padding, 0),
            ("dilation", dilation, 1),
        )
    )
    if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        raise ValueError(
            f"{operation}: output_padding must be less than stride or dilation, got output_padding "
            f"{output_padding!r}, stride {stride!r}, dilation {dilation!r}"
        )
    window = Window(kernel, strides, dilations, before, (shape[2], shape[3]))
    height, width = (r - 2 * p + e for r, p, e in zip(window.reach, before, extra, strict=True))
    if min(height, width) < 1 or 0 in shape[2:]:
        raise ValueError(
            f"{operation} got x of shape {shape}; with kernel {kernel}, stride {stride!r} and padding {padding!r} the "
            f"result would be {height} by {width} pixels"
        )
    return window, (height, width)


def one_pooling_window(
    operation: str, kernel_size: Size, stride: Size | None = None, padding: Size = 0, dilation: Size = 1
) -> Window:
    """The first window of a pooling, whatever the images are.

    Raises:
        TypeError: not integers.
        ValueError: numbers that are too small, or padding of more than half of the kernel.
    """
    kernel = pair(operation, "kernel_size", kernel_size, 1)
    strides = kernel if stride is None else pair(operation, "stride", stride, 1)
    before = pair(operation, "padding", padding, 0)
    if any(2 * p > k for p, k in zip(before, kernel, strict=True)):
        raise ValueError(
            f"{operation}: padding may be half of the kernel at most, got padding {padding!r} for kernel {kernel}"
        )
    return Window(kernel, strides, pair(operation, "dilation", dilation, 1), before, (1, 1))


def pooling_window(
    operation: str,
    shape: tuple[int, ...],
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
    ceil_mode: bool,
) -> Window:
    """The windows of a pooling over x of `shape` `(batch, channels, height, width)`.

    `ceil_mode` adds a last window that hangs over the end, if it begins inside the image or the padding before it.

    Raises:
        TypeError, ValueError: see `one_pooling_window`.
        ValueError: a kernel larger than the padded image.
    """
    window = one_pooling_window(operation, kernel_size, stride, padding, dilation)
    before, output = window.padding, []
    for n, p, e, s in zip(shape[2:], before, window.extent, window.stride, strict=True):
        spare = n + 2 * p - e
        count = (-(-spare // s) if ceil_mode else spare // s) + 1
        output.append(count - 1 if ceil_mode and (count - 1) * s >= n + p else count)
    if min(output) < 1 or 0 in shape[2:]:
        raise ValueError(
            f"{operation} got x of shape {shape}; with padding {padding!r} that is {shape[2] + 2 * before[0]} by "
            f"{shape[3] + 2 * before[1]}, less than the {window.extent[0]} by {window.extent[1]} of the kernel "
            f"{window.kernel}"
        )
    return replace(window, output=(output[0], output[1]))
