"""How steps that are made again compare with what the run has written down of them: parameters and losses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distprop.fingerprint import Record, layer_hashes
from distprop.metrics import StepResult
from distprop.nn.module import Module
from distprop.rundir import Run


class Evidence:
    """Gathers what the ranks tell of each step; `rank` is the one whose losses count, `hashes` the run's, if any."""

    def __init__(self, run: Run, hashes: Record | None, rank: int) -> None:
        self._hashes, self._rank = hashes, rank
        self._exact = bool(run.last_session.get("deterministic"))
        self._losses = {line["step"]: line["loss"] for line in run.steps if line.get("loss") is not None}
        self._apart: dict[int, float] = {}  # by step, in parts of the run's loss
        self._hashed: set[int] = set()
        self._other: list[tuple[int, int, str, bool]] = []  # step, rank, layer, and whether the run's other ranks agree

    def look(self, rank: int, model: Module, result: StepResult) -> None:
        """A rank has made a step."""
        step = result.step
        if rank == self._rank and step in self._losses:
            of_run = self._losses[step]
            self._apart[step] = abs(result.loss - of_run) / (abs(of_run) or 1)
        layers = tuple(model.state_dict())
        if self._hashes is None or step not in self._hashes.steps or self._hashes.layers != layers:
            return
        self._hashed.add(step)
        of_all, mine = self._hashes.steps[step], layer_hashes(model)
        different = mine != of_all.ranks.get(rank, of_all.layers)
        if different.any():
            odd = rank in of_all.ranks and np.array_equal(mine, of_all.layers)
            self._other.append((step, rank, layers[int(np.argmax(different))], odd))

    def lines(self) -> Iterator[str]:
        """What came out, for people."""
        if self._hashed:
            yield f"parameters ({_count(self._hashed)}): {self._of_hashes()}"
        if self._apart:
            worst = max(self._apart, key=lambda step: self._apart[step])
            away = f"up to {self._apart[worst]:.1g} of the loss away from metrics.jsonl, the most at step {worst}"
            what = away if self._apart[worst] else "those of metrics.jsonl, to the bit"
            yield f"losses ({_count(self._apart)}): {what}"
        if not self._hashed and not self._apart:
            yield "nothing is written down of these steps that could be compared"

    def _of_hashes(self) -> str:
        if not self._other:
            return "those of fingerprints.jsonl, to the bit"
        step, rank, layer, odd = min(self._other)
        if odd:
            return (
                f"after step {step} rank {rank} of the run had another {layer}; here it has what the other ranks had. "
                "Nothing that the program computes explains it: suspect the machine, or what is not repeated"
            )
        why = "" if self._exact else "; without deterministic=True, rounding depends on how the ranks' sum is made"
        return f"other bits than in fingerprints.jsonl from step {step} on, layer {layer}, rank {rank}{why}"


def _count(steps: set[int] | dict[int, float]) -> str:
    return f"{len(steps)} step{'s' * (len(steps) > 1)}"
