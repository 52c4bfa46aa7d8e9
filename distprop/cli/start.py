"""What the commands share: options, and starting the ranks of a job."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import click

if TYPE_CHECKING:
    from distprop.hosts import Host


class Refusal(click.ClickException):
    """An error that the user can put right: one message, no traceback, exit status 2."""

    exit_code = 2


@contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """Inside, such errors are the user's: each becomes a `Refusal`."""
    try:
        yield
    except errors as error:
        if isinstance(error, OSError) and error.filename and error.strerror:  # without Python's [Errno 2]
            raise Refusal(f"{error.filename}: {error.strerror}") from error
        raise Refusal(str(error)) from error


def _duration(context: click.Context, parameter: click.Parameter, text: str | None) -> float:
    """The option --max-time in seconds; infinity without it."""
    if text is None:
        return math.inf
    from distprop.stopping import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


TIMEOUT = click.option(
    "--timeout",
    type=click.FloatRange(0, 365 * 86400),
    metavar="SECONDS",
    help="End the job when a rank makes no progress for so long while others wait for it; 0 for never.  "
    "[default: DISTPROP_TIMEOUT, or 120]",
)
MAX_RESTARTS = click.option(
    "--max-restarts",
    type=click.IntRange(0),
    default=0,
    metavar="K",
    help="After a failure, go on from the last checkpoint, up to K times.",
)
MAX_TIME = click.option(
    "--max-time",
    callback=_duration,
    metavar="TIME",
    help="Write a checkpoint and stop with status 75 before TIME (seconds, or as in 1h30m) is over.",
)
REQUEUE = click.option(
    "--requeue", is_flag=True, help="In a Slurm job: when it has stopped early, have Slurm start it again to go on."
)
HOSTS = click.option("--hosts", metavar="A:2,B:2", help="Start the ranks on these hosts, over ssh; 2 on each of these.")
HOSTFILE = click.option(
    "--hostfile", type=click.Path(path_type=Path), help="The same from a file: a host a line, `A slots=2` or `A:2`."
)
SIZES = click.option("--sizes", default="784,512,512,10", show_default=True, help="Widths of the network's layers.")
RANKS = click.option("-n", "--ranks", type=int, default=None, metavar="N", help="Start N ranks of this host.")


def parse_widths(sizes: str) -> list[int]:
    """What --sizes says."""
    try:
        widths = [int(width) for width in sizes.split(",")]
    except ValueError:
        widths = []
    if len(widths) < 2 or min(widths) < 1:
        raise Refusal(f"--sizes takes two or more positive whole numbers with commas between them, got {sizes!r}")
    return widths


class Limits(NamedTuple):
    """How long a job may take, wait and fail."""

    max_restarts: int = 0
    max_time: float = math.inf
    timeout: float | None = None  # None: that of the environment
    requeue: bool = False  # by Slurm, once it has stopped early


class Where(NamedTuple):
    """The hosts of a job, as they were given, and the files besides the script that must be the same on all of them."""

    hosts: str | None = None
    hostfile: Path | None = None
    files: Sequence[str] = ()

    def read(self) -> Sequence[Host]:
        """The hosts; none for this one alone."""
        from distprop.hosts import parse_hosts, read_hostfile

        if self.hosts and self.hostfile:
            raise Refusal("--hosts and --hostfile name the same thing; give one of them")
        return parse_hosts(self.hosts) if self.hosts else read_hostfile(self.hostfile) if self.hostfile else ()


HERE, NO_LIMITS = Where(), Limits()


def start(
    ranks: int | None,
    program: list[str],
    *,
    module: bool = False,
    dry_run: bool = False,
    where: Where = HERE,
    limits: Limits = NO_LIMITS,
    resume: Callable[[str], list[str]] | None = None,
) -> NoReturn:
    """Start the ranks and leave with their exit status; a restart runs `resume(run_dir)` instead, if that is given."""
    from distprop import slurm
    from distprop.comm import started_by
    from distprop.comm.mpi import MPIMissingError
    from distprop.hosts import Host, HostsError, alive
    from distprop.launch import Job, plan
    from distprop.launcher import LaunchError
    from distprop.restart import Attempt, run_restarting
    from distprop.stopping import STATUS

    def plan_on(ranks: int | None, program: list[str], hosts: Sequence[Host]) -> Job:
        files, timeout_seconds = where.files, limits.timeout
        return plan(ranks, program, module=module, hosts=hosts, files=files, timeout_seconds=timeout_seconds)

    def plan_attempt(attempt: Attempt) -> Job:
        again = resume(next(iter(attempt.run_dirs))) if resume and attempt.run_dirs else program
        return plan_on(attempt.ranks, again, [Host(name, slots) for name, slots in attempt.hosts.items()])

    if (copies := slurm.copies()) > 1:
        if not slurm.is_spokesman():
            sys.exit(Refusal.exit_code)
        raise Refusal(
            f"srun has started this command {copies} times, and each of them would start all ranks; leave srun out: in "
            "a Slurm job distprop starts the ranks by itself"
        )
    with refusing(ValueError):
        launcher, started = started_by()
    if launcher != "srun" and started > 1:  # each of them says so: the first that leaves may end the others
        raise Refusal(
            f"{launcher} has started this command {started} times, and each of them would start all ranks; leave "
            "it out, or the -n and --hosts of distprop"
        )
    with refusing(LaunchError, HostsError, MPIMissingError):
        hosts = where.read()
        if limits.requeue and slurm.job_name() is None:
            raise LaunchError(
                "--requeue is for a Slurm job; this is none. Submit it with sbatch, or leave --requeue out"
            )
        if limits.requeue or (hosts and limits.max_restarts):
            os.environ["DISTPROP_RESTARTS"] = "1"  # the ranks then refuse a run_dir not shared
        job = plan_on(ranks, program, hosts)
    if dry_run:
        click.echo(job.shell())
        sys.exit()
    for line in filter(None, (job.description, job.advice)):
        click.echo(f"distprop: {line}", err=True)
    slots = {host.name: host.slots for host in job.hosts}
    status = run_restarting(
        job,
        plan_attempt,
        max_restarts=limits.max_restarts,
        max_time=limits.max_time,
        hosts=slots,
        answers=lambda name: bool(alive([Host(name, slots[name])])),
        stopped=slurm.requeue if limits.requeue else None,
    )
    if limits.requeue and status not in (0, STATUS):
        why = " by SIGUSR1 before training had begun" if status == 128 + signal.SIGUSR1 else f" with status {status}"
        click.echo(f"distprop: job {slurm.job_name()} is not requeued: it ended{why}", err=True)
    sys.exit(status)
