"""A run's folder: who ran it on what (`run.json`), and everything in it as one object for whoever reads it.

Reading never fails on what a run that is still going, or was killed, leaves behind: a line that was cut off, an epoch
without an end. It refuses what a newer version wrote.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distprop.comm.base import Communicator, allgather_json
from distprop.environment import environment, program
from distprop.metrics import METRICS

if TYPE_CHECKING:
    from pathlib import Path  # its import takes as long as that of a third of this package

RUN = "run.json"
FORMAT = 1  # of run.json; a newer one is refused
SILENT_SECONDS = 60.0  # without a word, and without an end, a run counts as dead


class RunDirError(ValueError):
    """A folder that is not that of a run, or of a newer version's; says what to do."""


@contextmanager
def session(run_dir: Path | None, comm: Communicator, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A call of `fit`: its ranks, hosts, settings and environment, and how it ended, go into `run.json`. Collective.

    A run that is resumed, perhaps on another number of ranks, has one entry for each call. Whoever stops it early puts
    "stopped" into what this yields. Without a `run_dir` it does nothing.
    """
    entry: dict[str, Any] = {}
    if run_dir is None:
        yield entry
        return
    hosts = allgather_json("fit() with a run_dir", comm, os.uname().nodename)
    if comm.rank:
        yield entry
        return
    earlier: list[dict[str, Any]] = []
    with suppress(RunDirError):
        earlier = read_sessions(run_dir)
    entry |= {"began": _now(), "ranks": comm.size, "hosts": hosts, **settings}
    entry |= {"program": program(), "environment": environment()}
    _write(run_dir, [*earlier, entry])
    try:
        yield entry
    except BaseException as error:
        text = ": ".join(filter(None, (type(error).__name__, str(error))))  # of a Ctrl-C there is nothing but the name
        _write(run_dir, [*earlier, {**entry, "ended": _now(), "error": text}])
        raise
    _write(run_dir, [*earlier, {**entry, "ended": _now()}])


@dataclass
class Run:
    """What a run's folder says. Lines are those of `metrics.jsonl`, of the last run if several wrote there.

    Attributes:
        path: the folder.
        sessions: one for each call of `fit`; see `session`.
        config: the flat `config.toml` of `distprop train`, such as {"optim.lr": 0.1}.
        steps: a line for each step, with "step", "epoch", "loss", "lr", "examples", "seconds" and metrics.
        epochs: a line for each epoch, with "epoch_loss", "validation_loss", and "seconds" of each phase by rank.
        health: lines with "health" of each parameter, "units" and "noise_scale".
        verdicts: {"step", "kind", "layer", "text"}.
        remarks: what is odd about the folder, for people.
        silent_seconds: since the last line was written.
    """

    path: Path
    sessions: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    health: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    silent_seconds: float = 0.0

    @property
    def last_session(self) -> dict[str, Any]:
        """The last call of `fit`; empty if none is noted."""
        return self.sessions[-1] if self.sessions else {}

    @property
    def state(self) -> str:
        """One of "finished", "stopped" (early), "going", "failed" (an exception) and "died" (no word and no end)."""
        last = self.last_session
        if "error" in last:
            return "failed"
        if "ended" in last:
            return "stopped" if last.get("stopped") else "finished"
        pause = max((line["seconds"] for line in self.steps[-20:] if _is_number(line.get("seconds"))), default=0)
        return "going" if self.silent_seconds < max(SILENT_SECONDS, 20 * pause) else "died"


def read_run(path: Path) -> Run:
    """Everything that the folder of a run says.

    Raises:
        RunDirError: there is no such folder, no `metrics.jsonl` in it, or a newer version wrote it.
    """
    if not path.is_dir():
        raise RunDirError(f"there is no folder {path}")
    run = Run(path, read_sessions(path))
    metrics = path / METRICS
    if not metrics.exists():
        raise RunDirError(f"{path} has no {METRICS}; it is written by distprop train and by Trainer(run_dir=...)")
    try:
        content = metrics.read_bytes()
        run.silent_seconds = max(0.0, time.time() - metrics.stat().st_mtime)
    except OSError as error:
        raise RunDirError(f"{metrics} cannot be read: {error.strerror}") from error
    _sort_lines(run, content)
    run.config = _read_config(path / "config.toml", run.remarks)
    return run


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """What `run.json` says; nothing if there is none.

    Raises:
        RunDirError: it is damaged, or a newer version wrote it.
    """
    try:
        tree = json.loads((path / RUN).read_bytes())
        number, sessions = tree["format"], tree["sessions"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirError(f"{path / RUN} is not what a run writes: {error!r}") from error
    if not isinstance(number, int) or number > FORMAT:
        raise RunDirError(
            f"{path / RUN} has format {number}; this version of distprop reads format {FORMAT}. A newer version wrote "
            "it: upgrade distprop to read it"
        )
    if not isinstance(sessions, list) or not all(isinstance(entry, dict) for entry in sessions):
        raise RunDirError(f"{path / RUN} is not what a run writes: its sessions are no list of objects")
    return sessions


def session_at(sessions: list[dict[str, Any]], step: int) -> dict[str, Any] | None:
    """The call of `fit` that made update number `step`, the last one if there were several."""
    return next((entry for entry in reversed(sessions) if entry.get("from_step", 0) < step), None)


def _sort_lines(run: Run, content: bytes) -> None:
    lines = content.split(b"\n")
    damaged = 0
    for number, text in enumerate(lines):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, KeyError, TypeError):
            damaged += number < len(lines) - 1  # the last one may be half written
            continue
        if "verdict" in line and isinstance(line["verdict"], dict):
            run.verdicts.append({"step": step, **line["verdict"]})
        elif "health" in line and isinstance(line["health"], dict):
            run.health.append(line)
        elif "epoch_loss" in line:
            run.epochs.append(line)
        elif "loss" in line:
            if run.steps and step <= run.steps[-1]["step"]:
                run.steps, run.epochs, run.health, run.verdicts = [], [], [], []
                run.remarks.append(f"an earlier run wrote into the same {METRICS}; only the last one is shown")
            run.steps.append(line)
    if damaged:
        they, are = ("lines", "are") if damaged > 1 else ("line", "is")
        run.remarks.append(f"{damaged} {they} of {METRICS} cannot be read and {are} left out")


def _read_config(path: Path, remarks: list[str]) -> dict[str, Any]:
    import tomllib

    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        remarks.append(f"{path.name} cannot be read: {error}")
        return {}
    return {
        f"{section}.{key}": value
        for section, values in tree.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _now() -> str:
    import datetime

    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _write(run_dir: Path, sessions: list[dict[str, Any]]) -> None:
    partial = run_dir / f".{RUN}.partial"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"format": FORMAT, "sessions": sessions}, indent=1), encoding="utf-8")
        os.replace(partial, run_dir / RUN)
    except OSError as error:
        print(f"distprop: {run_dir / RUN} could not be written: {error}", file=sys.stderr)
