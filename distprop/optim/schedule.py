"""Learning rates as functions of the step: `SGD(params, lr=cosine(0.1, steps=1000))`.

A schedule is any callable from the step (0 for the first) to a learning rate, so it has no state to save and is the
same on every rank. Steps, not epochs: an epoch is `len(loader)` steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

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
    max_lr: float, steps: int, rise: float = 0.3, div_factor: float = 25.0, final_div_factor: float = 1e4
) -> Schedule:
    """Up to `max_lr` along half a cosine during the share `rise` of `steps`, then down along another.

    It starts at max_lr/div_factor and ends at that divided by final_div_factor. The momentum stays as it is, where
    PyTorch's moves it the other way, between 0.85 and 0.95, unless it is told `cycle_momentum=False`.
    Source: Smith and Topin, 2017, arXiv:1708.07120 (PyTorch's OneCycleLR).
    """
    _positive(steps=steps)
    if not 0 <= rise <= 1:
        raise ValueError(f"rise is a share of the steps, between 0 and 1; got {rise}")
    first = max_lr / div_factor
    last = first / final_div_factor
    top = rise * steps - 1

    def rate(step: int) -> float:
        if step < top:
            return _half_cosine(first, max_lr, step / top)
        falling = steps - 1 - top
        return _half_cosine(max_lr, last, min(1.0, (step - top) / falling) if falling > 0 else float(step > top))

    return rate


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _positive(**steps: int) -> None:
    for name, value in steps.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
