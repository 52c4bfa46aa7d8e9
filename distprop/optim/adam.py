"""Adam and AdamW: steps of about the learning rate for each weight, whatever the size of its gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from distprop.optim.groups import ParameterGroups
from distprop.optim.layout import Chunk
from distprop.optim.optimizer import Optimizer, Schedule
from distprop.tape import Array


class Adam(Optimizer):
    """w ← w − lr·m̂ / (√v̂ + eps), with running means m of the gradient and v of its square.

    m ← β₁·m + (1 − β₁)·g and v ← β₂·v + (1 − β₂)·g², from zero; m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ) undo that
    start at the t-th update. Weight decay is part of the gradient: g + weight_decay·w. As in PyTorch, and unlike Keras,
    eps is added after the correction of v.

    Args:
        params: parameters or groups of them.
        lr: a number or a schedule.
        betas: β₁ and β₂.
        eps: keeps the division finite.
        weight_decay: how much of w is added to the gradient.
        amsgrad: divide by the largest v so far, which repairs the proof of convergence.
        maximize: take −g for g.

    Sources: Kingma and Ba, 2014, arXiv:1412.6980; Reddi et al., 2018, arXiv:1904.09237 (amsgrad).
    """

    def __init__(
        self,
        params: ParameterGroups,
        lr: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize
        )

    def _state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _update(self, chunk: Chunk, options: Mapping[str, Any]) -> None:
        self._descend(chunk, chunk.gradient(options["maximize"]), options)

    def _descend(self, chunk: Chunk, g: Array, options: Mapping[str, Any]) -> None:
        update_moments(chunk, g, options)
        v = chunk.state["exp_avg_sq"]
        if options["amsgrad"]:
            v = np.maximum(chunk.state["max_exp_avg_sq"], v, out=chunk.state["max_exp_avg_sq"])
        w = chunk.data
        w -= direction(chunk, v, options["lr"], options)


class AdamW(Adam):
    """Adam whose weight decay does not pass through the gradient: first w ← w − lr·weight_decay·w, then Adam's step.

    In Adam a decay in the gradient is divided by √v̂ like everything else, so the weights with large gradients decay
    least. As in PyTorch the decay is multiplied with the learning rate.

    Source: Loshchilov and Hutter, 2017, arXiv:1711.05101.
    """

    def __init__(
        self,
        params: ParameterGroups,
        lr: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)

    def _update(self, chunk: Chunk, options: Mapping[str, Any]) -> None:
        chunk.shrink(options["lr"])
        self._descend(chunk, chunk.signed(options["maximize"]), options)


def update_moments(chunk: Chunk, g: Array, options: Mapping[str, Any]) -> None:
    """m ← β₁·m + (1 − β₁)·g and v ← β₂·v + (1 − β₂)·g²; g may lie in the first scratch array."""
    m, v = chunk.state["exp_avg"], chunk.state["exp_avg_sq"]
    _, second = chunk.scratch
    beta1, beta2 = options["betas"]
    m *= beta1
    m += np.multiply(g, 1 - beta1, out=second)
    np.multiply(g, g, out=second)
    second *= 1 - beta2
    v *= beta2
    v += second


def direction(chunk: Chunk, v: Array, scale: float, options: Mapping[str, Any]) -> Array:
    """scale·m̂ / (√v̂ + eps), in the first scratch array.

    With c = √(1 − β₂ᵗ) this is (scale·c / (1 − β₁ᵗ)) · m / (√v + eps·c), which saves a pass.
    """
    beta1, beta2 = options["betas"]
    c = math.sqrt(1 - beta2 ** options["step"])
    first, _ = chunk.scratch
    np.sqrt(v, out=first)
    first += options["eps"] * c
    np.divide(chunk.state["exp_avg"], first, out=first)
    first *= scale * c / (1 - beta1 ** options["step"])
    return first
