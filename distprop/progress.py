"""What rank 0 shows of training: a live bar on a terminal, a line an epoch otherwise, and `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO


@dataclass(frozen=True)
class StepResult:
    """What one step did; every number is over the global batch."""

    step: int  # 1 after the first update
    epoch: int  # 0 during the first pass over the data
    loss: float
    metrics: dict[str, float]
    examples: int
    lr: float
    seconds: float


class Progress:
    """Shows nothing; the base of the two that do."""

    def step(self, result: StepResult) -> None:
        """One update was made."""

    def epoch(self, epoch: int, loss: float, metrics: Mapping[str, float], validation: Mapping[str, float]) -> None:
        """One epoch has ended."""

    def close(self) -> None:
        """Training has ended."""


@contextmanager
def show_progress(wanted: bool, total_steps: int) -> Iterator[Progress]:
    """The progress display that suits standard output."""
    progress: Progress = Progress()
    if wanted:
        progress = LiveBar(total_steps) if _on_terminal() else PlainLines()
    try:
        yield progress
    finally:
        progress.close()


class PlainLines(Progress):
    """A line for each epoch, and one every 10 s within a long one."""

    EVERY_SECONDS = 10.0

    def __init__(self) -> None:
        self._rate = _Rate()
        self._shown = time.monotonic()

    def step(self, result: StepResult) -> None:
        """Speak up if the last line was long ago."""
        self._rate.add(result.examples)
        if time.monotonic() - self._shown > self.EVERY_SECONDS:
            self._say(f"step {result.step}  {_numbers({'loss': result.loss, **result.metrics})}")

    def epoch(self, epoch: int, loss: float, metrics: Mapping[str, float], validation: Mapping[str, float]) -> None:
        """The epoch's means."""
        self._say(_epoch_line(epoch, loss, metrics, validation))

    def _say(self, text: str) -> None:
        print(f"{text}  {self._rate.value():,.0f} samples/s", flush=True)
        self._shown = time.monotonic()


class LiveBar(Progress):
    """A bar over all steps with the current numbers; finished epochs scroll by above it."""

    def __init__(self, total_steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            refresh_per_second=5,
            console=Console(force_terminal=True),  # under a launcher it is a pipe to one
        )
        self._task = self._bar.add_task("", total=total_steps, epoch=1, numbers="")
        self._rate = _Rate()
        self._drawn = 0.0
        self._latest: StepResult | None = None
        self._bar.start()

    def step(self, result: StepResult) -> None:
        """Move the bar; the numbers change five times a second at most."""
        self._rate.add(result.examples)
        self._latest = result
        self._bar.advance(self._task)
        if time.monotonic() - self._drawn > 0.2:
            self._show_numbers(result)

    def epoch(self, epoch: int, loss: float, metrics: Mapping[str, float], validation: Mapping[str, float]) -> None:
        """Print the epoch's means above the bar."""
        self._bar.console.print(
            f"{_epoch_line(epoch, loss, metrics, validation)}  {self._rate.value():,.0f} samples/s", highlight=False
        )

    def close(self) -> None:
        """Leave the finished bar, with the last step's numbers, on the screen."""
        if self._latest is not None:
            self._show_numbers(self._latest)
        self._bar.stop()

    def _show_numbers(self, result: StepResult) -> None:
        numbers = f"{_numbers({'loss': result.loss, **result.metrics})}  {self._rate.value():,.0f} samples/s"
        self._bar.update(self._task, epoch=result.epoch + 1, numbers=numbers)
        self._drawn = time.monotonic()


class MetricsFile:
    """`metrics.jsonl` in `run_dir`: one JSON object a line, for every step and every epoch. None writes nothing.

    Lines are flushed once a second, so a reader sees a run that is still going. When the disk is full, standard error
    says so once and training goes on.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self._file: TextIO | None = None
        self._flushed = time.monotonic()
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")

    def write_step(self, result: StepResult) -> None:
        """The numbers of one step."""
        if self._file is not None:
            self.write(
                {"step": result.step, "epoch": result.epoch, "loss": result.loss, **result.metrics}
                | {"lr": result.lr, "examples": result.examples, "seconds": round(result.seconds, 6)}
            )

    def write(self, line: Mapping[str, Any]) -> None:
        """One line; numbers that JSON cannot say become null."""
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            self._file.write(json.dumps(finite) + "\n")
            if time.monotonic() - self._flushed > 1:
                self._file.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            self._give_up(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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


def _on_terminal() -> bool:
    """Whether a person sees standard output. `distprop run` says so; a rank's own is a pipe or a pseudo-terminal."""
    if said := os.environ.get("DISTPROP_TERMINAL"):
        return said == "1"
    return sys.stdout.isatty() and "OMPI_COMM_WORLD_SIZE" not in os.environ


class _Rate:
    """Samples a second since the first call of `value`, or since the one before."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._examples = 0
        self._last = 0.0

    def add(self, examples: int) -> None:
        self._examples += examples

    def value(self) -> float:
        elapsed = time.monotonic() - self._since
        if self._examples and elapsed > (0.05 if self._last else 0):
            self._last = self._examples / elapsed
            self._since, self._examples = time.monotonic(), 0
        return self._last


def _epoch_line(epoch: int, loss: float, metrics: Mapping[str, float], validation: Mapping[str, float]) -> str:
    line = f"epoch {epoch + 1}  {_numbers({'loss': loss, **metrics})}"
    return f"{line}  validation {_numbers(validation)}" if validation else line


def _numbers(values: Mapping[str, float]) -> str:
    return "  ".join(
        f"{name} {value:.2%}" if name == "accuracy" else f"{name} {value:.4f}" for name, value in values.items()
    )
