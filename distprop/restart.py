"""A job that fails is started again from its last checkpoint, as long as each attempt gets further.

What an attempt has reached is known from the report that rank 0 keeps for the launcher (`distprop.stopping`). Batches
are global and checkpoints belong to no rank, so a restart may have fewer ranks.
"""

from __future__ import annotations

import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

from distprop.hosts import HostsError
from distprop.launch import Job, run
from distprop.launcher import LaunchError
from distprop.stopping import RESUME, STATUS, Watch

REFUSED = 2  # the exit status of a mistake in the command or the configuration
_LONGEST_PAUSE = 30.0  # seconds


@dataclass(frozen=True)
class Attempt:
    """What the next start of a job is to be like."""

    ranks: int
    hosts: Mapping[str, int]  # slots by host; empty for this host alone
    run_dirs: Mapping[str, int]  # what there is to resume, with the steps of the newest checkpoints


def run_restarting(
    job: Job,
    plan: Callable[[Attempt], Job],
    *,
    max_restarts: int = 0,
    max_time: float = math.inf,
    hosts: Mapping[str, int] | None = None,
    answers: Callable[[str], bool] = lambda host: True,
    stopped: Callable[[bool], object] | None = None,
) -> int:
    """Run `job`, and what `plan` says after a failure, up to `max_restarts` times; returns the last exit status.

    A failure is any exit status but 0, 2 (a mistake that would be there again) and 75 (stopped early). A job that was
    ended by a signal to this process is not restarted. Nor is one after `max_time` seconds, restarts included; its
    ranks stop in time to write a checkpoint before. Before each restart `answers(host)` tells which hosts are left.
    Two attempts in a row that end without a newer checkpoint are the last.

    At the end of a job that has stopped early, `stopped(advanced)` is called: whether any of its runs has a later
    checkpoint than it began with.
    """
    deadline, wanted = time.time() + max_time, job.ranks
    if job.launcher is None and not max_restarts and not stopped:
        return run(job, Watch(None, deadline))  # it takes this process's place
    with tempfile.TemporaryDirectory(prefix="distprop-") as folder:
        watch = Watch(folder, deadline)
        attempt, fruitless = Attempt(job.ranks, hosts or {}, {}), 0
        for number in range(1, max_restarts + 2):
            status = run(job, watch, supervise=True)
            if status in (0, REFUSED, STATUS) or watch.ended or not max_restarts:
                break
            before = {**watch.run_dirs("began"), **attempt.run_dirs}
            reached = {run_dir: max(step, before[run_dir]) for run_dir, step in watch.run_dirs().items()}
            fruitless = fruitless + 1 if reached == before else 0
            failure = f"{describe(status)} {how_far(reached)}"
            pause = min(2.0 ** min(number - 1, 9), _LONGEST_PAUSE)  # of the exponent, since 2.0**1024 is an error
            try:
                _check_sense(fruitless, number, max_restarts, time.time() + pause - deadline)
                left, ranks = hosts_left(hosts or {}, wanted, answers)
            except LaunchError as error:
                _say(f"{failure}; giving up: {error}")
                break
            fewer = f" on {ranks} ranks, those of {', '.join(left)}" if ranks != attempt.ranks else ""
            _say(f"{failure}; restart {number} of {max_restarts} in {pause:.0f} s{fewer}")
            watch.new_attempt()
            attempt = Attempt(ranks, left, reached)
            try:
                with _noting_sigusr1(watch):
                    time.sleep(pause)
                    job = plan(attempt)
            except KeyboardInterrupt:
                return 128 + signal.SIGINT
            except (LaunchError, HostsError) as error:  # what was there for the first attempt is no longer
                _say(f"giving up: {error}")
                break
            if watch.ended:
                _say("SIGUSR1: there is no time for a restart")
                status = STATUS
                break
            if reached:
                job = replace(job, environment={**job.environment, RESUME: "1"})
        began, reached = watch.run_dirs("began"), watch.run_dirs()
    if status == STATUS and stopped:
        stopped(any(step > began.get(run_dir, 0) for run_dir, step in reached.items()))
    return status


def hosts_left(hosts: Mapping[str, int], wanted: int, answers: Callable[[str], bool]) -> tuple[Mapping[str, int], int]:
    """The hosts that still answer, with their slots, and the ranks to start there: `wanted`, or as many as fit.

    Without `hosts` the job runs on this one, which is still there.

    >>> hosts_left({"a": 2, "b": 2}, 4, lambda host: host != "b")
    ({'a': 2}, 2)

    Raises:
        LaunchError: none answers.
    """
    if not hosts:
        return hosts, wanted
    left = {host: slots for host, slots in hosts.items() if answers(host)}
    if not left:
        raise LaunchError(f"none of {', '.join(hosts)} answers")
    return left, min(wanted, sum(left.values()))


def describe(status: int) -> str:
    """An exit status in words."""
    try:
        return f"a rank was ended by {signal.Signals(status - 128).name}"
    except ValueError:
        return f"the job failed with status {status}"


def how_far(run_dirs: Mapping[str, int]) -> str:
    """How far the job has come, in words."""
    saved = [f"step {step} in {run_dir}" for run_dir, step in run_dirs.items() if step]
    return f"after its checkpoint of {' and of '.join(saved)}" if saved else "before its first checkpoint"


def _check_sense(fruitless: int, number: int, max_restarts: int, late: float) -> None:
    if fruitless == 2:
        raise LaunchError("two attempts in a row ended without a newer checkpoint")
    if number > max_restarts:
        raise LaunchError(f"that was the last of {max_restarts} restart{'s' * (max_restarts > 1)}")
    if late >= 0:
        raise LaunchError("the time set by --max-time is over")


@contextmanager
def _noting_sigusr1(watch: Watch) -> Iterator[None]:
    """Inside, the signal by which Slurm says that the time is nearly over does not kill this process: no rank runs."""

    def note(number: int, frame: FrameType | None) -> None:
        watch.ended = True

    ignored = signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN  # and stays so, as during an attempt
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN if ignored else note)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, previous)


def _say(message: str) -> None:
    print(f"distprop: {message}", file=sys.stderr, flush=True)
