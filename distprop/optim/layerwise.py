"""LARS and LAMB: every layer moves by a set share of its own size, so that very large batches train.

A "layer" is one parameter: a weight and a bias are two. Norms are Euclidean, over the whole parameter, summed in chunks
of one size, so they come out the same on every rank and for every number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from distprop.optim.adam import direction, update_moments
from distprop.optim.groups import ParameterGroups
from distprop.optim.layout import Chunk
from distprop.optim.optimizer import Optimizer, Schedule
from distprop.tape import Array


class LARS(Optimizer):
    """w ← w − v, v ← momentum·v + lr·λ·(g + weight_decay·w), with a rate λ for each layer.

    λ = trust_coefficient·‖w‖ / (‖g‖ + weight_decay·‖w‖ + eps). As in the paper the learning rate is part of v. λ is 1
    where ‖w‖ or ‖g‖ is 0, so that a layer that starts at zero can leave it. Biases and norm parameters are best left
    out: `LARS(decay_groups(model, 1e-4, adapt=False), lr)` gives them λ = 1 and no decay, that is SGD with momentum.

    Args:
        params: parameters or groups of them.
        lr: the global rate, a number or a schedule.
        momentum: of the running sum v.
        weight_decay: how much of w is added to the gradient.
        trust_coefficient: the paper's η, the share of its own norm that a layer moves by at lr 1.
        eps: keeps the division finite; the paper has none.
        adapt: False for λ = 1.

    Source: You, Gitman and Ginsburg, 2017, arXiv:1708.03888. PyTorch has no LARS.
    """

    def __init__(
        self,
        params: ParameterGroups,
        lr: float | Schedule,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        adapt: bool = True,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            eps=eps,
            adapt=adapt,
        )

    def _state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update_stretch(self, chunks: Sequence[Chunk], options: Mapping[str, Any]) -> None:
        rate = options["lr"] * (self._trust(chunks, options) if options["adapt"] else 1)
        for chunk in chunks:
            w = chunk.data
            d = np.multiply(chunk.gradient(), rate, out=chunk.scratch[0])
            if options["momentum"]:
                v = chunk.state["momentum_buffer"]
                v *= options["momentum"]
                v += d
                d = v
            w -= d

    def _trust(self, chunks: Sequence[Chunk], options: Mapping[str, Any]) -> float:
        w_norm = math.sqrt(sum(squared_norm(chunk.data, chunk.scratch[1]) for chunk in chunks))
        g_norm = math.sqrt(sum(squared_norm(chunk.grad, chunk.scratch[1]) for chunk in chunks))
        if not w_norm or not g_norm:
            return 1.0
        decay = chunks[0].segments[0].weight_decay if chunks[0].segments else 0.0
        return float(options["trust_coefficient"] * w_norm / (g_norm + decay * w_norm + options["eps"]))


class LAMB(Optimizer):
    """w ← w − lr·(‖w‖ / ‖u‖)·u, with Adam's direction and decay u = m̂ / (√v̂ + eps) + weight_decay·w.

    m̂ and v̂ are Adam's, with its corrections. The ratio is 1 where either norm is 0, and it has no upper limit: the
    paper's φ is the identity. `LAMB(decay_groups(model, 0.01, adapt=False))` leaves biases and norm parameters at a
    ratio of 1 without decay, that is Adam.

    Args:
        params: parameters or groups of them.
        lr: a number or a schedule.
        betas: β₁ and β₂.
        eps: keeps the division finite.
        weight_decay: how much of w is added to the direction.
        adapt: False for a ratio of 1, which is AdamW.

    Source: You et al., 2019, arXiv:1904.00962, algorithm 2. PyTorch has no LAMB.
    """

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParameterGroups,
        lr: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        adapt: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, adapt=adapt)

    def _update_stretch(self, chunks: Sequence[Chunk], options: Mapping[str, Any]) -> None:
        rate = options["lr"]
        if options["adapt"]:
            rate *= self._ratio(chunks, options)
        for chunk in chunks:
            if not options["adapt"]:
                update_moments(chunk, chunk.grad, options)
            if not options["adapt"] or len(chunks) > 1:  # else it is still in the scratch array
                self._direction(chunk, options)
            w, u = chunk.data, chunk.scratch[0]
            u *= rate
            w -= u

    def _ratio(self, chunks: Sequence[Chunk], options: Mapping[str, Any]) -> float:
        """Update the moments; ‖w‖ / ‖u‖ over all chunks of the layer."""
        w_squared = u_squared = 0.0
        for chunk in chunks:
            update_moments(chunk, chunk.grad, options)
            u_squared += squared_norm(self._direction(chunk, options), chunk.scratch[1])
            w_squared += squared_norm(chunk.data, chunk.scratch[1])
        return math.sqrt(w_squared / u_squared) if w_squared and u_squared else 1.0

    def _direction(self, chunk: Chunk, options: Mapping[str, Any]) -> Array:
        """u, in the first scratch array."""
        u = direction(chunk, chunk.state["exp_avg_sq"], 1.0, options)
        chunk.add_decay()
        return u


def squared_norm(x: Array, scratch: Array) -> float:
    """Σx². Not a BLAS product: its last bits depend on the number of threads."""
    return float(np.multiply(x, x, out=scratch).sum())
