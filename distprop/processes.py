"""The processes of a job: how it is waited for and asked to stop, and that none of them is left behind."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from types import FrameType

from distprop import hosts as other_hosts
from distprop.hosts.probe import marked
from distprop.stopping import TRAINING, Watch
from distprop.witness import Witness, is_rank

_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL; Open MPI takes 0.3 (5.0) or 1.0 (4.1) to end its ranks, MPICH 0.02
_SAVE_SECONDS = 120.0  # for the end of a step, maybe an evaluation, and a checkpoint
_LOOK_SECONDS = 2.0  # between two looks whether the launcher still has ranks; one takes about 1 ms
_RECORDS_SECONDS = 0.2  # between two looks for ranks that have started; one takes 0.05 ms
_START_SECONDS = 20.0  # in which ranks are looked for as often, for they may end within _LOOK_SECONDS


class Stop:
    """Ends the launcher, gently at the first signal and by force at the next; SIGALRM stands for lost patience."""

    def __init__(self, process: subprocess.Popen[bytes], watch: Watch) -> None:
        self.reason = 0
        self._process = process
        self._watch = watch

    def listen(self) -> dict[int, signal._HANDLER]:
        """Install the handlers and return the previous ones. What was ignored, as under nohup, stays ignored."""
        handlers: dict[int, signal._HANDLER] = dict.fromkeys(
            (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM), self._stop
        )
        handlers |= dict.fromkeys((signal.SIGUSR1, signal.SIGUSR2), self._forward)  # both launchers pass them on
        previous: dict[int, signal._HANDLER] = {}
        for number, handler in handlers.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
        if math.isfinite(self._watch.deadline):
            signal.setitimer(signal.ITIMER_REAL, max(0.001, self._watch.deadline - time.time()))
        return previous

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.reason:
            self._process.kill()
            return
        out_of_time = number == signal.SIGALRM
        self.reason = signal.SIGTERM if out_of_time else number
        self._watch.ended = True
        state = self._watch.state()
        self._watch.asked = bool(state)
        why = "the time set by --max-time is over" if out_of_time else signal.Signals(number).name
        what = "the ranks write a checkpoint and stop; once more ends them at once" if state else "ending all ranks"
        print(f"\ndistprop: {why}; {what}", file=sys.stderr, flush=True)
        if state == TRAINING:  # with SIGTERM, Open MPI's mpirun would give them 0.25 s (5.0)
            self._process.send_signal(signal.SIGUSR1)
        elif not state:
            self._process.terminate()
        signal.setitimer(signal.ITIMER_REAL, _SAVE_SECONDS if state else _GRACE_SECONDS)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._watch.ended |= number == signal.SIGUSR1
        self._process.send_signal(number)


def wait(process: subprocess.Popen[bytes], marker: str, witness: Witness, guard: other_hosts.Guard) -> int:
    """Wait for the launcher; without it once it has outlived its ranks, as Open MPI 5.0's at times does for ever."""
    had_ranks, without, start = False, 0, time.monotonic()
    next_look = start + _LOOK_SECONDS
    patience = _GRACE_SECONDS  # for the launcher to end the job itself
    while True:
        try:
            status = process.wait(_RECORDS_SECONDS)
            return status if patience == _GRACE_SECONDS else 1
        except subprocess.TimeoutExpired:
            witness.look()
            if not had_ranks and time.monotonic() < start + _START_SECONDS:  # others have them all on other hosts
                had_ranks = _has_ranks(marker)
            if time.monotonic() < next_look:
                continue
            next_look = time.monotonic() + _LOOK_SECONDS
            if guard.is_ending():
                patience -= _LOOK_SECONDS
                process.terminate() if patience > 0 else process.kill()
                continue
            witness.count()
            if witness.all_lost:
                _kill_ranks(marker)  # what they have left holds the launcher's pipes open, and it waits for that
            has_ranks = _has_ranks(marker)
            had_ranks |= has_ranks
            without = 0 if has_ranks or not had_ranks else without + 1
            if without == 2:
                print("distprop: all ranks have ended, but not their launcher; killed it", file=sys.stderr, flush=True)
            if without == 2 or witness.deserters:
                process.kill()
                process.wait()
                return 1


def _has_ranks(marker: str) -> bool:
    return any(is_rank(pid) for pid in marked(marker))


def _kill_ranks(marker: str) -> None:
    """And what they have started, but not the launcher."""
    for pid in marked(marker):
        if is_rank(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def tether() -> list[str]:
    """A prefix that asks Linux to send the launcher SIGTERM if this process is killed and cannot do so itself."""
    if sys.platform != "linux":
        return []
    code = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-I", "-S", "-c", code]


def exit_status(returncode: int, vendor: str) -> int:
    """As a shell says it: 128 + n for signal n. Hydra passes on the bare number of the signal that ended a rank."""
    if returncode < 0:
        return 128 - returncode
    fatal = {signal.SIGABRT, signal.SIGBUS, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM}
    return 128 + returncode if vendor not in ("openmpi", "") and returncode in fatal else returncode
