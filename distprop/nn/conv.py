"""Convolutional layers, with PyTorch's arguments, parameter layouts and first weights.

Every weight and bias starts uniform on ±1/√fan_in, fan_in being the numbers that one weight `[0]` holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import DTypeLike

from distprop import functional as F
from distprop.functional.check import integer
from distprop.functional.geometry import Size, pair
from distprop.nn.layers import first_weights
from distprop.nn.module import Module
from distprop.tensor import Operand, Tensor


class _Convolution(Module):
    """What Conv1d and Conv2d share."""

    _space: ClassVar[tuple[str, ...]]
    _operation: ClassVar[Callable[..., Tensor]]

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
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        _check_channels(self, in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = _sizes(self, "kernel_size", kernel_size, 1)
        self.stride, self.dilation = _sizes(self, "stride", stride, 1), _sizes(self, "dilation", dilation, 1)
        self.padding = padding if isinstance(padding, str) else _sizes(self, "padding", padding, 0)
        self.padding_mode = padding_mode
        self._check_padding()
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight, self.bias = first_weights(shape, out_channels, bias, dtype)

    def forward(self, input: Operand) -> Tensor:
        """The layer's output."""
        _check_input(self, input)
        padding: Size | str = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._margins(), self.padding_mode), 0
        return self._operation(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """The arguments."""
        nothing, once = (0,) * len(self._space), (1,) * len(self._space)
        text = _arguments(self, padding=nothing, dilation=once)
        return text + (f", padding_mode={self.padding_mode}" if self.padding_mode != "zeros" else "")

    def _check_padding(self) -> None:
        name, padding = type(self).__name__, self.padding
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f'{name}: padding must be integers, "same" or "valid", got {padding!r}')
        if padding == "same" and max(self.stride) > 1:
            raise ValueError(f'{name}: padding "same" needs stride 1, got {self.stride}')
        if self.padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise ValueError(
                f"{name}: padding_mode must be zeros, reflect, replicate or circular, got {self.padding_mode!r}"
            )

    def _margins(self) -> list[int]:
        """The widths that `functional.pad` takes, the last axis first."""
        if isinstance(self.padding, str):
            wanted = self.padding == "same"
            sums = [d * (k - 1) * wanted for k, d in zip(self.kernel_size, self.dilation, strict=True)]
            return [width for total in reversed(sums) for width in (total // 2, total - total // 2)]
        return [width for width in reversed(self.padding) for _ in range(2)]


class Conv2d(_Convolution):
    """`functional.conv2d`: x is `(batch, in_channels, height, width)`, y `(batch, out_channels, …, …)`.

    `weight` is `(out_channels, in_channels/groups, kernel height, kernel width)`, `bias` `(out_channels,)`; `padding`
    is one number or two, "same" or "valid". What the margin is filled with, `padding_mode`, is "zeros" or one of the
    modes of `functional.pad`.
    """

    _space = ("height", "width")
    _operation = staticmethod(F.conv2d)


class Conv1d(_Convolution):
    """`functional.conv1d`: x is `(batch, in_channels, length)`, y `(batch, out_channels, …)`.

    `weight` is `(out_channels, in_channels/groups, kernel)`, `bias` `(out_channels,)`; `padding` and `padding_mode` as
    for Conv2d.
    """

    _space = ("length",)
    _operation = staticmethod(F.conv1d)


class ConvTranspose2d(Module):
    """`functional.conv_transpose2d`: x is `(batch, in_channels, height, width)`, y `(batch, out_channels, …, …)`.

    `weight` is `(in_channels, out_channels/groups, kernel height, kernel width)`, `bias` `(out_channels,)`.
    """

    _space: ClassVar[tuple[str, ...]] = ("height", "width")

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
        padding_mode: Literal["zeros"] = "zeros",
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        _check_channels(self, in_channels, out_channels, groups)
        if padding_mode != "zeros":
            raise ValueError(f'ConvTranspose2d: padding_mode can only be "zeros", got {padding_mode!r}')
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = _sizes(self, "kernel_size", kernel_size, 1)
        self.stride, self.dilation = _sizes(self, "stride", stride, 1), _sizes(self, "dilation", dilation, 1)
        self.padding = _sizes(self, "padding", padding, 0)
        self.output_padding = _sizes(self, "output_padding", output_padding, 0)
        shape = (in_channels, out_channels // groups, *self.kernel_size)
        self.weight, self.bias = first_weights(shape, out_channels, bias, dtype)

    def forward(self, input: Operand) -> Tensor:
        """The layer's output."""
        _check_input(self, input)
        return F.conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return _arguments(self, padding=(0, 0), output_padding=(0, 0), dilation=(1, 1))


def _sizes(layer: Any, name: str, value: Size, least: int) -> tuple[int, ...]:
    """One integer for each axis."""
    axes = len(layer._space)
    return pair(type(layer).__name__, name, value, least, axes)[:axes]


def _check_channels(layer: Module, in_channels: int, out_channels: int, groups: int) -> None:
    integer(type(layer).__name__, in_channels=in_channels, out_channels=out_channels, groups=groups)
    if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(
            f"{type(layer).__name__} needs at least one channel on each side and groups that divide both numbers, got "
            f"in_channels={in_channels}, out_channels={out_channels}, groups={groups}"
        )


def _check_input(layer: Any, x: Operand) -> None:
    shape = np.shape(x.data if isinstance(x, Tensor) else x)
    if len(shape) != 2 + len(layer._space) or shape[1] != layer.in_channels:
        wanted = f"(batch, {layer.in_channels}, {', '.join(layer._space)})"
        raise ValueError(f"{layer!r} got x of shape {shape}; it must be {wanted}")


def _arguments(layer: Any, **defaults: tuple[int, ...]) -> str:
    text = f"{layer.in_channels}, {layer.out_channels}, kernel_size={layer.kernel_size}, stride={layer.stride}"
    for name, default in defaults.items():
        if getattr(layer, name) != default:
            text += f", {name}={getattr(layer, name)}"
    text += f", groups={layer.groups}" if layer.groups != 1 else ""
    return text + ("" if layer.bias is not None else ", bias=False")
