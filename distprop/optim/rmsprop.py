"""RMSprop: each weight's gradient divided by the root of its running mean square."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distprop.optim.groups import ParameterGroups
from distprop.optim.layout import Chunk
from distprop.optim.optimizer import Optimizer, Schedule
from distprop.tape import Array


class RMSprop(Optimizer):
    """w ← w − lr·d, d = g / (√s + eps), with the running mean square s ← alpha·s + (1 − alpha)·g², from zero.

    `centered` divides by the standard deviation instead, √(s − a²) with the running mean a of g; a variance that rounds
    to less than 0 counts as 0 (PyTorch: w becomes NaN). With `momentum`, w moves along b ← momentum·b + d. Weight decay
    is part of the gradient: g + weight_decay·w. As in PyTorch, and unlike TensorFlow, eps stands outside the root and
    the learning rate is not part of b. `maximize` takes −g for g.

    Sources: Tieleman and Hinton, 2012, Coursera: Neural Networks for Machine Learning, lecture 6.5; Graves, 2013,
    arXiv:1308.0850 (centered).
    """

    def __init__(
        self,
        params: ParameterGroups,
        lr: float | Schedule = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            maximize=maximize,
        )

    def _state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        wanted = {"square_avg": True, "grad_avg": group["centered"], "momentum_buffer": group["momentum"]}
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    def _update(self, chunk: Chunk, options: Mapping[str, Any]) -> None:
        w, g = chunk.data, chunk.gradient(options["maximize"])
        _, second = chunk.scratch
        d = np.divide(g, self._scale(chunk, g, options), out=second)
        if options["momentum"]:
            b = chunk.state["momentum_buffer"]
            b *= options["momentum"]
            b += d
            d = b
        w -= np.multiply(d, options["lr"], out=second)

    def _scale(self, chunk: Chunk, g: Array, options: Mapping[str, Any]) -> Array:
        """√s + eps in the second scratch array."""
        s, alpha = chunk.state["square_avg"], options["alpha"]
        _, second = chunk.scratch
        np.multiply(g, g, out=second)
        second *= 1 - alpha
        s *= alpha
        s += second
        if options["centered"]:
            a = chunk.state["grad_avg"]
            a *= alpha
            a += np.multiply(g, 1 - alpha, out=second)
            np.multiply(a, a, out=second)
            np.subtract(s, second, out=second)
            np.maximum(second, 0, out=second)
            np.sqrt(second, out=second)
        else:
            np.sqrt(s, out=second)
        second += options["eps"]
        return second
