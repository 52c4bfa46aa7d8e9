"""`distprop run` and `distprop train`: jobs."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

import click

from distprop import slurm
from distprop.cli.start import (
    HOSTFILE,
    HOSTS,
    MAX_RESTARTS,
    MAX_TIME,
    REQUEUE,
    TIMEOUT,
    Limits,
    Refusal,
    Where,
    refusing,
    start,
)


@click.command(
    "run",
    short_help="Run a Python script on several ranks.",
    context_settings={"allow_interspersed_args": False},  # what follows the script belongs to it
)
@click.option(
    "-n", "--ranks", type=int, metavar="N", help="How many processes; with hosts and under Slurm, all slots by default."
)
@HOSTS
@HOSTFILE
@click.option("-m", "module", is_flag=True, help="PROGRAM is a module, as in `python -m`.")
@MAX_RESTARTS
@MAX_TIME
@REQUEUE
@click.option("--dry-run", is_flag=True, help="Print the command, and start nothing.")
@TIMEOUT
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run_command(
    ranks: int | None,
    hosts: str | None,
    hostfile: Path | None,
    module: bool,
    max_restarts: int,
    max_time: float,
    requeue: bool,
    timeout: float | None,
    dry_run: bool,
    program: str,
    arguments: tuple[str, ...],
) -> None:
    """Run a Python script on N ranks of this host, of other hosts, or of the Slurm job that this is.

    It finds the MPI library and the launcher that belongs to it, chooses their options, and shares the cores among the
    ranks. With -n 1 no MPI is needed. The exit status is the script's; Ctrl-C ends every rank.
    Several ranks have no standard input.

    A Trainer with checkpoints stops early and loses nothing: Ctrl-C, SIGTERM, SIGUSR1 and --max-time make it
    write one and end with status 75, resumable. A second Ctrl-C ends at once, with status 130.
    """
    if ranks is None and not (hosts or hostfile or slurm.job_name()):
        late = "; options come before the program, whose own are behind it" if "-n" in arguments else ""
        raise click.UsageError(f"Missing option '-n', how many processes; or '--hosts', where{late}.")
    where, limits = Where(hosts, hostfile), Limits(max_restarts, max_time, timeout, requeue)
    start(ranks, [program, *arguments], module=module, dry_run=dry_run, where=where, limits=limits)


@click.command("train")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one value, as in optim.lr=0.1.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run.")
@click.option("--profile", is_flag=True, help="Write a time line of every rank's first steps; see `distprop trace`.")
@click.option("-n", "--ranks", type=int, metavar="N", help="Start N ranks of this host; under Slurm all by default.")
@MAX_RESTARTS
@MAX_TIME
@REQUEUE
@TIMEOUT
@HOSTS
@HOSTFILE
def train_command(
    config: Path,
    settings: tuple[str, ...],
    resume: bool,
    profile: bool,
    ranks: int | None,
    max_restarts: int,
    max_time: float,
    requeue: bool,
    timeout: float | None,
    hosts: str | None,
    hostfile: Path | None,
) -> None:
    """Train what the TOML file CONFIG describes.

    Results go to runs/<name of the file>, or to train.run_dir, with the resolved configuration beside them. In a Slurm
    job the number of the job is added, and once Slurm has started it again the run goes on.
    With train.checkpoint_every, Ctrl-C, SIGTERM, SIGUSR1 and --max-time write a checkpoint and end it with status 75.
    """
    from distprop.checkpoint import CheckpointError
    from distprop.comm import started_by
    from distprop.config import ConfigError, load_config
    from distprop.stopping import deadline, resume_forced

    with refusing(ValueError):
        launcher, started = started_by()
        deadline()  # of the environment, as the next one; a Trainer's ValueError would have a traceback
        resume_forced()
    with refusing(ConfigError, CheckpointError, OSError, slurm.AllocationError):
        loaded = load_config(config, settings)  # before any rank starts, so that a mistake is reported once
        if ranks is not None or hosts or hostfile or requeue or _has_slots(launcher, started):
            again = ["distprop", "train", str(config), *(word for setting in settings for word in ("--set", setting))]
            again += ["--resume"] * resume + ["--profile"] * profile
            where, limits = Where(hosts, hostfile, [str(config)]), Limits(max_restarts, max_time, timeout, requeue)
            start(ranks, again, module=True, where=where, limits=limits, resume=_resume_train)
        if max_restarts:
            raise Refusal("--max-restarts is for the process that starts the ranks: give -n N too, or --hosts")
        if math.isfinite(max_time):
            os.environ["DISTPROP_DEADLINE"] = str(time.time() + max_time)
        from distprop.comm import world
        from distprop.job import train_from_config

        # the file that a run has saved names its own folder
        run_dir = config.parent if resume and config.name == "config.toml" else Path("runs", _run_name(config))
        try:
            train_from_config(loaded, run_dir, resume, profile=profile)
        except (ConfigError, CheckpointError):  # all ranks have it, and one says it
            if world().rank:
                sys.exit(Refusal.exit_code)
            raise


def _has_slots(launcher: str | None, started: int) -> bool:
    """Whether this is a Slurm job with more than one slot, and this process no rank of it."""
    if launcher not in (None, "srun") or started > 1:
        return False
    allocation = slurm.allocation()
    return allocation is not None and sum(allocation.tasks) > 1


def _run_name(config: Path) -> str:
    """Jobs of one configuration, and the tasks of an array, run at the same time: each has a folder of its own."""
    job = slurm.job_name()
    return f"{config.stem}-{job}" if job else config.stem


def _resume_train(run_dir: str) -> list[str]:
    return ["distprop", "train", str(Path(run_dir, "config.toml")), "--resume"]
