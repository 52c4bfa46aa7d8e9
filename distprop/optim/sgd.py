"""Stochastic gradient descent: the update rule that backpropagation was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distprop.optim.groups import ParameterGroups
from distprop.optim.layout import Chunk
from distprop.optim.optimizer import Optimizer, Schedule


class SGD(Optimizer):
    """w ← w − lr·d, where d is the gradient g + weight_decay·w, with momentum its running sum v.

    v ← momentum·v + (1 − dampening)·g, v = g in the first step; then d = v, or g + momentum·v with `nesterov`. This is
    PyTorch's convention, in which the learning rate is not part of v. `maximize` takes −g for g.

    Sources: Robbins and Monro, 1951; Sutskever et al., 2013 (Nesterov's momentum).
    """

    def __init__(
        self,
        params: ParameterGroups,
        lr: float | Schedule = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("nesterov needs momentum > 0 and dampening = 0")

    def _state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, chunk: Chunk, options: Mapping[str, Any]) -> None:
        w, d = chunk.data, chunk.gradient(options["maximize"])
        _, second = chunk.scratch
        momentum = options["momentum"]
        if momentum:
            v = chunk.state["momentum_buffer"]
            v *= momentum
            if options["step"] > 1 and options["dampening"]:
                v += np.multiply(d, 1 - options["dampening"], out=second)
            else:
                v += d
            d = np.add(np.multiply(v, momentum, out=second), d, out=second) if options["nesterov"] else v
        w -= np.multiply(d, options["lr"], out=second)
