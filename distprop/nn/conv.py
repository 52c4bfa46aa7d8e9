"""Convolutional layers, with PyTorch's arguments, parameter layouts and first weights.

Every weight and bias starts uniform on ±1/√fan_in, fan_in being the numbers that one weight `[0]` holds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from distprop import functional as F
from distprop.functional.geometry import Size, pair
from distprop.nn import init
from distprop.nn.module import Module
from distprop.tensor import Operand, Parameter, Tensor


class Conv2d(Module):
    """`functional.conv2d`: x is `(batch, in_channels, height, width)`, y `(batch, out_channels, …, …)`.

    `weight` is `(out_channels, in_channels/groups, kernel height, kernel width)`, `bias` `(out_channels,)`; `padding`
    is one number or two, "same" or "valid".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        _check_channels("Conv2d", in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = pair("Conv2d", "kernel_size", kernel_size, 1)
        self.stride, self.dilation = pair("Conv2d", "stride", stride, 1), pair("Conv2d", "dilation", dilation, 1)
        self.padding = padding if isinstance(padding, str) else pair("Conv2d", "padding", padding, 0)
        _check_padding("Conv2d", self.padding, self.stride)
        self.weight, self.bias = _first(
            (out_channels, in_channels // groups, *self.kernel_size), out_channels, bias, dtype
        )

    def forward(self, x: Operand) -> Tensor:
        """The layer's output."""
        _check_input(self, x, self.in_channels, ("height", "width"))
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """The arguments."""
        return _arguments(self, padding=(0, 0), dilation=(1, 1))


class Conv1d(Module):
    """`functional.conv1d`: x is `(batch, in_channels, length)`, y `(batch, out_channels, …)`.

    `weight` is `(out_channels, in_channels/groups, kernel)`, `bias` `(out_channels,)`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        _check_channels("Conv1d", in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = pair("Conv1d", "kernel_size", kernel_size, 1, axes=1)[:1]
        self.stride = pair("Conv1d", "stride", stride, 1, axes=1)[:1]
        self.dilation = pair("Conv1d", "dilation", dilation, 1, axes=1)[:1]
        self.padding = padding if isinstance(padding, str) else pair("Conv1d", "padding", padding, 0, axes=1)[:1]
        _check_padding("Conv1d", self.padding, self.stride)
        self.weight, self.bias = _first(
            (out_channels, in_channels // groups, *self.kernel_size), out_channels, bias, dtype
        )

    def forward(self, x: Operand) -> Tensor:
        """The layer's output."""
        _check_input(self, x, self.in_channels, ("length",))
        return F.conv1d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """The arguments."""
        return _arguments(self, padding=(0,), dilation=(1,))


class ConvTranspose2d(Module):
    """`functional.conv_transpose2d`: x is `(batch, in_channels, height, width)`, y `(batch, out_channels, …, …)`.

    `weight` is `(in_channels, out_channels/groups, kernel height, kernel width)`, `bias` `(out_channels,)`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        name = "ConvTranspose2d"
        _check_channels(name, in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = pair(name, "kernel_size", kernel_size, 1)
        self.stride, self.dilation = pair(name, "stride", stride, 1), pair(name, "dilation", dilation, 1)
        self.padding = pair(name, "padding", padding, 0)
        self.output_padding = pair(name, "output_padding", output_padding, 0)
        self.weight, self.bias = _first(
            (in_channels, out_channels // groups, *self.kernel_size), out_channels, bias, dtype
        )

    def forward(self, x: Operand) -> Tensor:
        """The layer's output."""
        _check_input(self, x, self.in_channels, ("height", "width"))
        return F.conv_transpose2d(
            x, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return _arguments(self, padding=(0, 0), output_padding=(0, 0), dilation=(1, 1))


def _first(shape: tuple[int, ...], outputs: int, bias: bool, dtype: DTypeLike) -> tuple[Parameter, Parameter | None]:
    """A new weight and bias, uniform on ±1/√fan_in."""
    weight = init.kaiming_uniform_(Parameter(np.empty(shape, dtype)), a=math.sqrt(5))
    if not bias:
        return weight, None
    bound = 1 / math.sqrt(init.fans(weight)[0])
    return weight, init.uniform_(Parameter(np.empty(outputs, dtype)), -bound, bound)


def _check_channels(layer: str, in_channels: int, out_channels: int, groups: int) -> None:
    if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(
            f"{layer} needs at least one channel on each side and groups that divide both numbers, got "
            f"in_channels={in_channels}, out_channels={out_channels}, groups={groups}"
        )


def _check_padding(layer: str, padding: str | tuple[int, ...], stride: tuple[int, ...]) -> None:
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise ValueError(f'{layer}: padding must be integers, "same" or "valid", got {padding!r}')
    if padding == "same" and max(stride) > 1:
        raise ValueError(f'{layer}: padding "same" needs stride 1, got {stride}')


def _check_input(layer: Module, x: Operand, channels: int, space: tuple[str, ...]) -> None:
    shape = np.shape(x.data if isinstance(x, Tensor) else x)
    if len(shape) != 2 + len(space) or shape[1] != channels:
        raise ValueError(f"{layer!r} got x of shape {shape}; it must be (batch, {channels}, {', '.join(space)})")


def _arguments(layer: Any, **defaults: tuple[int, ...]) -> str:
    text = f"{layer.in_channels}, {layer.out_channels}, kernel_size={layer.kernel_size}, stride={layer.stride}"
    for name, default in defaults.items():
        if getattr(layer, name) != default:
            text += f", {name}={getattr(layer, name)}"
    text += f", groups={layer.groups}" if layer.groups != 1 else ""
    return text + ("" if layer.bias is not None else ", bias=False")
