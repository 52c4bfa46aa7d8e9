"""Activation functions: each value with its derivative under it, g being the gradient that arrives from above."""

from __future__ import annotations

import math

import numpy as np

from distprop.functional.check import floating
from distprop.functional.normal import normal_cdf
from distprop.functional.pointwise import pointwise, rowwise
from distprop.tape import Array, Out
from distprop.tensor import Operand, Tensor, as_tensor, record, stable_sigmoid


def relu(input: Operand) -> Tensor:
    """max(x, 0). Derivative: 1 where x > 0, else 0."""
    x = _float("relu", input)
    value = np.maximum(x.data, 0)

    def vjp(grad: Array, out: Out) -> list[Array]:
        return [grad * (value > 0)]

    return record(value, (x,), vjp)


def leaky_relu(input: Operand, negative_slope: float = 0.01) -> Tensor:
    """x where x > 0, else a·x, with a = `negative_slope`. Derivative: 1 or a."""

    def slope(x: Array) -> Array:
        positive = (x > 0).astype(x.dtype)  # np.where takes ten times as long
        return positive + (1 - positive) * negative_slope

    return pointwise(_float("leaky_relu", input), lambda x: x * slope(x), lambda g, x, y: g * slope(x))


def elu(input: Operand, alpha: float = 1.0) -> Tensor:
    """x where x > 0, else α(e^x − 1). Derivative: 1, or α e^x. Source: Clevert et al., 2015, arXiv:1511.07289."""

    def derivative(g: Array, x: Array, y: Array) -> Array:
        positive = (x > 0).astype(x.dtype)
        return g * (positive + (1 - positive) * (np.minimum(y, 0) + alpha))

    return pointwise(_float("elu", input), lambda x: np.maximum(x, 0) + alpha * np.expm1(np.minimum(x, 0)), derivative)


def gelu(input: Operand, approximate: str = "none") -> Tensor:
    """x Φ(x), Φ being the distribution function of the standard normal. Derivative: Φ(x) + x φ(x).

    With `approximate="tanh"`: x (1 + tanh u)/2, u = √(2/π)(x + 0.044715 x³); derivative
    (1 + tanh u)/2 + x (1 − tanh² u)/2 · u′. Source: Hendrycks and Gimpel, 2016, arXiv:1606.08415.
    """
    x = _float("gelu", input)
    if approximate == "none":
        density = 1 / math.sqrt(2 * math.pi)
        return pointwise(
            x,
            lambda x: x * normal_cdf(x),
            lambda g, x, y: g * (normal_cdf(x) + x * density * np.exp(-0.5 * x * x)),
        )
    if approximate != "tanh":
        raise ValueError(f'gelu: approximate must be "none" or "tanh", got {approximate!r}')
    scale, cubic = math.sqrt(2 / math.pi), 0.044715

    def derivative(g: Array, x: Array, y: Array) -> Array:
        squared = x * x
        t = np.tanh(scale * x * (1 + cubic * squared))
        return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (scale * (1 + 3 * cubic * squared)))

    return pointwise(x, lambda x: 0.5 * x * (1 + np.tanh(scale * x * (1 + cubic * (x * x)))), derivative)


def silu(input: Operand) -> Tensor:
    """x σ(x), also called swish. Derivative: σ(1 + x(1 − σ)) = σ + y(1 − σ). Source: Elfwing et al., 2017."""

    def derivative(g: Array, x: Array, y: Array) -> Array:
        s = stable_sigmoid(x)
        return g * (s + y * (1 - s))

    return pointwise(_float("silu", input), lambda x: x * stable_sigmoid(x), derivative)


def sigmoid(input: Operand) -> Tensor:
    """σ(x) = 1/(1 + e^−x). Derivative: σ(1 − σ), at most 1/4: a chain of these makes gradients vanish."""
    return pointwise(_float("sigmoid", input), stable_sigmoid, lambda g, x, y: g * (y * (1 - y)))


def tanh(input: Operand) -> Tensor:
    """Hyperbolic tangent. Derivative: 1 − tanh²(x)."""
    return pointwise(_float("tanh", input), np.tanh, lambda g, x, y: g * (1 - y * y))


def softplus(input: Operand, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + e^(βx))/β, and x itself where βx > `threshold`. Derivative: σ(βx)."""

    def value(x: Array) -> Array:
        scaled = beta * x
        curve = np.log1p(np.exp(-np.abs(scaled)))  # what it is above max(βx, 0)
        curve *= scaled <= threshold
        return np.maximum(x, 0) + curve / beta

    def derivative(g: Array, x: Array, y: Array) -> Array:
        scaled = beta * x
        return g * np.maximum(stable_sigmoid(scaled), scaled > threshold)

    return pointwise(_float("softplus", input), value, derivative)


def softmax(input: Operand, dim: int = -1) -> Tensor:
    """p_i = e^(x_i) / Σ_j e^(x_j) along `dim`. Derivative: p (g − Σ_j g_j p_j)."""

    def value(x: Array) -> Array:
        p = x - x.max(axis=1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=1, keepdims=True)
        return p

    def derivative(g: Array, x: Array, p: Array) -> Array:
        d = g - np.einsum("ij,ij->i", g, p)[:, None]
        d *= p
        return d

    return rowwise(_float("softmax", input), dim, value, derivative)


def log_softmax(input: Operand, dim: int = -1) -> Tensor:
    """x − log Σ_j e^(x_j) along `dim`. Derivative: g − p Σ_j g_j, p being the softmax."""

    def derivative(g: Array, x: Array, y: Array) -> Array:
        p = np.exp(y)
        p *= g.sum(axis=1, keepdims=True)
        return np.subtract(g, p, out=p)

    return rowwise(_float("log_softmax", input), dim, lambda x: log_softmax_of(x, 1), derivative)


def log_softmax_of(x: Array, dim: int) -> Array:
    """The value of `log_softmax`, the largest entry subtracted first so that nothing overflows."""
    shifted = x - x.max(axis=dim, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=dim, keepdims=True))
    return shifted


def _float(operation: str, input: Operand) -> Tensor:
    x = as_tensor(input)
    floating(operation, x)
    return x
