"""The command `distprop`. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click


class Refusal(click.ClickException):
    """An error that the user can put right: one message, no traceback, exit status 2."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distprop")
def main() -> None:
    """Data-parallel training on CPUs: NumPy and MPI."""


_HOSTS = click.option(
    "--hosts", metavar="A:2,B:2", help="Start the ranks on these hosts, over ssh; 2 on each of these."
)
_HOSTFILE = click.option(
    "--hostfile", type=click.Path(path_type=Path), help="The same from a file: a host a line, `A slots=2` or `A:2`."
)


def _duration(context: click.Context, parameter: click.Parameter, text: str | None) -> float:
    """The option --max-time in seconds; infinity without it."""
    if text is None:
        return math.inf
    from distprop.stopping import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_MAX_RESTARTS = click.option(
    "--max-restarts",
    type=click.IntRange(0),
    default=0,
    metavar="K",
    help="After a failure, go on from the last checkpoint, up to K times.",
)
_MAX_TIME = click.option(
    "--max-time",
    callback=_duration,
    metavar="TIME",
    help="Write a checkpoint and stop with status 75 before TIME (seconds, or as in 1h30m) is over.",
)


@main.command("run", context_settings={"allow_interspersed_args": False})  # what follows the script belongs to it
@click.option("-n", "--ranks", type=int, metavar="N", help="How many processes; with hosts, all slots by default.")
@_HOSTS
@_HOSTFILE
@click.option("-m", "module", is_flag=True, help="PROGRAM is a module, as in `python -m`.")
@_MAX_RESTARTS
@_MAX_TIME
@click.option("--dry-run", is_flag=True, help="Print the command, and start nothing.")
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run_command(
    ranks: int | None,
    hosts: str | None,
    hostfile: Path | None,
    module: bool,
    max_restarts: int,
    max_time: float,
    dry_run: bool,
    program: str,
    arguments: tuple[str, ...],
) -> None:
    """Run a Python script on N ranks of this host, or of other hosts.

    It finds the MPI library and the launcher that belongs to it, chooses their options, and shares the cores among the
    ranks. With -n 1 no MPI is needed. The exit status is the script's; Ctrl-C ends every rank.
    Several ranks have no standard input.

    A Trainer with checkpoints stops early and loses nothing: Ctrl-C, SIGTERM, SIGUSR1 and --max-time make it
    write one and end with status 75, resumable. A second Ctrl-C ends at once, with status 130.
    """
    if ranks is None and not (hosts or hostfile):
        raise click.UsageError("Missing option '-n', how many processes; or '--hosts', where.")
    _start(
        ranks,
        [program, *arguments],
        module=module,
        dry_run=dry_run,
        hosts=hosts,
        hostfile=hostfile,
        max_restarts=max_restarts,
        max_time=max_time,
    )


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one value, as in optim.lr=0.1.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run.")
@click.option("-n", "--ranks", type=int, default=None, metavar="N", help="Start N ranks of this host.")
@_HOSTS
@_HOSTFILE
@_MAX_RESTARTS
@_MAX_TIME
def train(
    config: Path,
    settings: tuple[str, ...],
    resume: bool,
    ranks: int | None,
    hosts: str | None,
    hostfile: Path | None,
    max_restarts: int,
    max_time: float,
) -> None:
    """Train what the TOML file CONFIG describes.

    Results go to runs/<name of the file>, or to train.run_dir, with the resolved configuration beside them.
    With train.checkpoint_every, Ctrl-C, SIGTERM, SIGUSR1 and --max-time write a checkpoint and end it with status 75.
    """
    from distprop.config import ConfigError, load_config

    try:
        loaded = load_config(config, settings)  # before any rank starts, so that a mistake is reported once
        if ranks is not None or hosts or hostfile:
            again = ["distprop", "train", str(config), *(word for setting in settings for word in ("--set", setting))]
            again += ["--resume"] * resume
            _start(
                ranks,
                again,
                module=True,
                resume=_resume_train,
                hosts=hosts,
                hostfile=hostfile,
                files=[str(config)],
                max_restarts=max_restarts,
                max_time=max_time,
            )
            return
        if max_restarts:
            raise Refusal("--max-restarts is for the process that starts the ranks: give -n N too, or --hosts")
        if math.isfinite(max_time):
            os.environ["DISTPROP_DEADLINE"] = str(time.time() + max_time)
        from distprop.job import train_from_config

        # the file that a run has saved names its own folder
        run_dir = config.parent if resume and config.name == "config.toml" else Path("runs", config.stem)
        train_from_config(loaded, run_dir, resume)
    except (ConfigError, OSError) as error:
        raise Refusal(str(error)) from error


@main.group()
def bench() -> None:
    """Measure this machine; every figure beside what it is compared with, in the same run."""


_SIZES = click.option("--sizes", default="784,512,512,10", show_default=True, help="Widths of the network's layers.")
_STEPS = click.option("--steps", default=300, show_default=True, type=click.IntRange(1))
_RANKS = click.option("-n", "--ranks", type=int, default=None, metavar="N", help="Start N ranks of this host.")


@bench.command()
@_SIZES
@click.option("--batch", default=128, show_default=True, type=click.IntRange(1), help="Rows on each rank.")
@_STEPS
@_RANKS
def step(sizes: str, batch: int, steps: int, ranks: int | None) -> None:
    """Time forward, backward, reduction and update of a step, beside a hand-written NumPy loop."""
    if ranks is not None:
        again = ["distprop", "bench", "step", "--sizes", sizes, "--batch", str(batch), "--steps", str(steps)]
        _start(ranks, again, module=True)
        return
    from distprop.bench.step import bench_step, show
    from distprop.comm import world

    widths, comm = _widths(sizes), world()
    times = bench_step(comm, widths, batch, steps)
    if comm.rank == 0:
        click.echo(show(times, widths, batch, comm.size))


@bench.command()
@_SIZES
@click.option("--batch-size", default=1024, show_default=True, type=click.IntRange(1), help="Rows of the global batch.")
@click.option("--shards", default=8, show_default=True, type=click.IntRange(1))
@_STEPS
@_RANKS
def determinism(sizes: str, batch_size: int, shards: int, steps: int, ranks: int | None) -> None:
    """Time the deterministic mode beside the default one."""
    if ranks is not None:
        again = ["distprop", "bench", "determinism", "--sizes", sizes, "--batch-size", str(batch_size)]
        _start(ranks, [*again, "--shards", str(shards), "--steps", str(steps)], module=True)
        return
    from distprop.bench.determinism import bench_determinism, show
    from distprop.comm import world

    widths, comm = _widths(sizes), world()
    times = bench_determinism(comm, widths, batch_size, shards, steps)
    if comm.rank == 0:
        click.echo(show(times, widths, batch_size, shards, comm.size))


@bench.command()
@click.argument("names", nargs=-1)
@click.option("--repeats", default=15, show_default=True, type=click.IntRange(1))
def ops(names: tuple[str, ...], repeats: int) -> None:
    """Time every operation (or those whose name contains one of NAMES) beside PyTorch's, on one thread, in ms."""
    import threadpoolctl

    from distprop.bench.ops import HEADER, bench_ops, show
    from distprop.bench.step import blas_description

    threadpoolctl.threadpool_limits(1, user_api="blas")
    click.echo(f"BLAS: {blas_description()}\n{HEADER}")
    for times in bench_ops(names, repeats):
        click.echo(show(times))


def _widths(sizes: str) -> list[int]:
    try:
        widths = [int(width) for width in sizes.split(",")]
    except ValueError:
        widths = []
    if len(widths) < 2 or min(widths) < 1:
        raise Refusal(f"--sizes takes two or more positive whole numbers with commas between them, got {sizes!r}")
    return widths


def _resume_train(run_dir: str) -> list[str]:
    return ["distprop", "train", str(Path(run_dir, "config.toml")), "--resume"]


def _start(
    ranks: int | None,
    program: list[str],
    *,
    module: bool = False,
    dry_run: bool = False,
    hosts: str | None = None,
    hostfile: Path | None = None,
    files: Sequence[str] = (),
    max_restarts: int = 0,
    max_time: float = math.inf,
    resume: Callable[[str], list[str]] | None = None,
) -> None:
    """Start the ranks and leave with their exit status; a restart runs `resume(run_dir)` instead, if that is given."""
    from distprop.comm.mpi import MPIMissingError
    from distprop.hosts import Host, HostsError, alive, parse_hosts, read_hostfile
    from distprop.launch import Job, LaunchError, plan
    from distprop.restart import Attempt, run_restarting

    def plan_attempt(attempt: Attempt) -> Job:
        again = resume(next(iter(attempt.run_dirs))) if resume and attempt.run_dirs else program
        left = [Host(name, slots) for name, slots in attempt.hosts.items()]
        return plan(attempt.ranks, again, module=module, hosts=left, files=files)

    if hosts and hostfile:
        raise Refusal("--hosts and --hostfile name the same thing; give one of them")
    try:
        where = parse_hosts(hosts) if hosts else read_hostfile(hostfile) if hostfile else []
        if where and max_restarts:
            os.environ["DISTPROP_RESTARTS"] = str(max_restarts)  # the ranks then refuse a run_dir that is not shared
        job = plan(ranks, program, module=module, hosts=where, files=files)
    except (LaunchError, HostsError, MPIMissingError) as error:
        raise Refusal(str(error)) from error
    if dry_run:
        click.echo(job.shell())
        return
    for line in filter(None, (job.description, job.advice)):
        click.echo(f"distprop: {line}", err=True)
    try:
        status = run_restarting(
            job,
            plan_attempt,
            max_restarts=max_restarts,
            max_time=max_time,
            hosts={host.name: host.slots for host in where},
            answers=lambda name: bool(alive([Host(name)])),
        )
    except HostsError as error:  # of a restart
        raise Refusal(str(error)) from error
    sys.exit(status)


if __name__ == "__main__":
    main()
