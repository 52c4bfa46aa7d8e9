"""TensorBoard event files: while a run is going, as a callback, or afterwards, from its `metrics.jsonl`.

Needs `tensorboardX`, which writes the files without TensorFlow; TensorBoard itself only to look at them.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distprop.logs import lines_of, scalars
from distprop.rundir import Run, RunDirError

if TYPE_CHECKING:
    from distprop.metrics import StepResult

FLUSH_SECONDS = 2.0


class TensorBoard:
    """A callback that writes every number of `metrics.jsonl` into `folder`, on rank 0: `callbacks=[TensorBoard(...)]`.

    The tags are the names of `distprop.logs`, such as `loss`, `validation_accuracy` and `grad_norm/0.weight`. It needs
    no `run_dir`.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        _require()
        self._folder = str(folder)
        self._writer: Any = None  # opened by the first line, so on rank 0 alone
        self._flushed = time.monotonic()

    def __call__(self, result: StepResult) -> None:
        """It never stops training."""

    def log(self, line: Mapping[str, Any], wall_time: float | None = None) -> None:
        """Write one line of `metrics.jsonl`."""
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        said = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(line).items()])
        if isinstance(verdict := line.get("verdict"), Mapping):
            said = summary.text("verdict", str(verdict.get("text", verdict.get("kind"))))
        self._write(Event(step=line["step"], wall_time=wall_time or time.time(), summary=said))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Let TensorBoard see everything so far."""
        self._flushed = time.monotonic()
        if self._writer is not None:
            self._writer.flush()

    def _write(self, event: Any) -> None:
        if self._writer is None:
            from tensorboardX.event_file_writer import EventsWriter

            # Not SummaryWriter: it sends each number through a queue to a thread, and its flush() leaves some there.
            os.makedirs(self._folder, exist_ok=True)
            self._writer = EventsWriter(os.path.join(self._folder, "events"))
            weakref.finalize(self, self._writer.close)  # a further call of fit goes on with the file
        self._writer.write_event(event)


def export(run: Run, folder: Path) -> int:
    """Write a run into a new event file in `folder`; returns how many lines it had.

    Raises:
        ImportError: tensorboardX is not installed.
        RunDirError: the folder has event files, whose points would be shown together with these.
    """
    board = TensorBoard(folder)
    if folder.is_dir() and any(folder.glob("events.out.tfevents.*")):
        raise RunDirError(f"{folder} has event files of TensorBoard already; give a new folder, or remove them")
    lines, times = lines_of(run), _times(run)
    for line in lines:
        board.log(line, times.get(int(line["step"])))
    board.flush()
    return len(lines)


def _times(run: Run) -> dict[int, float]:
    """About when each step ended: the beginning of its call of `fit`, and the seconds of the steps since then."""
    starts = {int(s.get("from_step", 0)): str(s.get("began")) for s in run.sessions}
    now, times, previous = time.time(), {}, 0
    for line in run.steps:
        began = [text for step, text in starts.items() if previous <= step < line["step"]] or [""]
        with contextlib.suppress(ValueError):  # the same call, or a run from before run.json
            now = datetime.datetime.fromisoformat(began[-1]).timestamp()
        seconds = line.get("seconds")
        now += seconds if isinstance(seconds, int | float) else 0.0
        times[int(line["step"])], previous = now, line["step"]
    return times


def _require() -> None:
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'TensorBoard event files need tensorboardX: pip install "distprop[tensorboard]"', name="tensorboardX"
        ) from error
