"""The numbers that come out of training, and the file they are kept in."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TextIO

import numpy as np

from distprop.tape import Array
from distprop.tensor import Tensor

if TYPE_CHECKING:
    from pathlib import Path  # its import takes as long as that of a third of this package

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class StepResult:
    """What one step did; every number is over the global batch."""

    step: int  # 1 after the first update
    epoch: int  # 0 during the first pass over the data
    loss: float
    metrics: dict[str, float]
    examples: int  # to the next whole number, if the Trainer's `examples` gives others
    lr: float
    seconds: float


@dataclass
class EpochResult:
    """One line of `Trainer.fit`'s return value."""

    epoch: int
    loss: float
    metrics: dict[str, float]
    validation: dict[str, float] = field(default_factory=dict)


@dataclass
class EpochSums:
    """What an epoch's steps add up to; part of a checkpoint, so that a resumed epoch has the same means."""

    examples: float = 0
    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def add(self, result: StepResult, examples: float) -> None:
        """Count one step over so many examples."""
        if not examples:
            return
        self.examples += examples
        self.loss += result.loss * examples
        for name, value in result.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value * examples

    def result(self, epoch: int) -> EpochResult:
        """The means over the examples; NaN over none."""
        means = {name: value / self.examples for name, value in self.metrics.items()}
        return EpochResult(epoch, self.loss / self.examples if self.examples else math.nan, means)


@dataclass
class Tally:
    """Sums over examples, to be divided once; `correct` of `labels` are right, where targets are class labels."""

    examples: float = 0.0
    loss: float = 0.0
    correct: int = 0
    labels: int = 0

    def add(self, loss: float, output: Any, target: Array, examples: float) -> None:
        """Count the mean `loss` over `examples`, and right answers; a negative label is none."""
        if not examples:
            return
        self.examples += examples
        self.loss += loss * examples
        if classifies(output, target):
            self.labels += int(np.count_nonzero(target >= 0))
            self.correct += int(np.count_nonzero(output.data.argmax(axis=1) == target))


def classifies(output: Any, target: Array) -> bool:
    """Whether `output` has a score for each class, `(rows, classes, ...)`, and `target` the labels, `(rows, ...)`."""
    if not isinstance(output, Tensor) or target.dtype.kind not in "iu":
        return False
    return output.ndim >= 2 and (output.shape[0], *output.shape[2:]) == target.shape


class MetricsFile:
    """`metrics.jsonl` in `run_dir`: one JSON object a line, for every step and every epoch. None writes no file.

    It is flushed once a second: a reader sees a run that is still going. When the disk is full, standard error says so
    once and training goes on. `logs`, which have methods `log(line)` and `flush()`, get the same lines.
    """

    def __init__(self, run_dir: Path | None, logs: Sequence[Any] = ()) -> None:
        self._file: TextIO | None = None
        self._logs = logs
        self._flushed = time.monotonic()
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = (run_dir / METRICS).open("a", encoding="utf-8")

    def write_step(self, result: StepResult) -> None:
        """The numbers of one step."""
        if self._file is not None or self._logs:
            self.write(
                {"step": result.step, "epoch": result.epoch, "loss": result.loss, **result.metrics}
                | {"lr": result.lr, "examples": result.examples, "seconds": round(result.seconds, 6)}
            )

    def write(self, line: Mapping[str, Any]) -> None:
        """One line; numbers that JSON cannot say become null."""
        for log in self._logs:
            log.log(line)
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            self._file.write(json.dumps(finite) + "\n")
        except OSError as error:
            self._give_up(error)
        if time.monotonic() - self._flushed > 1:
            self.flush()

    def flush(self) -> None:
        """Let readers see everything so far."""
        self._flushed = time.monotonic()
        try:
            if self._file is not None:
                self._file.flush()
        except OSError as error:
            self._give_up(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for log in self._logs:
            log.flush()
        if self._file is not None:
            try:
                self._file.close()
            except OSError as failure:
                self._give_up(failure)

    def _give_up(self, error: OSError) -> None:
        print(f"distprop: no more metrics are written: {error}", file=sys.stderr)
        file, self._file = self._file, None
        with suppress(OSError):
            if file is not None:
                file.close()


def forget_after(run_dir: Path, step: int, name: str = METRICS) -> None:
    """Drop what was written after `step`, by a run that is resumed from there, and a line that was cut off.

    On a full disk it says so, and everything stays.
    """
    path = run_dir / name
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()  # a damaged byte is no line's end
    kept = "".join(f"{line}\n" for line in lines if _step_of(line) <= step)
    replacement = path.with_suffix(".partial")
    try:
        replacement.write_text(kept, encoding="utf-8", errors="surrogateescape")
        os.replace(replacement, path)
    except OSError as error:
        with suppress(OSError):
            replacement.unlink()
        print(f"distprop: lines after step {step} stay in {path}: {error}", file=sys.stderr, flush=True)


def set_aside(run_dir: Path, name: str) -> Path | None:
    """Rename a file that a run which begins again has written before, if there is one; the new path."""
    path = run_dir / name
    if not path.exists() or not path.stat().st_size:
        return None
    names = (path.with_name(f"{path.stem}-before-{number}{path.suffix}") for number in itertools.count(1))
    free = next(other for other in names if not other.exists())
    os.replace(path, free)
    return free


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
