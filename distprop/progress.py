"""What rank 0 shows of training: a live view on a terminal, a line an epoch otherwise."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from distprop.live import LiveView, Plan, suits
from distprop.metrics import StepResult, epoch_in_words, in_words
from distprop.panel import window_size
from distprop.timeline import Timeline


class Progress(Protocol):
    """What training says of itself; each method may be left out by those who inherit."""

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


class Silence(Progress):
    """Shows nothing."""


@contextmanager
def show_progress(wanted: bool, plan: Plan, timeline: Timeline) -> Iterator[Progress]:
    """The progress display that suits standard output."""
    progress: Progress = Silence()
    if wanted:
        terminal = _terminal()
        progress = PlainLines() if terminal is None else LiveView(plan, timeline, terminal)
    try:
        yield progress
    finally:
        progress.close()


class PlainLines(Progress):
    """A line for each epoch, and one every 10 s within a long one."""

    EVERY_SECONDS = 10.0

    def __init__(self) -> None:
        self._examples, self._seconds = 0, 0.0  # of all steps so far, without evaluation
        self._shown = time.monotonic()

    def step(self, result: StepResult) -> None:
        """Speak up if the last line was long ago."""
        self._examples += result.examples
        self._seconds += result.seconds
        if time.monotonic() - self._shown > self.EVERY_SECONDS:
            self._say(f"step {result.step}  {in_words({'loss': result.loss, **result.metrics})}")

    def epoch(self, epoch: int, loss: float, metrics: Mapping[str, float], validation: Mapping[str, float]) -> None:
        """The epoch's means."""
        self._say(epoch_in_words(epoch, loss, metrics, validation))

    def verdict(self, text: str) -> None:
        """What is wrong, at once."""
        print(f"distprop: {text}", flush=True)

    def _say(self, text: str) -> None:
        rate = self._examples / self._seconds if self._seconds else 0.0
        print(f"{text}  {rate:,.0f} samples/s", flush=True)
        self._shown = time.monotonic()


def _terminal() -> int | None:
    """The descriptor of standard output if a person sees it, in a window with room for the live view.

    `distprop run` says whether there is a terminal; a rank's own output is a pipe or a pseudo-terminal.
    """
    said = os.environ.get("DISTPROP_TERMINAL")
    try:
        descriptor = sys.stdout.fileno()
        seen = said == "1" if said else os.isatty(descriptor) and "OMPI_COMM_WORLD_SIZE" not in os.environ
        if not seen or os.environ.get("TERM") == "dumb" or not sys.stdout.encoding.lower().startswith("utf"):
            return None
        return descriptor if suits(*window_size(descriptor)()) else None
    except (OSError, AttributeError, ValueError):  # something else stands in for standard output
        return None
