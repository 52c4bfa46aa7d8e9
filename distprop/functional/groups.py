"""Which products a convolution is made of: those of `correlate`, of `kernel_rows` or of `depthwise`.

Group i of the input channels meets group i of the kernels alone, `weight` `(o, c/groups, kh, kw)`. Where a group is one
input channel, its products are those of `distprop.functional.depthwise`; where it is a few, those of
`distprop.functional.kernel_rows`; else each group is a convolution of its own, `distprop.functional.correlate`.
"""

from __future__ import annotations

import numpy as np

from distprop.functional import correlate as single
from distprop.functional import depthwise, kernel_rows
from distprop.functional.windows import Pair, Window
from distprop.tape import Array


def correlate(images: Array, weight: Array, bias: Array | None, window: Window, groups: int) -> Array:
    """See `correlate.correlate`."""
    if depthwise.suits(weight.shape[1], groups):
        return depthwise.correlate(images, weight, bias, window)
    if kernel_rows.suits(weight.shape[1], len(weight) // groups, window):
        return kernel_rows.correlate(images, weight, bias, window, groups)
    if groups == 1:
        return single.correlate(images, weight, bias, window)
    biases = [None] * groups if bias is None else np.split(bias, groups)
    parts = zip(_channels(images, groups), np.split(weight, groups), biases, strict=True)
    return np.concatenate([single.correlate(x, w, b, window) for x, w, b in parts], axis=3)


def input_gradient(grad: Array, weight: Array, window: Window, size: Pair, groups: int) -> Array:
    """See `correlate.input_gradient`."""
    if depthwise.suits(weight.shape[1], groups):
        return depthwise.input_gradient(grad, weight, window, size, groups)
    if single.is_correlation(window, size) and kernel_rows.suits(len(weight) // groups, weight.shape[1], window):
        turned = kernel_rows.turned_round(weight, groups)
        return kernel_rows.correlate(grad, turned, None, window.turned_round(size), groups)
    if groups == 1:
        return single.input_gradient(grad, weight, window, size)
    parts = zip(_channels(grad, groups), np.split(weight, groups), strict=True)
    return np.concatenate([single.input_gradient(g, w, window, size) for g, w in parts], axis=3)


def weight_gradient(images: Array, grad: Array, window: Window, groups: int) -> Array:
    """See `correlate.weight_gradient`."""
    channels, outputs = images.shape[3] // groups, grad.shape[3] // groups
    if depthwise.suits(channels, groups):
        return depthwise.weight_gradient(images, grad, window)
    if kernel_rows.suits(channels, outputs, window):
        return kernel_rows.weight_gradient(images, grad, window, groups)
    if groups == 1:
        return single.weight_gradient(images, grad, window)
    parts = zip(_channels(images, groups), _channels(grad, groups), strict=True)
    return np.concatenate([single.weight_gradient(x, g, window) for x, g in parts])


def gradients(images: Array, grad: Array, weight: Array, window: Window, groups: int) -> tuple[Array, Array]:
    """See `correlate.gradients`."""
    size = (images.shape[1], images.shape[2])
    if not depthwise.suits(weight.shape[1], groups):
        if single.is_correlation(window, size) and kernel_rows.suits(len(weight) // groups, weight.shape[1], window):
            turned = kernel_rows.turned_round(weight, groups)
            return kernel_rows.gradients(images, grad, turned, window.turned_round(size), groups)
        if groups == 1 and not kernel_rows.suits(weight.shape[1], len(weight), window):
            return single.gradients(images, grad, weight, window)
    return input_gradient(grad, weight, window, size, groups), weight_gradient(images, grad, window, groups)


def _channels(images: Array, groups: int) -> list[Array]:
    return [np.ascontiguousarray(part) for part in np.split(images, groups, axis=3)]
