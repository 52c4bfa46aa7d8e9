"""The control lane: a few exact numbers that lie behind the gradients and are summed with them.

The number of examples is split in two so that each part stays below 2^24, where float32 still counts in ones. The
schedule, which says where a rank is, goes with its square: n Σs² = (Σs)² only if all n are equal, so every rank sees a
difference, also one whose own number happens to be the mean. It counts as far as the sum of the squares is exact in
float32, and then again from 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from distprop.buffer import LANE_LENGTH
from distprop.tape import Array

_FIXED = ("examples_high", "examples_low", "backwards", "schedule", "schedule_squared", "bad", "verify")
_SPLIT = 4096
_EXACT = 2**24  # up to here float32 counts in ones
MESSAGE_NUMBERS = LANE_LENGTH - len(_FIXED)


class ScheduleError(RuntimeError):
    """The ranks are not at the same step; `culprits` are those that are elsewhere than most."""

    culprits: tuple[int, ...]


@dataclass(frozen=True)
class Received:
    """What a summed lane says."""

    examples: float
    backwards: float  # backward passes of each sender
    bad: float  # senders whose gradients are not finite, or so large that their sum may not be
    verify: float  # senders that want the parameters to be compared
    numbers: dict[str, float]


def write_lane(
    lane: Array,
    examples: float,
    backwards: int,
    reductions: int,
    senders: int,
    numbers: Mapping[str, float],
    *,
    bad: bool = False,
    verify: bool = False,
) -> None:
    """Put the numbers of one of `senders` into `lane`, MESSAGE_NUMBERS `numbers` at most."""
    schedule = (31 * reductions + backwards) % math.isqrt(_EXACT // senders)
    lane[:] = 0
    lane[: len(_FIXED)] = *divmod(examples, _SPLIT), backwards, schedule, schedule**2, bad, verify
    lane[len(_FIXED) : len(_FIXED) + len(numbers)] = list(numbers.values())


def read_lane(lane: Array, senders: int, names: Iterable[str]) -> Received:
    """What the sum over `senders` lanes says.

    `names` are those of the numbers in the order they were written in.

    Raises:
        ScheduleError: the senders were not at the same reduction, or made different numbers of backward passes.
    """
    high, low, backwards, schedules, squares, bad, verify, *numbers = lane.tolist()
    if schedules**2 != squares * senders:
        raise ScheduleError("do all ranks make the same number of steps and of no_sync() passes, of the same models?")
    return Received(high * _SPLIT + low, backwards / senders, bad, verify, dict(zip(names, numbers, strict=False)))
