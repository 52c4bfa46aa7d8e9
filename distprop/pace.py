"""How fast each rank is by itself: a slow one makes all others wait, and from outside every rank looks equally slow.

A rank's own time is what it spends outside collectives. The ranks compare it when they compare their parameters.
"""

from __future__ import annotations

import time

from distprop.comm.recorder import here

FACTOR = 5.0  # this many times the median of the others is slow,
EXTRA_SECONDS = 0.002  # and by so much a step; what rank 0 does beside training is no reason to speak
WINDOW_SECONDS = 1.0  # shorter stretches are not compared


class Pace:
    """This rank's own seconds a step since the last comparison."""

    def __init__(self) -> None:
        self._suspects: set[int] = set()  # slow in the last comparison
        self._told: set[int] = set()
        self._restart(0)

    def own_seconds(self, steps: int) -> float:
        """A step's own seconds since the comparison before, which was after fewer `steps`; 0 if that is too short."""
        elapsed = time.perf_counter() - self._began
        if elapsed < WINDOW_SECONDS or steps == self._steps:
            return 0.0
        own = max(0.0, elapsed - (here.waited - self._waited)) / (steps - self._steps)
        self._restart(steps)
        return own

    def compare(self, seconds: list[float]) -> list[str]:
        """A line for each rank that has been slow twice in a row, once; `seconds` are all ranks' `own_seconds`."""
        if not all(seconds) or len(seconds) < 2:
            return []
        medians = [_median(seconds[:rank] + seconds[rank + 1 :]) for rank in range(len(seconds))]
        slow = {r for r, own in enumerate(seconds) if own > max(FACTOR * medians[r], medians[r] + EXTRA_SECONDS)}
        news = sorted((slow & self._suspects) - self._told)
        self._suspects = slow
        self._told |= set(news)
        return [
            f"{here.name(rank)} is slow: {seconds[rank] * 1e3:.1f} ms a step of its own, {medians[rank] * 1e3:.1f} ms "
            f"on the others, which wait for it (step {here.step}; said once)"
            for rank in news
        ]

    def _restart(self, steps: int) -> None:
        self._began, self._waited, self._steps = time.perf_counter(), here.waited, steps


def _median(numbers: list[float]) -> float:
    """The lower one of two; `statistics` would be a fifth of the package's import."""
    return sorted(numbers)[(len(numbers) - 1) // 2]
