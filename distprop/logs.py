"""What `metrics.jsonl` says, for other programs: every number of a line under one flat name, and a table of all lines.

The names are those of the file: `loss`, `validation_accuracy`, `grad_norm/0.weight`, `epoch_seconds/forward/rank 1`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from distprop.rundir import Run

_PLACE = {"step", "epoch"}  # of a line, not what it says


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a line; NaN where it was not finite, which the file calls null.

    >>> scalars({"step": 3, "epoch": 0, "loss": 0.5, "lr": 0.1})
    {'loss': 0.5, 'lr': 0.1}
    >>> scalars({"step": 3, "health": {"0.weight": {"grad_norm": None}}, "units": {"1": {"kind": "relu", "dead": 0.5}}})
    {'grad_norm/0.weight': nan, 'dead/1': 0.5}
    """
    return dict(_flat(line))


def lines_of(run: Run) -> list[dict[str, Any]]:
    """All lines of a run in the order of their steps."""
    verdicts = [{"step": v["step"], "verdict": v} for v in run.verdicts]
    return sorted([*run.steps, *run.health, *run.epochs, *verdicts], key=lambda line: int(line["step"]))


def write_csv(run: Run, file: TextIO) -> int:
    """A row for each step with everything that was said of it; returns how many.

    A cell is empty where nothing was, and `nan` where a number was not finite. Verdicts are in the last column.
    """
    rows: dict[int, dict[str, object]] = {}
    columns: dict[str, None] = dict.fromkeys(("step", "epoch"))
    for line in lines_of(run):
        row = rows.setdefault(int(line["step"]), {"step": int(line["step"])})
        row.setdefault("epoch", line.get("epoch"))
        numbers = scalars(line)
        columns.update(dict.fromkeys(numbers))
        row.update(numbers)
        if "verdict" in line:
            said = str(line["verdict"].get("text", line["verdict"].get("kind")))
            row["verdict"] = f"{row['verdict']}; {said}" if "verdict" in row else said
    table = csv.DictWriter(file, [*columns, "verdict"], restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows.values())
    return len(rows)


def _flat(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    of_epoch = "epoch_loss" in line
    for key, value in line.items():
        if key in _PLACE or key == "verdict":
            continue
        if key in ("health", "units"):
            for name, entry in _entries(value):
                yield from ((f"{k}/{name}", number) for k, v in _entries(entry) for number in _number(v))
        elif isinstance(value, Mapping):  # seconds, by phase and rank
            prefix = f"{'epoch' if of_epoch else 'step'}_{key}"
            for phase, by_rank in _entries(value):
                ranks = by_rank if isinstance(by_rank, list) else [by_rank]
                names = [f"/rank {rank}" for rank in range(len(ranks))] if isinstance(by_rank, list) else [""]
                for rank, v in zip(names, ranks, strict=True):
                    yield from ((f"{prefix}/{phase}{rank}", number) for number in _number(v))
        else:
            whole = of_epoch and key != "epoch_loss" and not key.startswith("validation_")
            yield from ((f"epoch_{key}" if whole else key, number) for number in _number(value))


def _entries(value: object) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _number(value: object) -> list[float]:
    """The number in a list, or an empty one if it is none."""
    if value is None:
        return [math.nan]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []
