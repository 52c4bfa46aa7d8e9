"""Adagrad: a weight that has moved much moves less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from distprop.optim.groups import ParameterGroups
from distprop.optim.layout import Chunk
from distprop.optim.optimizer import Optimizer, Schedule


class Adagrad(Optimizer):
    """w ← w − lrₜ·g / (√s + eps), with the sum of all squares s ← s + g² and lrₜ = lr / (1 + (t − 1)·lr_decay).

    t counts the updates from 1. Weight decay is part of the gradient: g + weight_decay·w.

    Args:
        params: parameters or groups of them.
        lr: a number or a schedule.
        lr_decay: how fast lrₜ falls.
        weight_decay: how much of w is added to the gradient.
        initial_accumulator_value: what s starts with.
        eps: keeps the division finite.
        maximize: take −g for g.

    Source: Duchi, Hazan and Singer, 2011, Journal of Machine Learning Research 12.
    """

    state_names: ClassVar[tuple[str, ...]] = ("sum",)

    def __init__(
        self,
        params: ParameterGroups,
        lr: float | Schedule = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            maximize=maximize,
        )

    def _initial(self, group: Mapping[str, Any], name: str) -> float:
        return float(group["initial_accumulator_value"])

    def _update(self, chunk: Chunk, options: Mapping[str, Any]) -> None:
        w, g, s = chunk.data, chunk.gradient(options["maximize"]), chunk.state["sum"]
        _, second = chunk.scratch
        s += np.multiply(g, g, out=second)
        np.sqrt(s, out=second)
        second += options["eps"]
        np.divide(g, second, out=second)
        second *= options["lr"] / (1 + (options["step"] - 1) * options["lr_decay"])
        w -= second
