"""What rank 0 shows of training: a line an epoch here, a live view on a terminal in `live`."""

from __future__ import annotations

import time
from collections.abc import Mapping
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


def in_words(values: Mapping[str, float]) -> str:
    """Metrics for people.

    >>> in_words({"loss": 0.12345, "accuracy": 0.9876})
    'loss 0.1235  accuracy 98.76%'
    """
    return "  ".join(
        f"{name} {value:.2%}" if name == "accuracy" else f"{name} {value:.4f}" for name, value in values.items()
    )


def epoch_in_words(epoch: int, loss: float, metrics: Mapping[str, float], validation: Mapping[str, float]) -> str:
    """An epoch's line for people."""
    line = f"epoch {epoch + 1}  {in_words({'loss': loss, **metrics})}"
    return f"{line}  validation {in_words(validation)}" if validation else line
