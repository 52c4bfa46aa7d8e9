"""First weights. The wrong scale here is where vanishing and exploding gradients begin: see docs/backprop.md.

Each function fills a parameter, or a part of one such as `bias[4:8]`, or an array, in place and returns it, under
PyTorch's name.
Sources: Glorot and Bengio, 2010 (Xavier); He et al., 2015, arXiv:1502.01852 (Kaiming); LeCun et al., 1998, "Efficient
BackProp" (LeCun); Saxe et al., 2013, arXiv:1312.6120 (orthogonal).
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import numpy as np

from distprop.random import initialiser
from distprop.tape import Array
from distprop.tensor import Tensor

Filled = TypeVar("Filled", bound=Tensor | Array)


def uniform_(parameter: Filled, a: float = 0.0, b: float = 1.0) -> Filled:
    """Uniform on [a, b)."""
    return _fill(parameter, initialiser().uniform(a, b, parameter.shape))


def normal_(parameter: Filled, mean: float = 0.0, std: float = 1.0) -> Filled:
    """Normal with the given mean and standard deviation."""
    return _fill(parameter, initialiser().normal(mean, std, parameter.shape))


def constant_(parameter: Filled, value: float) -> Filled:
    """The same value everywhere."""
    return _fill(parameter, value)


def zeros_(parameter: Filled) -> Filled:
    """Zero everywhere."""
    return constant_(parameter, 0.0)


def ones_(parameter: Filled) -> Filled:
    """One everywhere."""
    return constant_(parameter, 1.0)


def xavier_uniform_(parameter: Filled, gain: float = 1.0) -> Filled:
    """Uniform on ±gain √(6/(fan_in + fan_out)): keeps variances forward and backward, for tanh and sigmoid."""
    bound = gain * math.sqrt(6 / sum(fans(parameter)))
    return uniform_(parameter, -bound, bound)


def xavier_normal_(parameter: Filled, gain: float = 1.0) -> Filled:
    """Normal with standard deviation gain √(2/(fan_in + fan_out))."""
    return normal_(parameter, 0.0, gain * math.sqrt(2 / sum(fans(parameter))))


def kaiming_uniform_(
    parameter: Filled,
    a: float = 0.0,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    nonlinearity: str = "leaky_relu",
) -> Filled:
    """Uniform on ±√3 gain/√fan: keeps variances through rectifiers, which halve them. `a` is the leaky slope."""
    bound = math.sqrt(3) * calculate_gain(nonlinearity, a) / math.sqrt(_fan(parameter, mode))
    return uniform_(parameter, -bound, bound)


def kaiming_normal_(
    parameter: Filled,
    a: float = 0.0,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    nonlinearity: str = "leaky_relu",
) -> Filled:
    """Normal with standard deviation gain/√fan."""
    return normal_(parameter, 0.0, calculate_gain(nonlinearity, a) / math.sqrt(_fan(parameter, mode)))


def lecun_uniform_(parameter: Filled) -> Filled:
    """Uniform on ±√(3/fan_in): keeps variances forward through linear units, and for SELU. Not in PyTorch."""
    bound = math.sqrt(3 / fans(parameter)[0])
    return uniform_(parameter, -bound, bound)


def lecun_normal_(parameter: Filled) -> Filled:
    """Normal with standard deviation 1/√fan_in. Not in PyTorch."""
    return normal_(parameter, 0.0, 1 / math.sqrt(fans(parameter)[0]))


def orthogonal_(parameter: Filled, gain: float = 1.0) -> Filled:
    """gain times a random matrix `(out, in · ...)` whose rows, or columns if they are fewer, are orthonormal.

    All singular values are `gain`, so a deep linear network neither shrinks nor stretches anything. Uniform over all
    such matrices: Q of the decomposition QR of a normal matrix, with signs that make R's diagonal positive.

    Raises:
        ValueError: fewer than two axes, or an empty one.
    """
    if parameter.ndim < 2 or 0 in parameter.shape:
        raise ValueError(f"orthogonal_ needs a weight of two or more axes with entries, got shape {parameter.shape}")
    rows, columns = parameter.shape[0], math.prod(parameter.shape[1:])
    q, r = np.linalg.qr(initialiser().normal(size=(max(rows, columns), min(rows, columns))))
    q *= np.where(np.diag(r) < 0, -1, 1)
    return _fill(parameter, (gain * (q if rows >= columns else q.T)).reshape(parameter.shape))


def calculate_gain(nonlinearity: str, param: float = 0.01) -> float:
    """The factor by which weights must grow to undo what an activation does to the variance (PyTorch's table).

    `param` is leaky ReLU's slope.

    Raises:
        ValueError: an unknown name.
    """
    gains = {
        **dict.fromkeys(("linear", "conv1d", "conv2d", "conv_transpose2d", "sigmoid"), 1.0),
        "tanh": 5 / 3,
        "relu": math.sqrt(2),
        "leaky_relu": math.sqrt(2 / (1 + param**2)),
        "selu": 3 / 4,
    }
    if nonlinearity not in gains:
        raise ValueError(f"no gain is known for {nonlinearity!r}; known: {', '.join(gains)}")
    return gains[nonlinearity]


def fans(parameter: Tensor | Array) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight `(out, in, ...)`: the connections into and out of one unit.

    Raises:
        ValueError: fewer than two axes, such as a bias.
    """
    if parameter.ndim < 2:
        raise ValueError(f"fan_in and fan_out need a weight of two or more axes, got shape {parameter.shape}")
    receptive = int(np.prod(parameter.shape[2:], dtype=np.int64))
    return parameter.shape[1] * receptive, parameter.shape[0] * receptive


def _fan(parameter: Tensor | Array, mode: str) -> int:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f'mode must be "fan_in" or "fan_out", got {mode!r}')
    return fans(parameter)[mode == "fan_out"]


def _fill(parameter: Filled, values: Array | float) -> Filled:
    """Written into the array, not put in its place: a part of a parameter is a view of it."""
    array = parameter.data if isinstance(parameter, Tensor) else parameter
    array[...] = values
    return parameter
