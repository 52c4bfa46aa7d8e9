"""Goes through the rules of `verdicts` at each look, and says what is news."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distprop.health import EVERY, is_looked_at
from distprop.look import Look, look_from
from distprop.verdicts import History, judge

WORSE = 10.0  # times, and a thing is said again


@dataclass(frozen=True)
class Verdict:
    """What is wrong, from `step` on. `kind` is a key of RULES; `layer` is "" if it is the whole network."""

    step: int
    kind: str
    layer: str
    text: str

    def line(self) -> dict[str, Any]:
        """For `metrics.jsonl`."""
        return {"step": self.step, "verdict": {"kind": self.kind, "layer": self.layer, "text": self.text}}


class Diagnosis:
    """Goes through RULES at the looks, and says a thing once; again only if it has become ten times worse.

    Rules count looks, so of looks at every step or two only those are judged that would be there by default.
    """

    def __init__(self, clipped: bool = False) -> None:
        self.history = History(clipped=clipped)
        self._said: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what `restore` wants to say the same as if there had been no pause."""
        history = self.history
        plain = {name: getattr(history, name) for name in ("losses", "first_norm", "number")}
        first = history.first_loss if history.number else None
        return {**plain, "first_loss": first, "looks": [look.state() for look in history.looks], "said": self._said}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        first = state["first_loss"]
        self.history = History(
            [look_from(of_one) for of_one in state["looks"]],
            [(at, loss) for at, loss in state["losses"]],
            math.nan if first is None else first,
            state["first_norm"],
            state["number"],
            self.history.clipped,
        )
        self._said = dict(state["said"])

    def add(self, look: Look) -> list[Verdict]:
        """What is news by this look."""
        self.history.add(look, judged := self._is_due(look))
        if not judged:
            return []
        news = []
        for kind, found in judge(self.history).items():
            if found.severity >= WORSE * self._said.get(kind, 0.0):
                self._said[kind] = found.severity
                news.append(Verdict(look.step, kind, found.layer, found.text))
        return news

    def _is_due(self, look: Look) -> bool:
        before = self.history.looks[-1].step if self.history.looks else 0
        failed = not math.isfinite(look.loss)
        return failed or is_looked_at(look.step, EVERY) or look.step >= before + EVERY
