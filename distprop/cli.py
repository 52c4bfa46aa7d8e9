"""The command `distprop`. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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


@main.command("run", context_settings={"allow_interspersed_args": False})  # what follows the script belongs to it
@click.option("-n", "--ranks", type=int, metavar="N", help="How many processes; with hosts, all slots by default.")
@_HOSTS
@_HOSTFILE
@click.option("-m", "module", is_flag=True, help="PROGRAM is a module, as in `python -m`.")
@click.option("--dry-run", is_flag=True, help="Print the command, and start nothing.")
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run_command(
    ranks: int | None,
    hosts: str | None,
    hostfile: Path | None,
    module: bool,
    dry_run: bool,
    program: str,
    arguments: tuple[str, ...],
) -> None:
    """Run a Python script on N ranks of this host, or of other hosts.

    It finds the MPI library and the launcher that belongs to it, chooses their options, and shares the cores among the
    ranks. With -n 1 no MPI is needed. The exit status is the script's; Ctrl-C ends every rank.
    Several ranks have no standard input.
    """
    if ranks is None and not (hosts or hostfile):
        raise click.UsageError("Missing option '-n', how many processes; or '--hosts', where.")
    _start(ranks, [program, *arguments], module=module, dry_run=dry_run, hosts=hosts, hostfile=hostfile)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one value, as in optim.lr=0.1.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run.")
@click.option("-n", "--ranks", type=int, default=None, metavar="N", help="Start N ranks of this host.")
@_HOSTS
@_HOSTFILE
def train(
    config: Path,
    settings: tuple[str, ...],
    resume: bool,
    ranks: int | None,
    hosts: str | None,
    hostfile: Path | None,
) -> None:
    """Train what the TOML file CONFIG describes.

    Results go to runs/<name of the file>, or to train.run_dir, with the resolved configuration beside them.
    """
    from distprop.config import ConfigError, load_config

    try:
        loaded = load_config(config, settings)  # before any rank starts, so that a mistake is reported once
        if ranks is not None or hosts or hostfile:
            again = ["distprop", "train", str(config), *(word for setting in settings for word in ("--set", setting))]
            again += ["--resume"] * resume
            _start(ranks, again, module=True, hosts=hosts, hostfile=hostfile, files=[str(config)])
            return
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


def _start(
    ranks: int | None,
    program: list[str],
    *,
    module: bool = False,
    dry_run: bool = False,
    hosts: str | None = None,
    hostfile: Path | None = None,
    files: Sequence[str] = (),
) -> None:
    """Start the ranks and leave with their exit status."""
    from distprop.comm.mpi import MPIMissingError
    from distprop.hosts import HostsError, parse_hosts, read_hostfile
    from distprop.launch import LaunchError, plan, run

    if hosts and hostfile:
        raise Refusal("--hosts and --hostfile name the same thing; give one of them")
    try:
        where = parse_hosts(hosts) if hosts else read_hostfile(hostfile) if hostfile else ()
        job = plan(ranks, program, module=module, hosts=where, files=files)
    except (LaunchError, HostsError, MPIMissingError) as error:
        raise Refusal(str(error)) from error
    if dry_run:
        click.echo(job.shell())
        return
    for line in filter(None, (job.description, job.advice)):
        click.echo(f"distprop: {line}", err=True)
    sys.exit(run(job))


if __name__ == "__main__":
    main()
