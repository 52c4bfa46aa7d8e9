"""Gradient clipping, the remedy for exploding gradients: Pascanu et al., 2013, arXiv:1211.5063.

Call it between `backward()` and `step()`. Under `DataParallel` the gradients are the global mean by then, so every rank
clips by the same factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from distprop.optim.groups import checked_parameters
from distprop.tape import Array
from distprop.tensor import Tensor

_CHUNK = 16384  # numbers squared at once, in the second-level cache
_SMALLEST = 1e-25  # sum of squares, besides which what float32 rounds to zero does not count


def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> float:
    """Scale all gradients so that their common norm is at most `max_norm`; returns the norm before.

    The norm is (Σ|g|^p)^(1/p) with p = `norm_type`: 2 is Euclid's, infinity the largest |g|. One that is not finite
    leaves the gradients as they are.

    Raises:
        ValueError: `max_norm` is negative, or `norm_type` not more than 0.
        TypeError: something is no parameter, such as a module.
        RuntimeError: with `error_if_nonfinite`, the norm is NaN or infinite.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be 0 or more, got {max_norm}")
    if not float(norm_type) > 0:
        raise ValueError(f"norm_type must be more than 0, got {norm_type}")
    gradients = [
        parameter.grad for parameter in checked_parameters(parameters, "clipping", Tensor) if parameter.grad is not None
    ]
    norm = _norm(gradients, float(norm_type))
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(
            f"the norm of the gradients is {norm}, so they cannot be clipped; they are as they were. "
            "error_if_nonfinite=False lets this pass"
        )
    if math.isfinite(norm) and norm > max_norm:
        for gradient in gradients:
            gradient *= max_norm / (norm + 1e-6)  # PyTorch's guard against a result just over the limit
    return norm


def clip_grad_value_(parameters: Iterable[Tensor] | Tensor, clip_value: float) -> None:
    """Clip every element of every gradient to ±`clip_value`."""
    if not clip_value >= 0:
        raise ValueError(f"clip_value must be 0 or more, got {clip_value}")
    for parameter in checked_parameters(parameters, "clipping", Tensor):
        if parameter.grad is not None:
            np.clip(parameter.grad, -clip_value, clip_value, out=parameter.grad)


def _norm(gradients: Sequence[Array], p: float) -> float:
    """(Σ|g|^p)^(1/p) over all gradients; for p other than 2 of g over the largest |g|, so that no power overflows."""
    if p == 2:
        return math.sqrt(sum(_squared_norm(gradient) for gradient in gradients))
    ends = [end for gradient in gradients if gradient.size for end in (-gradient.min(), gradient.max())]
    largest = float(np.max(ends, initial=0.0))  # NaN if there is one
    if p == math.inf or largest == 0 or not math.isfinite(largest):
        return largest
    total = sum(_sum_of_powers(gradient, largest, p) for gradient in gradients)
    with np.errstate(over="ignore"):
        return largest * float(np.float64(total) ** (1 / p))


def _sum_of_powers(gradient: Array, largest: float, p: float) -> float:
    """Σ(|g|/largest)^p."""
    total = 0.0
    for piece in _pieces(gradient):
        ratios = np.abs(piece, dtype=np.float64)
        ratios /= largest
        total += float((ratios if p == 1 else ratios**p).sum())
    return total


def _squared_norm(gradient: Array) -> float:
    """Σg². Not a BLAS product: its last bits depend on the number of threads, and then on the rank.

    In float64 if float32 has no room for the squares, of gradients beyond 10¹⁹ or below 10⁻¹⁹, which takes 3 times as
    long.
    """
    total = _sum_of_squares(gradient, np.float32) if gradient.dtype == np.float32 else 0.0
    return total if _SMALLEST < total < math.inf else _sum_of_squares(gradient, np.float64)


def _sum_of_squares(gradient: Array, dtype: type[np.floating]) -> float:
    scratch = np.empty(min(gradient.size, _CHUNK), dtype)
    with np.errstate(over="ignore"):
        return sum(float(np.square(piece, out=scratch[: piece.size], dtype=dtype).sum()) for piece in _pieces(gradient))


def _pieces(gradient: Array) -> Iterator[Array]:
    flat = gradient.reshape(-1)
    return (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
