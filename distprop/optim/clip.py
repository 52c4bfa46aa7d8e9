"""Gradient clipping, the remedy for exploding gradients: Pascanu et al., 2013, arXiv:1211.5063.

Call it between `backward()` and `step()`. Under `DataParallel` the gradients are the global mean by then, so every rank
clips by the same factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from distprop.tape import Array
from distprop.tensor import Parameter

_CHUNK = 16384  # numbers squared at once, in the second-level cache
_SMALLEST = 1e-25  # sum of squares, besides which what float32 rounds to zero does not count


def clip_grad_norm_(parameters: Iterable[Parameter] | Parameter, max_norm: float) -> float:
    """Scale all gradients so that their common Euclidean norm is at most `max_norm`; returns the norm before.

    A norm that is not finite leaves the gradients as they are.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be more than 0, got {max_norm}")
    gradients = [parameter.grad for parameter in _several(parameters) if parameter.grad is not None]
    norm = math.sqrt(sum(_squared_norm(gradient) for gradient in gradients))
    if math.isfinite(norm) and norm > max_norm:
        for gradient in gradients:
            gradient *= max_norm / (norm + 1e-6)  # PyTorch's guard against a result just over the limit
    return norm


def clip_grad_value_(parameters: Iterable[Parameter] | Parameter, clip_value: float) -> None:
    """Clip every element of every gradient to ±`clip_value`."""
    if not clip_value > 0:
        raise ValueError(f"clip_value must be more than 0, got {clip_value}")
    for parameter in _several(parameters):
        if parameter.grad is not None:
            np.clip(parameter.grad, -clip_value, clip_value, out=parameter.grad)


def _several(parameters: Iterable[Parameter] | Parameter) -> Iterable[Parameter]:
    return [parameters] if isinstance(parameters, Parameter) else parameters


def _squared_norm(gradient: Array) -> float:
    """Σg². Not a BLAS product: its last bits depend on the number of threads, and then on the rank.

    In float64 if float32 has no room for the squares, of gradients beyond 10¹⁹ or below 10⁻¹⁹, which takes 3 times as
    long.
    """
    total = _sum_of_squares(gradient, np.float32) if gradient.dtype == np.float32 else 0.0
    return total if _SMALLEST < total < math.inf else _sum_of_squares(gradient, np.float64)


def _sum_of_squares(gradient: Array, dtype: type[np.floating]) -> float:
    flat = gradient.reshape(-1)
    scratch = np.empty(min(flat.size, _CHUNK), dtype)
    pieces = (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
    with np.errstate(over="ignore"):
        return sum(float(np.square(piece, out=scratch[: piece.size], dtype=dtype).sum()) for piece in pieces)
