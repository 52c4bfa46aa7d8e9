"""Pooling as modules; the arguments are PyTorch's, and x is `(batch, channels, height, width)`."""

from __future__ import annotations

from collections.abc import Sequence

from distprop import functional as F
from distprop.functional.geometry import Size, one_pooling_window, pair
from distprop.nn.module import Module
from distprop.tensor import Operand, Tensor


class MaxPool2d(Module):
    """The largest pixel of each window; the stride is the kernel's size unless given.

    PyTorch's fifth argument, `return_indices`, does not exist here.
    """

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        *,
        ceil_mode: bool = False,
    ) -> None:
        one_pooling_window("MaxPool2d", kernel_size, stride, padding, dilation)
        self.kernel_size, self.padding, self.dilation, self.ceil_mode = kernel_size, padding, dilation, ceil_mode
        self.stride = kernel_size if stride is None else stride

    def forward(self, input: Operand) -> Tensor:
        """See `functional.max_pool2d`."""
        return F.max_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"ceil_mode={self.ceil_mode}"
        )


class AvgPool2d(Module):
    """The mean of the pixels of each window; the stride is the kernel's size unless given."""

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        one_pooling_window("AvgPool2d", kernel_size, stride, padding)
        if divisor_override == 0:
            raise ValueError("AvgPool2d: divisor_override must not be 0")
        self.kernel_size, self.padding, self.ceil_mode = kernel_size, padding, ceil_mode
        self.stride = kernel_size if stride is None else stride
        self.count_include_pad, self.divisor_override = count_include_pad, divisor_override

    def forward(self, input: Operand) -> Tensor:
        """See `functional.avg_pool2d`."""
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class AdaptiveAvgPool2d(Module):
    """The mean over `output_size` windows that cover the image: `AdaptiveAvgPool2d(1)` is the mean of each channel."""

    def __init__(self, output_size: int | Sequence[int | None]) -> None:
        pair("AdaptiveAvgPool2d", "output_size", output_size, 1, in_place_of_none=(1, 1))
        self.output_size = output_size

    def forward(self, input: Operand) -> Tensor:
        """See `functional.adaptive_avg_pool2d`."""
        return F.adaptive_avg_pool2d(input, self.output_size)

    def extra_repr(self) -> str:
        """The argument."""
        return f"output_size={self.output_size}"
