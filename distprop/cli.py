"""The command `distprop`. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path

import click


class Refusal(click.ClickException):
    """An error that the user can put right: one message, no traceback, exit status 2."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distprop")
def main() -> None:
    """Data-parallel training on CPUs: NumPy and MPI."""


@main.command("run", context_settings={"allow_interspersed_args": False})  # what follows the script belongs to it
@click.option("-n", "--ranks", type=int, required=True, metavar="N", help="How many processes.")
@click.option("-m", "module", is_flag=True, help="PROGRAM is a module, as in `python -m`.")
@click.option("--dry-run", is_flag=True, help="Print the command, and start nothing.")
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run_command(ranks: int, module: bool, dry_run: bool, program: str, arguments: tuple[str, ...]) -> None:
    """Run a Python script on N ranks of this host.

    It finds the MPI library and the launcher that belongs to it, chooses their options, and shares the cores among the
    ranks. With -n 1 no MPI is needed. The exit status is the script's; Ctrl-C ends every rank.
    Several ranks have no standard input.
    """
    _start(ranks, [program, *arguments], module=module, dry_run=dry_run)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one value, as in optim.lr=0.1.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run.")
@click.option("--profile", is_flag=True, help="Write a time line of every rank's first steps; see `distprop trace`.")
@click.option("-n", "--ranks", type=int, default=None, metavar="N", help="Start N ranks of this host.")
def train(config: Path, settings: tuple[str, ...], resume: bool, profile: bool, ranks: int | None) -> None:
    """Train what the TOML file CONFIG describes.

    Results go to runs/<name of the file>, or to train.run_dir, with the resolved configuration beside them.
    """
    from distprop.config import ConfigError, load_config

    try:
        loaded = load_config(config, settings)  # before any rank starts, so that a mistake is reported once
        if ranks is not None:
            again = ["distprop", "train", str(config), *(word for setting in settings for word in ("--set", setting))]
            again += ["--resume"] * resume + ["--profile"] * profile
            _start(ranks, again, module=True)
            return
        from distprop.job import train_from_config

        # the file that a run has saved names its own folder
        run_dir = config.parent if resume and config.name == "config.toml" else Path("runs", config.stem)
        train_from_config(loaded, run_dir, resume, profile=profile)
    except (ConfigError, OSError) as error:
        raise Refusal(str(error)) from error


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path), required=False)
def fingerprint(run: Path, other: Path | None) -> None:
    """Print one hash of the parameters for each step of a run, or compare two runs.

    The lines of RUN can be compared with those of another run by `diff`. With OTHER, the first step, the first layer
    and the first rank that differ are named instead. The exit status is 1 if the runs, or the ranks of one, differ.
    """
    from distprop.fingerprint import RecordError, compare, first_difference, read

    try:
        record = read(run)
        if other is None:
            difference = first_difference(record)
            for step, hashes in sorted(record.steps.items()):
                click.echo(f"{step}  {hashes.together}")
        else:
            second = read(other)
            difference = compare(record, second)
            if difference is None:
                common = record.steps.keys() & second.steps.keys()
                click.echo(f"the runs agree at all {len(common)} steps of both, from {min(common)} to {max(common)}")
    except RecordError as error:
        raise Refusal(str(error)) from error
    if difference is not None:
        click.echo(difference, err=True)
        sys.exit(1)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
def trace(run: Path) -> None:
    """Sum up the time line of a profiled run: where the time went, on which rank, and the critical path.

    The file itself, trace.json in RUN, opens in Perfetto (ui.perfetto.dev) and in chrome://tracing.
    """
    from distprop.rundir import RunDirError
    from distprop.trace import read_trace, show

    try:
        click.echo(show(read_trace(run)))
    except RunDirError as error:
        raise Refusal(str(error)) from error


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="By default report.html in the (first) run.")
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """Make one HTML file of a run, or of several side by side: curves, gradient health, times, configuration.

    The file needs no network. A run that is still going, or that crashed, is shown as far as it came.
    """
    from distprop.report import page
    from distprop.rundir import RunDirError, read_run

    target = output or runs[0] / "report.html"
    try:
        html = page([read_run(run) for run in runs])
        target.write_text(html, encoding="utf-8")
    except (RunDirError, OSError) as error:
        raise Refusal(str(error)) from error
    click.echo(f"{target}: {len(html) / 1e3:,.0f} kB")


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
    from distprop.environment import blas_description

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


def _start(ranks: int, program: list[str], *, module: bool = False, dry_run: bool = False) -> None:
    """Start the ranks and leave with their exit status."""
    from distprop.comm.mpi import MPIMissingError
    from distprop.launch import LaunchError, plan, run

    try:
        job = plan(ranks, program, module=module)
    except (LaunchError, MPIMissingError) as error:
        raise Refusal(str(error)) from error
    if dry_run:
        click.echo(job.shell())
        return
    for line in filter(None, (job.description, job.advice)):
        click.echo(f"distprop: {line}", err=True)
    sys.exit(run(job))


if __name__ == "__main__":
    main()
