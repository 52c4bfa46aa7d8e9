"""Activation functions: each value with its derivative under it, g being the gradient that arrives from above."""

from __future__ import annotations

import math

import numpy as np

from distprop.allocator import aligned_like
from distprop.functional.check import floating, valid_axis
from distprop.functional.normal import StandardNormal
from distprop.functional.pointwise import pointwise, row_sums, rowwise
from distprop.pieces import CHUNK
from distprop.tape import Array
from distprop.tensor import Operand, Tensor, as_tensor

_GELU_PIECE = CHUNK // 2  # it works with seven arrays more of this size


def relu(input: Operand) -> Tensor:
    """max(x, 0). Derivative: 1 where x > 0, else 0."""
    x = _float("relu", input)
    zero = _ZERO[x.data.dtype.char]

    def derivative(g: Array, x: Array, y: Array, out: Array) -> None:
        np.greater(y, zero, out=out)
        out *= g

    return pointwise(x, lambda x, out: np.maximum(x, zero, out=out), derivative)


def leaky_relu(input: Operand, negative_slope: float = 0.01) -> Tensor:
    """x where x > 0, else a·x, with a = `negative_slope`. Derivative: 1 or a."""
    if negative_slope == 0:
        return relu(input)  # 0 · ∞ would be nan

    def value(x: Array, out: Array) -> None:
        np.multiply(x, negative_slope, out=out)
        (np.maximum if negative_slope <= 1 else np.minimum)(x, out, out=out)

    def derivative(g: Array, x: Array, y: Array, out: Array) -> None:
        positive = _positive(x)
        np.subtract(1, positive, out=out)
        out *= negative_slope
        out += positive
        out *= g

    return pointwise(_float("leaky_relu", input), value, derivative)


def elu(input: Operand, alpha: float = 1.0) -> Tensor:
    """x where x > 0, else α(e^x − 1). Derivative: 1, or α e^x. Source: Clevert et al., 2015."""

    def value(x: Array, out: Array, slope: Array | None) -> None:
        t = np.minimum(x, 0, out=aligned_like(x))
        t *= 0.5
        np.tanh(t, out=t)
        rest = np.subtract(1, t, out=out)
        t /= rest  # (e^x − 1)/2, or 0
        t *= 2 * alpha
        np.maximum(x, 0, out=out)
        out += t
        if slope is not None:
            np.add(t, alpha, out=slope)
            if alpha != 1:
                slope += (1 - alpha) * _positive(x)

    return pointwise(_float("elu", input), value, _times_slope, keep=True)


def gelu(input: Operand, approximate: str = "none") -> Tensor:
    """x Φ(x), Φ being the distribution function of the standard normal. Derivative: Φ(x) + x φ(x).

    With `approximate="tanh"`: x (1 + tanh u)/2, u = √(2/π)(x + 0.044715 x³); derivative
    (1 + tanh u)/2 + x (1 − tanh² u)/2 · u′. Source: Hendrycks and Gimpel, 2016, arXiv:1606.08415.
    """
    x = _float("gelu", input)
    check_approximation("gelu", approximate)
    normal = StandardNormal(min(x.data.size, _GELU_PIECE))

    def value(x: Array, out: Array, slope: Array | None) -> None:
        normal(x, out, slope)
        if slope is not None:
            slope *= x
            slope += out
        out *= x

    scale, cubic = math.sqrt(2 / math.pi), 0.044715

    def tanh_value(x: Array, out: Array, slope: Array | None) -> None:
        squared = x * x
        t = np.tanh(scale * x * (1 + cubic * squared))
        np.multiply(0.5 * x, 1 + t, out=out)
        if slope is not None:
            inner = scale * (1 + 3 * cubic * squared)
            np.multiply(0.5, 1 + t + x * (1 - t * t) * inner, out=slope)

    if approximate == "tanh":
        return pointwise(x, tanh_value, _times_slope, keep=True)
    return pointwise(x, value, _times_slope, keep=True, piece=_GELU_PIECE)


def check_approximation(operation: str, approximate: str) -> None:
    """Raise ValueError unless it is one of GELU's."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f'{operation}: approximate must be "none" or "tanh", got {approximate!r}')


def silu(input: Operand) -> Tensor:
    """x σ(x), also called swish. Derivative: σ(1 + x(1 − σ)) = σ(1 + x − y). Source: Elfwing et al., 2017.

    σ(x) = (1 + tanh(x/2))/2 here, half the time of an exponential; its error is a rounding of 1, as GELU's in PyTorch.
    """

    def value(x: Array, out: Array, slope: Array | None) -> None:
        half = np.multiply(x, 0.5, out=aligned_like(x))
        s = np.tanh(half, out=slope)  # whose memory may not be in the cache: it comes while tanh computes
        s *= 0.5
        s += 0.5
        np.multiply(x, s, out=out)
        if slope is not None:
            rest = np.subtract(x, out, out=half)
            rest += 1
            slope *= rest

    return pointwise(_float("silu", input), value, _times_slope, keep=True)


def sigmoid(input: Operand) -> Tensor:
    """σ(x) = 1/(1 + e^−x). Derivative: σ(1 − σ), at most 1/4: a chain of these makes gradients vanish."""
    return _float("sigmoid", input).sigmoid()


def tanh(input: Operand) -> Tensor:
    """Hyperbolic tangent. Derivative: 1 − tanh²(x)."""
    return pointwise(_float("tanh", input), np.tanh, lambda g, x, y, out: np.multiply(g, 1 - y * y, out=out))


def softplus(input: Operand, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + e^(βx))/β, and x itself where βx > `threshold`. Derivative: σ(βx)."""

    def value(x: Array, out: Array, slope: Array | None) -> None:
        scaled = x if beta == 1 else beta * x
        e = np.abs(scaled, out=np.empty_like(out))
        np.exp(np.negative(e, out=e), out=e)
        if not scaled.max(initial=-np.inf) <= threshold:  # rare, and a boolean factor takes three passes' time
            e *= scaled <= threshold
        (np.maximum if beta > 0 else np.minimum)(x, 0, out=out)  # max(βx, 0)/β
        log1p = log1p_of(e)
        log1p *= 1 / beta
        out += log1p
        if slope is not None:
            np.divide(np.maximum(e, _positive(scaled)), 1 + e, out=slope)

    return pointwise(_float("softplus", input), value, _times_slope, keep=True)


def softmax(input: Operand, dim: int | None = None) -> Tensor:
    """p_i = e^(x_i) / Σ_j e^(x_j) along `dim`. Derivative: p (g − Σ_j g_j p_j).

    Without `dim` it is the last of 1 or 2 axes.

    Raises:
        ValueError: `dim` is left out where there are not 1 or 2 axes; PyTorch takes the first or the second then.
    """

    def value(x: Array, p: Array) -> None:
        largest = x.max(axis=1, keepdims=True)
        if np.abs(largest).max() < 0.1 * np.log(np.finfo(x.dtype).max):  # float32: 8.9; then nothing can overflow
            np.exp(x, out=p)
        else:
            np.exp(np.subtract(x, largest, out=p), out=p)
        p /= row_sums(p)

    def derivative(g: Array, x: Array, p: Array, out: Array) -> None:
        np.subtract(g, np.vecdot(g, p)[:, None], out=out)
        out *= p

    x = _float("softmax", input)
    return rowwise(x, _named_axis("softmax", dim, x.shape), value, derivative)


def log_softmax(input: Operand, dim: int | None = None) -> Tensor:
    """x − log Σ_j e^(x_j) along `dim`. Derivative: g − p Σ_j g_j, p = e/Σ_j e_j being the softmax.

    Without `dim`, as for `softmax`.
    """

    def value(x: Array, out: Array, e: Array | None) -> None:
        np.subtract(x, x.max(axis=1, keepdims=True), out=out)  # so that e^x does not overflow
        out -= np.log(row_sums(np.exp(out, out=e)))

    def derivative(g: Array, e: Array, y: Array, out: Array) -> None:
        np.multiply(e, row_sums(g) / row_sums(e), out=out)
        np.subtract(g, out, out=out)

    x = _float("log_softmax", input)
    return rowwise(x, _named_axis("log_softmax", dim, x.shape), value, derivative, keep=True)


def log1p_of(u: Array) -> Array:
    """log(1 + u) for 0 ≤ u ≤ 1, precise for small u too: the log of 1 + u as rounded, and what rounding took off."""
    w = 1 + u
    u = u - (w - 1)
    u += np.log(w)
    return u


# to find a dtype for the number 0 takes NumPy longer than a small maximum
_ZERO = {char: np.zeros((), char) for char in np.typecodes["Float"]}


def _positive(x: Array) -> Array:
    """1 where x > 0, else 0, in the dtype of x: arithmetic with it takes half the time of that with booleans."""
    return np.asarray(x > 0, x.dtype)


def _times_slope(g: Array, slope: Array, y: Array, out: Array) -> None:
    """The derivative of operations that keep dy/dx: cheaper than computing it again from x."""
    np.multiply(g, slope, out=out)


def _named_axis(operation: str, dim: int | None, shape: tuple[int, ...]) -> int:
    """`dim`, or the last axis where nothing else can be meant."""
    if dim is None and len(shape) not in (1, 2):
        raise ValueError(f"{operation} got x of shape {shape} and no dim; name the axis, such as dim=-1 for the last")
    return valid_axis(operation, -1 if dim is None else dim, shape)


def _float(operation: str, input: Operand) -> Tensor:
    x = as_tensor(input)
    floating(operation, x)
    return x
