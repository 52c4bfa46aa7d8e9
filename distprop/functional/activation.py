"""Activation functions: each value with its derivative under it, g being the gradient that arrives from above."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from distprop.functional.check import floating
from distprop.functional.normal import normal_cdf
from distprop.tape import Array, Out
from distprop.tensor import Operand, Tensor, as_tensor, record, stable_sigmoid


def relu(input: Operand) -> Tensor:
    """max(x, 0). Derivative: 1 where x > 0, else 0."""
    x = _float("relu", input)
    value = np.maximum(x.data, 0)
    return _pointwise(x, value, lambda g: g * (value > 0))


def leaky_relu(input: Operand, negative_slope: float = 0.01) -> Tensor:
    """x where x > 0, else a·x, with a = `negative_slope`. Derivative: 1 or a."""
    x = _float("leaky_relu", input)
    slope = np.where(x.data > 0, 1, negative_slope).astype(x.dtype)
    return _pointwise(x, x.data * slope, lambda g: g * slope)


def elu(input: Operand, alpha: float = 1.0) -> Tensor:
    """x where x > 0, else α(e^x − 1). Derivative: 1, or α e^x. Source: Clevert et al., 2015, arXiv:1511.07289."""
    x = _float("elu", input)
    negative = alpha * np.expm1(np.minimum(x.data, 0))
    return _pointwise(
        x, np.where(x.data > 0, x.data, negative), lambda g: g * np.where(x.data > 0, 1, negative + alpha)
    )


def gelu(input: Operand, approximate: str = "none") -> Tensor:
    """x Φ(x), Φ being the distribution function of the standard normal. Derivative: Φ(x) + x φ(x).

    With `approximate="tanh"`: x (1 + tanh u)/2, u = √(2/π)(x + 0.044715 x³); derivative
    (1 + tanh u)/2 + x (1 − tanh² u)/2 · u′. Source: Hendrycks and Gimpel, 2016, arXiv:1606.08415.
    """
    x = _float("gelu", input)
    if approximate == "none":
        phi = normal_cdf(x.data)
        density = 1 / math.sqrt(2 * math.pi)
        return _pointwise(x, x.data * phi, lambda g: g * (phi + x.data * np.exp(-0.5 * x.data * x.data) * density))
    if approximate != "tanh":
        raise ValueError(f'gelu: approximate must be "none" or "tanh", got {approximate!r}')
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    squared = x.data * x.data
    t = np.tanh(scale * x.data * (1 + cubic * squared))

    def derivative(g: Array) -> Array:
        inner = scale * (1 + 3 * cubic * squared)
        return g * (0.5 * (1 + t) + 0.5 * x.data * (1 - t * t) * inner)

    return _pointwise(x, 0.5 * x.data * (1 + t), derivative)


def silu(input: Operand) -> Tensor:
    """x σ(x), also called swish. Derivative: σ(1 + x(1 − σ)). Source: Elfwing et al., 2017, arXiv:1702.03118."""
    x = _float("silu", input)
    s = stable_sigmoid(x.data)
    return _pointwise(x, x.data * s, lambda g: g * (s * (1 + x.data * (1 - s))))


def sigmoid(input: Operand) -> Tensor:
    """σ(x) = 1/(1 + e^−x). Derivative: σ(1 − σ), at most 1/4: a chain of these makes gradients vanish."""
    return _float("sigmoid", input).sigmoid()


def tanh(input: Operand) -> Tensor:
    """Hyperbolic tangent. Derivative: 1 − tanh²(x)."""
    return _float("tanh", input).tanh()


def softplus(input: Operand, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + e^(βx))/β, and x itself where βx > `threshold`. Derivative: σ(βx)."""
    x = _float("softplus", input)
    scaled = beta * x.data
    value = np.where(scaled > threshold, x.data, np.logaddexp(scaled, 0) / beta).astype(x.dtype)
    return _pointwise(x, value, lambda g: g * np.where(scaled > threshold, 1, stable_sigmoid(scaled)))


def softmax(input: Operand, dim: int = -1) -> Tensor:
    """p_i = e^(x_i) / Σ_j e^(x_j) along `dim`. Derivative: p (g − Σ_j g_j p_j)."""
    x = _float("softmax", input)
    p = np.exp(x.data - x.data.max(axis=dim, keepdims=True))
    p /= p.sum(axis=dim, keepdims=True)
    return _pointwise(x, p, lambda g: p * (g - (g * p).sum(axis=dim, keepdims=True)))


def log_softmax(input: Operand, dim: int = -1) -> Tensor:
    """x − log Σ_j e^(x_j) along `dim`. Derivative: g − p Σ_j g_j, p being the softmax."""
    x = _float("log_softmax", input)
    value = log_softmax_of(x.data, dim)
    return _pointwise(x, value, lambda g: g - np.exp(value) * g.sum(axis=dim, keepdims=True))


def log_softmax_of(x: Array, dim: int) -> Array:
    """The value of `log_softmax`, the largest entry subtracted first so that nothing overflows."""
    shifted = x - x.max(axis=dim, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=dim, keepdims=True))
    return shifted


def _float(operation: str, input: Operand) -> Tensor:
    x = as_tensor(input)
    floating(operation, x)
    return x


def _pointwise(x: Tensor, value: Array, derivative: Callable[[Array], Any]) -> Tensor:
    """Record an operation of one input whose value has the input's shape."""

    def vjp(grad: Array, out: Out) -> list[Array]:
        return [derivative(grad)]

    return record(value, (x,), vjp)
