"""The fully connected layer, activations as modules, and the small ones between them.

`inplace` is there for programs that were written for PyTorch: no layer writes into its input, whatever it says.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from distprop import functional as F
from distprop.functional.activation import check_approximation
from distprop.functional.check import integer
from distprop.functional.dropout import check_probability
from distprop.nn import init
from distprop.nn.module import Module
from distprop.tensor import Operand, Parameter, Tensor, as_tensor


class Linear(Module):
    """y = x Wᵀ + b; x is `(..., in_features)`, y `(..., out_features)`.

    `weight` `(out_features, in_features)` and `bias` `(out_features,)` start uniform on ±1/√in_features, as in PyTorch.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, dtype: DTypeLike = np.float32
    ) -> None:
        integer("Linear", in_features=in_features, out_features=out_features)
        if in_features < 1 or out_features < 1:
            raise ValueError(f"Linear needs at least one feature on each side, got ({in_features}, {out_features})")
        self.in_features, self.out_features = in_features, out_features
        self.weight, self.bias = first_weights((out_features, in_features), out_features, bias, dtype)

    def forward(self, input: Operand) -> Tensor:
        """The layer's output."""
        try:
            return F.linear(input, self.weight, self.bias)
        except ValueError as error:
            shape = as_tensor(input).shape
            if shape[-1:] == (self.in_features,):
                raise
            raise ValueError(
                f"Linear({self.in_features}, {self.out_features}) got x of shape {shape}; "
                f"its last axis must be {self.in_features}"
            ) from error

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.in_features}, {self.out_features}{'' if self.bias is not None else ', bias=False'}"


def first_weights(
    shape: tuple[int, ...], outputs: int, bias: bool, dtype: DTypeLike
) -> tuple[Parameter, Parameter | None]:
    """A new weight of that `shape` and a bias for so many `outputs`, uniform on ±1/√fan_in."""
    weight = init.kaiming_uniform_(Parameter(np.empty(shape, dtype)), a=math.sqrt(5))
    if not bias:
        return weight, None
    bound = 1 / math.sqrt(init.fans(weight)[0])
    return weight, init.uniform_(Parameter(np.empty(outputs, dtype)), -bound, bound)


class ReLU(Module):
    """max(x, 0). `inplace` has no effect."""

    def __init__(self, inplace: bool = False) -> None:
        self.inplace = inplace

    def forward(self, input: Operand) -> Tensor:
        """See `functional.relu`."""
        return F.relu(input)


class LeakyReLU(Module):
    """x where x > 0, else `negative_slope`·x. `inplace` has no effect."""

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False) -> None:
        self.negative_slope, self.inplace = negative_slope, inplace

    def forward(self, input: Operand) -> Tensor:
        """See `functional.leaky_relu`."""
        return F.leaky_relu(input, self.negative_slope)


class ELU(Module):
    """x where x > 0, else `alpha`·(e^x − 1). `inplace` has no effect."""

    def __init__(self, alpha: float = 1.0, inplace: bool = False) -> None:
        self.alpha, self.inplace = alpha, inplace

    def forward(self, input: Operand) -> Tensor:
        """See `functional.elu`."""
        return F.elu(input, self.alpha)


class GELU(Module):
    """x Φ(x); `approximate` is "none" or "tanh"."""

    def __init__(self, approximate: str = "none") -> None:
        check_approximation("GELU", approximate)
        self.approximate = approximate

    def forward(self, input: Operand) -> Tensor:
        """See `functional.gelu`."""
        return F.gelu(input, self.approximate)


class SiLU(Module):
    """x σ(x). `inplace` has no effect."""

    def __init__(self, inplace: bool = False) -> None:
        self.inplace = inplace

    def forward(self, input: Operand) -> Tensor:
        """See `functional.silu`."""
        return F.silu(input)


class Sigmoid(Module):
    """1/(1 + e^−x)."""

    def forward(self, input: Operand) -> Tensor:
        """See `functional.sigmoid`."""
        return F.sigmoid(input)


class Tanh(Module):
    """Hyperbolic tangent."""

    def forward(self, input: Operand) -> Tensor:
        """See `functional.tanh`."""
        return F.tanh(input)


class Softplus(Module):
    """log(1 + e^(βx))/β."""

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        self.beta, self.threshold = beta, threshold

    def forward(self, input: Operand) -> Tensor:
        """See `functional.softplus`."""
        return F.softplus(input, self.beta, self.threshold)


class Softmax(Module):
    """Softmax along `dim`, which must be given unless x has 1 or 2 axes; then it is the last by default."""

    def __init__(self, dim: int | None = None) -> None:
        self.dim = dim

    def forward(self, input: Operand) -> Tensor:
        """See `functional.softmax`."""
        return F.softmax(input, self.dim)


class LogSoftmax(Module):
    """Logarithm of softmax along `dim`, which must be given unless x has 1 or 2 axes, as for `Softmax`."""

    def __init__(self, dim: int | None = None) -> None:
        self.dim = dim

    def forward(self, input: Operand) -> Tensor:
        """See `functional.log_softmax`."""
        return F.log_softmax(input, self.dim)


class Flatten(Module):
    """Merge the axes from `start_dim` to `end_dim`: `(batch, 1, 28, 28)` becomes `(batch, 784)`."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, input: Operand) -> Tensor:
        """The same values with fewer axes."""
        return as_tensor(input).flatten(self.start_dim, self.end_dim)


class Dropout(Module):
    """Zero each element with probability `p` while training; the identity in `eval()` mode. `inplace` has no effect."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        check_probability("Dropout", p)
        self.p, self.inplace = p, inplace

    def forward(self, input: Operand) -> Tensor:
        """See `functional.dropout`."""
        return F.dropout(input, self.p, self.training)

    def extra_repr(self) -> str:
        """The argument."""
        return f"p={self.p}"


class Identity(Module):
    """The input, unchanged."""

    def forward(self, input: Any) -> Any:
        """The input."""
        return input
