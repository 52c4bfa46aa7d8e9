"""Activation functions: each value with its derivative under it, g being the gradient that arrives from above."""

from __future__ import annotations

import math

import numpy as np

from distprop.functional.check import floating
from distprop.functional.normal import normal_cdf
from distprop.functional.pointwise import pointwise, rowwise
from distprop.tape import Array
from distprop.tensor import Operand, Tensor, as_tensor, stable_sigmoid


def relu(input: Operand) -> Tensor:
    """max(x, 0). Derivative: 1 where x > 0, else 0."""
    return pointwise(
        _float("relu", input),
        lambda x: np.maximum(x, 0),
        lambda g, x, y: g * (y > 0),
    )


def leaky_relu(input: Operand, negative_slope: float = 0.01) -> Tensor:
    """x where x > 0, else a·x, with a = `negative_slope`. Derivative: 1 or a."""
    return pointwise(
        _float("leaky_relu", input),
        lambda x: np.where(x > 0, x, x * negative_slope),
        lambda g, x, y: np.where(x > 0, g, g * negative_slope),
    )


def elu(input: Operand, alpha: float = 1.0) -> Tensor:
    """x where x > 0, else α(e^x − 1). Derivative: 1, or α e^x. Source: Clevert et al., 2015, arXiv:1511.07289."""
    return pointwise(
        _float("elu", input),
        lambda x: np.maximum(x, 0) + alpha * np.expm1(np.minimum(x, 0)),
        lambda g, x, y: np.where(x > 0, g, g * (y + alpha)),
    )


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
            lambda g, x, y: g * (normal_cdf(x) + x * np.exp(-0.5 * x * x) * density),
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
        soft = (np.maximum(scaled, 0) + np.log1p(np.exp(-np.abs(scaled)))) / beta
        return np.where(scaled > threshold, x, soft)

    def derivative(g: Array, x: Array, y: Array) -> Array:
        scaled = beta * x
        return np.where(scaled > threshold, g, g * stable_sigmoid(scaled))

    return pointwise(_float("softplus", input), value, derivative)


def softmax(input: Operand, dim: int = -1) -> Tensor:
    """p_i = e^(x_i) / Σ_j e^(x_j) along `dim`. Derivative: p (g − Σ_j g_j p_j)."""

    def value(x: Array) -> Array:
        p = np.exp(x - x.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        return p

    def derivative(g: Array, x: Array, p: Array) -> Array:
        return p * (g - np.einsum("ij,ij->i", g, p)[:, None])

    return rowwise(_float("softmax", input), dim, value, derivative)


def log_softmax(input: Operand, dim: int = -1) -> Tensor:
    """x − log Σ_j e^(x_j) along `dim`. Derivative: g − p Σ_j g_j, p being the softmax."""
    return rowwise(
        _float("log_softmax", input),
        dim,
        lambda x: log_softmax_of(x, 1),
        lambda g, x, y: g - np.exp(y) * g.sum(axis=1, keepdims=True),
    )


def log_softmax_of(x: Array, dim: int) -> Array:
    """The value of `log_softmax`, the largest entry subtracted first so that nothing overflows."""
    shifted = x - x.max(axis=dim, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=dim, keepdims=True))
    return shifted


def _float(operation: str, input: Operand) -> Tensor:
    x = as_tensor(input)
    floating(operation, x)
    return x
