"""The live view of training on a terminal: what the training thread notes, and the thread that draws it.

Training only stores numbers; a thread of its own draws them, five times a second at most and for one part in 200 of the
time, so a slow or a stopped terminal holds up nobody.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from distprop.frame import WIDEST, Numbers, Scene, frame
from distprop.metrics import StepResult
from distprop.panel import RESTORE, Panel, window_size
from distprop.progress import PlainLines, Progress, epoch_in_words
from distprop.timeline import Timeline

SECONDS = 0.2  # between two frames, at least
SHARE = 0.005  # of the time may go into drawing
LEAST_COLUMNS, LEAST_ROWS = 40, 10  # of a window; a smaller one gets plain lines
_WINDOW_FRAMES = 50  # the samples a second are those of so many frames
_PATIENCE_SECONDS = 2.0  # for the last frame, on a terminal that takes nothing


@dataclass(frozen=True)
class Plan:
    """What a call of `fit` is going to do: `total` steps, in epochs of `batches`, from `batch` of `epoch` on."""

    total: int
    batches: int
    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class _Sums:
    examples: int = 0
    seconds: float = 0.0  # of steps
    reduction: float = 0.0


@contextmanager
def show_progress(wanted: bool, plan: Plan, timeline: Timeline) -> Iterator[Progress]:
    """The progress display that suits standard output."""
    progress = Progress()
    if wanted:
        terminal = _terminal()
        progress = PlainLines() if terminal is None else LiveView(plan, timeline, terminal)
    try:
        yield progress
    finally:
        progress.close()


class LiveView(Progress):
    """Shows training on the terminal behind `descriptor`."""

    def __init__(self, plan: Plan, timeline: Timeline, descriptor: int) -> None:
        self._plan, self._timeline = plan, timeline
        self._lock = threading.Lock()  # around what both threads touch, never while something is drawn
        self._latest: StepResult | None = None
        self._done = 0
        self._first_ended = 0.0
        self._sums = _Sums()
        self._reduced_before = timeline.total("reduction")
        self._looks: deque[Mapping[str, Any]] = deque(maxlen=WIDEST)  # health lines that have not been read
        self._norms: dict[str, Numbers] = {}
        self._slowest: tuple[int, float] | None = None
        self._verdicts: deque[str] = deque(maxlen=10)
        self._above: deque[str] = deque(maxlen=1000)  # lines that wait to be printed
        self._news = True
        self._frames: deque[_Sums] = deque([_Sums()], maxlen=_WINDOW_FRAMES)
        self._colour = "NO_COLOR" not in os.environ
        self._descriptor = os.dup(descriptor)  # training may close or replace its own
        self._size = window_size(self._descriptor)
        self._size_drawn = (0, 0)
        self._panel = Panel(self._write, self._size)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._draw_until_the_end, name="live view", daemon=True)
        self._thread.start()

    # --- what training says

    def step(self, result: StepResult) -> None:
        """One update was made."""
        with self._lock:
            self._done += 1
            if self._done == 1:
                self._first_ended = time.monotonic()
            self._latest, self._news = result, True
            self._sums = _Sums(
                self._sums.examples + result.examples,
                self._sums.seconds + result.seconds,
                self._timeline.total("reduction") - self._reduced_before,
            )

    def epoch(self, epoch: int, loss: float, metrics: Mapping[str, float], validation: Mapping[str, float]) -> None:
        """One epoch has ended: its line scrolls by above the view."""
        with self._lock:
            rate = _ratio(self._sums.examples, self._sums.seconds) or 0.0
            self._above.append(f"{epoch_in_words(epoch, loss, metrics, validation)}  {rate:,.0f} samples/s")
            self._news = True

    def health(self, line: Mapping[str, Any]) -> None:
        """The gradients were looked at."""
        with self._lock:
            self._looks.append(line)
            self._news = True

    def verdict(self, text: str) -> None:
        """Something is wrong."""
        with self._lock:
            if text in self._verdicts:
                self._verdicts.remove(text)
            self._verdicts.append(text)
            self._news = True

    def close(self) -> None:
        """Leave the last frame on the screen, and the terminal as it was."""
        self._ending.set()
        for _ in range(20):  # parts, for a process that is stopped meanwhile, as by Ctrl-Z, is then late in one of them
            self._thread.join(_PATIENCE_SECONDS / 20)

    # --- the drawing thread

    def _draw_until_the_end(self) -> None:
        pause = 0.0
        try:
            while not self._ending.wait(pause):
                began = time.thread_time()
                self._draw()
                pause = max(SECONDS, (time.thread_time() - began) / SHARE)
            self._panel.close(*self._picture())
        except OSError:
            pass  # nobody watches any more
        except Exception as error:  # a mistake in here is no reason to end training
            with suppress(OSError):
                self._write(RESTORE)
            print(f"distprop: the live view has ended: {error!r}", file=sys.stderr, flush=True)
        finally:
            os.close(self._descriptor)

    def _draw(self) -> None:
        size = self._size()
        if self._news or size != self._size_drawn:
            self._size_drawn = size
            self._panel.show(*self._picture())

    def _picture(self) -> tuple[Any, list[str]]:
        """How to draw what is known now, and the lines to be printed above it."""
        with self._lock:
            self._news = False
            above, looks = list(self._above), list(self._looks)
            self._above.clear()
            self._looks.clear()
            latest, done, sums, verdicts = self._latest, self._done, self._sums, list(self._verdicts)
        for line in looks:
            self._read_health(line)
        scene = self._scene(latest, done, sums, verdicts)
        return (lambda columns, rows: frame(scene, columns, rows, self._colour)), above

    def _read_health(self, line: Mapping[str, Any]) -> None:
        for name, entry in _layers(line.get("health")).items():
            norm = entry.get("grad_norm")
            value = float(norm) if isinstance(norm, int | float) else math.nan
            self._norms[name] = np.append(self._norms.get(name, np.empty(0)), value)[-WIDEST:]
        self._slowest = _slowest(line.get("seconds")) or self._slowest

    def _scene(self, latest: StepResult | None, done: int, now: _Sums, verdicts: Sequence[str]) -> Scene:
        before = self._frames[0]
        self._frames.append(now)
        batches = max(1, self._plan.batches)
        place = self._plan.batch + done  # steps since the beginning of the first epoch
        number = max(0, place - 1) // batches
        return Scene(
            latest=latest,
            epoch=self._plan.epoch + number + 1,
            epochs=self._plan.epoch + max(1, -(-(self._plan.batch + self._plan.total) // batches)),
            batch=place - number * batches,
            batches=batches,
            done=done,
            total=self._plan.total,
            seconds_left=self._seconds_left(done),
            rate=_ratio(now.examples - before.examples, now.seconds - before.seconds) or 0.0,
            communication=_ratio(now.reduction - before.reduction, now.seconds - before.seconds),
            slowest=self._slowest,
            norms=_without_biases(self._norms),
            verdicts=verdicts,
        )

    def _seconds_left(self, done: int) -> float | None:
        """At the speed so far, all that is not a step included; the first one, which is slow, is not counted."""
        if done < 2:
            return None
        return (time.monotonic() - self._first_ended) / (done - 1) * (self._plan.total - done)

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "replace")
        while data:
            data = data[os.write(self._descriptor, data) :]


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
        columns, rows = window_size(descriptor)()
        return descriptor if columns >= LEAST_COLUMNS and rows >= LEAST_ROWS else None
    except (OSError, AttributeError, ValueError):  # something else stands in for standard output
        return None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _layers(health: object) -> dict[str, Mapping[str, Any]]:
    entries = health.items() if isinstance(health, Mapping) else ()
    return {str(name): entry for name, entry in entries if isinstance(entry, Mapping)}


def _without_biases(norms: Mapping[str, Numbers]) -> Mapping[str, Numbers]:
    """The parameters that stand for their layers."""
    weights = {name: values for name, values in norms.items() if not name.rpartition(".")[2].startswith("bias")}
    return weights or norms


def _slowest(seconds: object) -> tuple[int, float] | None:
    """The rank whose own work took longest, and by how much longer than the mean."""
    own = seconds.get("compute") if isinstance(seconds, Mapping) else None
    if not isinstance(own, Sequence) or len(own) < 2:
        return None
    numbers = [float(value) if isinstance(value, int | float) else math.nan for value in own]
    mean = sum(numbers) / len(numbers)
    if not math.isfinite(mean) or mean <= 0:
        return None
    rank = max(range(len(numbers)), key=numbers.__getitem__)
    return rank, numbers[rank] / mean - 1
