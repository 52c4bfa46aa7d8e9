"""A learning rate that falls when a metric no longer gets better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal


class ReduceOnPlateau:
    """lr ← max(factor·lr, min_lr) once more than `patience` metrics in a row were no better than the best.

    >>> schedule = ReduceOnPlateau(0.1, patience=0, factor=0.5)
    >>> for loss in (1.0, 0.8, 0.8):
    ...     schedule.observe(loss)
    >>> schedule(step=3)
    0.05

    A schedule like the others, `SGD(params, lr=schedule)`, with a memory. Give `observe()` a metric that is the same on
    every rank, such as `trainer.evaluate(...)["loss"]` or a `StepResult`'s, and every rank takes the same decision.

    "Better" is metric < best·(1 − threshold) with mode "min" and threshold_mode "rel", metric < best − threshold with
    "abs"; with mode "max" metric > best·(1 + threshold) and metric > best + threshold. NaN is never better. For
    `cooldown` metrics after a reduction none counts as worse. A reduction by less than `eps` is not made. These are
    PyTorch's conventions (ReduceLROnPlateau), except that `lr` is one number: groups of other rates get an object each.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        lr: float,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        if mode not in ("min", "max") or threshold_mode not in ("rel", "abs"):
            raise ValueError(f"mode is min or max and threshold_mode rel or abs, got {mode!r} and {threshold_mode!r}")
        if not 0 <= factor < 1:
            raise ValueError(f"factor must be at least 0 and less than 1, got {factor}")
        numbers = {"lr": lr, "patience": patience, "threshold": threshold, "cooldown": cooldown, "min_lr": min_lr}
        for name, number in numbers.items():
            if not number >= 0:
                raise ValueError(f"{name} must be 0 or more, got {number}")
        self.lr = lr
        self.mode, self.factor, self.patience, self.threshold = mode, factor, patience, threshold
        self.threshold_mode, self.cooldown, self.min_lr, self.eps = threshold_mode, cooldown, min_lr, eps
        self.best: float | None = None  # JSON has no infinity
        self.bad = 0  # metrics in a row that were no better
        self.resting = 0  # metrics left of the cooldown

    def __call__(self, step: int) -> float:
        """The learning rate now, whatever the step."""
        return self.lr

    def observe(self, metric: float) -> None:
        """Take note of the next value of the metric; perhaps reduce the learning rate."""
        if self._better(metric):
            self.best, self.bad = float(metric), 0
        else:
            self.bad += 1
        if self.resting:
            self.resting -= 1
            self.bad = 0
        if self.bad > self.patience:
            self.resting, self.bad = self.cooldown, 0
            reduced = max(self.lr * self.factor, self.min_lr)
            if self.lr - reduced > self.eps:
                self.lr = reduced

    def state_dict(self) -> dict[str, Any]:
        """What it remembers. `Optimizer.state_dict()` includes it, unless a warm-up is around it."""
        return {"lr": self.lr, "best": self.best, "bad": self.bad, "resting": self.resting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: names are missing or unexpected. Nothing has been changed then.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(f"expected {', '.join(own)}; got {', '.join(map(str, state))}")
        self.lr, self.best, self.bad, self.resting = (state[name] for name in own)

    def _better(self, metric: float) -> bool:
        if math.isnan(metric):
            return False
        if self.best is None:
            return metric < math.inf if self.mode == "min" else metric > -math.inf
        sign = 1 if self.mode == "max" else -1
        relative = self.threshold_mode == "rel"
        bar = self.best * (1 + sign * self.threshold) if relative else self.best + sign * self.threshold
        return sign * metric > sign * bar
