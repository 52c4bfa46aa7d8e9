"""What rank 0 shows of training: a live bar on a terminal, a line an epoch otherwise."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distprop.metrics import StepResult


class Progress:
    """Shows nothing; the base of the two that do."""

    def step(self, result: StepResult) -> None:
        """One update was made."""

    def epoch(self, epoch: int, loss: float, metrics: Mapping[str, float], validation: Mapping[str, float]) -> None:
        """One epoch has ended."""

    def health(self, line: Mapping[str, Any]) -> None:
        """The gradients were looked at; `line` is what `metrics.jsonl` says of it."""

    def verdict(self, text: str) -> None:
        """Something is wrong with the training, in words, and what to do."""

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
        self._rate.add(result)
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
        self._rate.add(result)
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


def _on_terminal() -> bool:
    """Whether a person sees standard output. `distprop run` says so; a rank's own is a pipe or a pseudo-terminal."""
    if said := os.environ.get("DISTPROP_TERMINAL"):
        return said == "1"
    return sys.stdout.isatty() and "OMPI_COMM_WORLD_SIZE" not in os.environ


class _Rate:
    """Samples a second over all steps so far, without evaluation."""

    def __init__(self) -> None:
        self._examples = 0
        self._seconds = 0.0

    def add(self, result: StepResult) -> None:
        self._examples += result.examples
        self._seconds += result.seconds

    def value(self) -> float:
        return self._examples / self._seconds if self._seconds else 0.0


def _epoch_line(epoch: int, loss: float, metrics: Mapping[str, float], validation: Mapping[str, float]) -> str:
    line = f"epoch {epoch + 1}  {_numbers({'loss': loss, **metrics})}"
    return f"{line}  validation {_numbers(validation)}" if validation else line


def _numbers(values: Mapping[str, float]) -> str:
    return "  ".join(
        f"{name} {value:.2%}" if name == "accuracy" else f"{name} {value:.4f}" for name, value in values.items()
    )
