"""Learning rates as functions of the step: `SGD(params, lr=cosine(0.1, steps=1000))`.

A schedule is any callable from the step (0 for the first) to a learning rate, so it has no state to save and is the
same on every rank. Steps, not epochs: an epoch is `len(loader)` steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from distprop.optim.optimizer import Schedule


def constant(lr: float) -> Schedule:
    """lr at every step."""
    return lambda step: lr


def step_decay(lr: float, every: int, gamma: float = 0.1) -> Schedule:
    """lr·gamma^⌊step/every⌋ (PyTorch's StepLR)."""
    _positive(every=every)
    return lambda step: lr * gamma ** (step // every)


def multi_step(lr: float, milestones: Iterable[int], gamma: float = 0.1) -> Schedule:
    """lr·gamma^(milestones passed) (PyTorch's MultiStepLR)."""
    kept = tuple(milestones)
    return lambda step: lr * gamma ** sum(step >= milestone for milestone in kept)


def exponential(lr: float, gamma: float) -> Schedule:
    """lr·gamma^step (PyTorch's ExponentialLR)."""
    return lambda step: lr * gamma**step


def polynomial(lr: float, steps: int, power: float = 1.0) -> Schedule:
    """lr·(1 − step/steps)^power, 0 from `steps` on (PyTorch's PolynomialLR)."""
    _positive(steps=steps)
    return lambda step: lr * (1 - min(step, steps) / steps) ** power


def cosine(lr: float, steps: int, minimum: float = 0.0) -> Schedule:
    """Half a cosine from lr down to `minimum`, which it keeps after `steps`.

    Source: Loshchilov and Hutter, 2016, arXiv:1608.03983 (PyTorch's CosineAnnealingLR).
    """
    _positive(steps=steps)
    return lambda step: minimum + (lr - minimum) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2


def warmup(schedule: Schedule | float, steps: int, start: float = 0.0) -> Schedule:
    """Rise linearly from `start` times the schedule's first rate to that rate over `steps`, then follow the schedule.

    Source: Goyal et al., 2017, arXiv:1706.02677, where it makes large batches train.
    """
    _positive(steps=steps)
    after = schedule if callable(schedule) else constant(schedule)

    def rate(step: int) -> float:
        if step >= steps:
            return after(step - steps)
        return after(0) * (start + (1 - start) * step / steps)

    return rate


def one_cycle(
    max_lr: float,
    steps: int,
    rise: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    three_phase: bool = False,
) -> Schedule:
    """Up to `max_lr` along half a cosine, or a line, during the share `rise` of `steps`, then down along another.

    It starts at max_lr/div_factor and ends at that divided by final_div_factor. With `three_phase` it comes down to
    where it started as fast as it went up, and from there in the rest of the steps to its end. The momentum stays as it
    is, where PyTorch's moves it the other way, between 0.85 and 0.95, unless it is told `cycle_momentum=False`.
    Source: Smith and Topin, 2017, arXiv:1708.07120 (PyTorch's OneCycleLR, whose `pct_start` is `rise`).
    """
    _positive(steps=steps)
    if not 0 <= rise <= (0.5 if three_phase else 1):
        most = "0.5 with three_phase" if three_phase else "1"
        raise ValueError(f"rise is a share of the steps, between 0 and {most}; got {rise}")
    if anneal_strategy not in _ANNEALED:
        raise ValueError(f"anneal_strategy must be one of {', '.join(map(repr, _ANNEALED))}; got {anneal_strategy!r}")
    annealed, first, top = _ANNEALED[anneal_strategy], max_lr / div_factor, rise * steps - 1
    phases = [(top, first, max_lr), *([(2 * top, max_lr, first)] if three_phase else [])]
    phases.append((steps - 1, phases[-1][2], first / final_div_factor))

    def rate(step: int) -> float:
        start = 0.0
        for end, of_start, of_end in phases[:-1]:
            if step < end:
                return annealed(of_start, of_end, (step - start) / (end - start))
            start = end
        end, of_start, of_end = phases[-1]
        share = min(1.0, (step - start) / (end - start)) if end > start else float(step > start)
        return annealed(of_start, of_end, share)

    return rate


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _line(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


_ANNEALED = {"cos": _half_cosine, "linear": _line}


def _positive(**steps: int) -> None:
    for name, value in steps.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
