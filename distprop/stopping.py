"""Stopping early, so that nothing is lost: by a signal, or before the time is over.

A signal handler only sets a flag. The flag travels with the gradients, so all ranks learn of it in the same step; they
write a checkpoint, wait until it is on the disk, and leave with status 75. What the launcher has to know of a run, its
folder and how far its checkpoints are, rank 0 keeps in a small file that the launcher names.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from distprop.comm.base import Communicator, allgather_json

if TYPE_CHECKING:
    from pathlib import Path  # its import takes as long as that of a third of this package

STATUS = 75  # EX_TEMPFAIL of sysexits.h: not done, and starting it again goes on

MAX_TIME = "DISTPROP_MAX_TIME"  # for users: seconds or 1h30m, from the start of the process
DEADLINE = "DISTPROP_DEADLINE"  # from the launcher: the same as seconds since 1970
RESUME = "DISTPROP_RESUME"  # "1": every Trainer with a run_dir resumes, as in a Slurm job that was restarted
REPORT = "DISTPROP_REPORT"  # from the launcher: the file of `Report`

OUT_OF_TIME = "the time is over"
TRAINING, LEAVING = "training", "leaving"  # states of a job

_STARTED = time.time()
DISK_BYTES_PER_SECOND = 50e6  # assumed until a checkpoint has been written; an old disk or a busy network
_LEAVING_SECONDS = 1.0  # for MPI_Finalize and the interpreter; 0.2 to 0.5 s with a core for each rank
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1, "": 1}


class StoppedError(SystemExit):
    """Training ended early because it was asked to; the process leaves with status 75.

    `except Exception` does not catch it, `finally` and `with` work as ever.
    """

    def __init__(self, message: str) -> None:
        super().__init__(STATUS)
        self.message = message


def parse_duration(text: str) -> float:
    """The seconds that `text` says.

    >>> parse_duration("90"), parse_duration("90m"), parse_duration("1h30m"), parse_duration("2.5s")
    (90.0, 5400.0, 5400.0, 2.5)

    Raises:
        ValueError: it is not written like this, is 0, or more than a year, which some timers cannot count.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms]|$)", text.strip())
    units = [unit for _, unit in parts]
    in_order = units == sorted(set(units), key="dhms".find) or units == [""]
    if "".join(number + unit for number, unit in parts) != text.strip() or not in_order:
        raise ValueError(f"a time is written as seconds or as in 1h30m, got {text!r}")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not 0 < seconds <= 365 * _UNITS["d"]:
        raise ValueError(f"a time must be more than 0 and at most 365d, got {text!r}")
    return seconds


def deadline() -> float:
    """When training is to have stopped, in seconds since 1970; infinity if nobody set a limit.

    Raises:
        ValueError: DISTPROP_MAX_TIME is not a time.
    """
    if said := os.environ.get(DEADLINE):
        return float(said)
    if not (said := os.environ.get(MAX_TIME)):
        return math.inf
    try:
        return _STARTED + parse_duration(said)
    except ValueError as error:
        raise ValueError(f"{MAX_TIME}: {error}") from None


def resume_forced() -> bool:
    """Whether this is a restart, by the launcher or by Slurm, in which runs go on whatever the script says.

    Raises:
        ValueError: DISTPROP_RESUME is neither 1 nor 0.
    """
    from distprop import slurm  # its import is for those who train

    said = os.environ.get(RESUME) or "0"
    if said not in ("0", "1"):
        raise ValueError(f"{RESUME}={said}: 1 resumes every run that has a run_dir, 0 leaves it to the script")
    return said == "1" or slurm.restarts() > 0


def stop_message(reasons: Sequence[str], step: int, newest: int | None, run_dir: Path | None) -> str:
    """What rank 0 says at the end: why (by rank, empty for those that were not asked), what is saved, how to go on."""
    who = {reason: [rank for rank, of_rank in enumerate(reasons) if of_rank == reason] for reason in reasons if reason}
    everyone = len(reasons) == 1 or list(who.values()) == [list(range(len(reasons)))]
    why = " and ".join(r if everyone or r == OUT_OF_TIME else f"{r} on rank {', '.join(map(str, who[r]))}" for r in who)
    if run_dir is None:
        saved = "nothing was saved, as the Trainer has no run_dir with checkpoint_every"
    elif newest != step:
        older = f"the newest is that of step {newest}" if newest is not None else "older ones are untouched"
        saved = f"its checkpoint could not be written to {run_dir}; {older}"
    else:
        config = run_dir / "config.toml"
        how = f"distprop train {config} --resume" if config.exists() else "resume=True"
        saved = f"its checkpoint is in {run_dir}; {how} goes on from there"
    return f"{why}: stopped after step {step}; {saved}"


class StopRequest:
    """What this process has been asked to do; `numbers()` is what it tells the other ranks of it in every step."""

    def __init__(self) -> None:
        self.reason = ""
        self.agreed = False  # all ranks know that one of them was asked
        self._save_now = False
        self._deadline = deadline()
        self._looked = math.nan
        self._longest_step = 0.0

    @contextlib.contextmanager
    def listening(self, saves: bool, report: Report) -> Iterator[None]:
        """Inside, SIGTERM and SIGUSR1 stop training at the end of a step, and Ctrl-C too if there are checkpoints.

        A handler of the user's own stays, and so does a signal that is ignored, as SIGHUP under nohup. Only in the main
        thread, as Python has it. The launcher learns by `report` whether a checkpoint comes of it.
        """
        before: dict[signal.Signals, Any] = {}
        self._looked, self.agreed = math.nan, False
        if threading.current_thread() is threading.main_thread():
            for number in self._signals(saves):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    before[number] = signal.signal(number, self._note)
        try:
            report.state(TRAINING if saves else "")
            yield
        finally:
            report.state(LEAVING if self.agreed else "")
            for number, handler in before.items():
                signal.signal(number, handler)

    def numbers(self, is_clock: bool, save_seconds: float) -> tuple[float, float]:
        """(stop, save) as numbers to be summed over the ranks; called once a step.

        The rank that `is_clock` stops when there is no time left for two more steps as long as the longest, epoch ends
        included, and for two checkpoints, each of which takes `save_seconds`.
        """
        now = time.time()
        if is_clock and math.isfinite(self._deadline):
            if math.isfinite(self._looked):
                self._longest_step = max(self._longest_step, now - self._looked)
            self._looked = now
            needed = 2 * self._longest_step + 2 * save_seconds + _LEAVING_SECONDS
            if now + needed >= self._deadline and not self.reason:
                self.reason = OUT_OF_TIME
        save, self._save_now = self._save_now, False
        return float(bool(self.reason)), float(save)

    def agree_at_the_end(self, comm: Communicator) -> None:
        """A signal that came too late for the last step's gradients to tell counts on all ranks. Collective.

        That the time is nearly over does not: there is no step left to stop before.
        """
        asked = self.reason not in ("", OUT_OF_TIME)
        self.agreed |= bool(comm.allreduce(np.array([asked], np.float64))[0])

    def leave(self, comm: Communicator, step: int, newest: int | None, run_dir: Path | None) -> NoReturn:
        """End training after `step`; `newest` is the step of the last checkpoint in `run_dir`, if any. Collective."""
        message = stop_message(allgather_json("the end of a stopped fit()", comm, self.reason), step, newest, run_dir)
        if comm.rank == 0:
            print(f"distprop: {message}", file=sys.stderr, flush=True)
        raise StoppedError(message)

    def _signals(self, saves: bool) -> list[signal.Signals]:
        numbers = [signal.SIGTERM, signal.SIGUSR1]
        if saves and not hasattr(sys, "ps1"):  # at a prompt, Ctrl-C comes back to the prompt
            numbers.append(signal.SIGINT)
        if saves and "OMPI_COMM_WORLD_SIZE" in os.environ:
            numbers.append(signal.SIGCONT)
        return numbers

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGCONT:
            # Open MPI's mpirun sends this 0.25 s (5.0) or 1 s (4.1) before SIGTERM, and SIGKILL as long after that. A
            # checkpoint begun now has twice the time; and if nothing follows, training goes on.
            self._save_now = True
        elif number == signal.SIGINT and self.reason:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        else:
            self.reason = signal.Signals(number).name


class Report:
    """What rank 0 tells the launcher: a small JSON file, replaced as a whole. Without a `path` it tells nothing.

    Keys: `run_dirs` maps each folder to the step of its newest checkpoint, 0 if there is none yet, and `began` to the
    one that the first attempt found; `state` is TRAINING while a checkpoint would be written before stopping, LEAVING
    when that has been done, and otherwise empty.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._lock = threading.Lock()  # checkpoints are written in a thread

    def began(self, run_dir: Path, step: int) -> None:
        """The run in `run_dir` begins at `step`, or 0."""
        self._change(lambda told: told.setdefault("began", {}).setdefault(str(run_dir.resolve()), step))
        self.reached(run_dir, step)

    def reached(self, run_dir: Path, step: int) -> None:
        """The checkpoint of `step` is on the disk."""
        self._change(lambda told: told.setdefault("run_dirs", {}).update({str(run_dir.resolve()): step}))

    def state(self, state: str) -> None:
        """Training begins or ends."""
        self._change(lambda told: told.update(state=state))

    def _change(self, change: Callable[[MutableMapping[str, Any]], object]) -> None:
        if not self._path:
            return
        with self._lock, contextlib.suppress(OSError):  # the launcher may be on another host, or gone
            told = dict(read_report(self._path))
            change(told)
            with open(f"{self._path}.partial", "w", encoding="utf-8") as file:
                json.dump(told, file)
            os.replace(f"{self._path}.partial", self._path)


def read_report(path: str) -> Mapping[str, Any]:
    """What has been told so far; empty if nothing has."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


class Watch:
    """The launcher's side of a job: where the ranks report, how long it may take, and how it was ended."""

    def __init__(self, folder: str | None = None, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self.ended = False  # by a signal to the launcher, or by the deadline
        self.asked = False  # to write a checkpoint and stop, or just doing that
        self._path = os.path.join(folder, "report.json") if folder else ""

    def environment(self) -> dict[str, str]:
        """What the ranks have to know of it."""
        limit = {DEADLINE: f"{self.deadline:.3f}"} if math.isfinite(self.deadline) else {}
        return {REPORT: self._path, **limit} if self._path else limit

    def state(self) -> str:
        """TRAINING if SIGUSR1 makes the ranks write a checkpoint and stop, LEAVING if they have, otherwise empty."""
        return read_report(self._path).get("state", "")

    def run_dirs(self, key: str = "run_dirs") -> dict[str, int]:
        """The step of the newest checkpoint of each run of the job, 0 if there is none yet; or as it `began`."""
        return dict(read_report(self._path).get(key, {}))

    def new_attempt(self) -> None:
        """Forget that training was under way; the runs stay known."""
        Report(self._path).state("")
