"""The command `distprop`. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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
@click.option("-n", "--ranks", type=int, default=None, metavar="N", help="Start N ranks of this host.")
def train(config: Path, settings: tuple[str, ...], resume: bool, ranks: int | None) -> None:
    """Train what the TOML file CONFIG describes.

    Results go to runs/<name of the file>, or to train.run_dir, with the resolved configuration beside them.
    """
    from distprop.config import ConfigError, load_config

    try:
        loaded = load_config(config, settings)  # before any rank starts, so that a mistake is reported once
        if ranks is not None:
            again = ["distprop", "train", str(config), *(word for setting in settings for word in ("--set", setting))]
            again += ["--resume"] * resume
            _start(ranks, again, module=True)
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


@main.command("doctor")
@click.option("-n", "--ranks", type=click.IntRange(1), metavar="N", help="Start N ranks of this host, and measure.")
@click.option("--run-dir", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor_command(ranks: int | None, run_dir: Path, as_json: bool) -> None:
    """Look at MPI, BLAS and this machine, and say what to do about what is amiss.

    The exit status is 1 if something fails. Under mpirun or srun it looks at all their ranks and hosts.
    """
    from distprop.comm import LauncherMismatchError, SoloCommunicator, started_by, world
    from distprop.doctor import check, check_host, check_job, show, to_json, worst

    asked = started_by()[0] == "distprop run"  # by another doctor, which shows what is found and has the exit status
    if started_by()[1] > 1:
        try:
            comm = world()
            findings = check_job(comm, run_dir)
        except LauncherMismatchError:
            comm, findings = SoloCommunicator(), check_host(run_dir)
        if comm.rank:
            sys.exit(not asked and worst(findings) == "fail")
    else:
        findings = check(run_dir, ranks)
    if as_json:
        click.echo(to_json(findings))
    else:
        show(findings)
    sys.exit(not asked and worst(findings) == "fail")


@main.command("predict")
@click.argument("config", type=click.Path(path_type=Path), required=False)
@_SIZES
@click.option("--batch", type=click.IntRange(1), help="Rows; CONFIG's batch_size, or 128.")
@click.option(
    "--scaling",
    type=click.Choice(["weak", "strong"]),
    help="weak: each rank keeps the batch; strong: all ranks share it, as they do with CONFIG.",
)
@click.option("--network", metavar="RATE,LATENCY", help="Between hosts, as in 25gbit,10us, instead of measuring.")
@click.option("--within", metavar="RATE,LATENCY", help="Between the ranks of a host, instead of measuring.")
@click.option("--step-time", metavar="TIME", help="A step of one rank without messages, as in 5ms.")
@click.option("--ranks-per-host", type=click.IntRange(1), metavar="R", help="As many as were measured by default.")
@click.option("-n", "--ranks", type=int, metavar="N", help="Measure on N ranks of this host; one a core by default.")
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE", help="Draw the speed-up into FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--measure", "only_measure", is_flag=True, hidden=True)
def predict_command(
    sizes: str, ranks: int | None, svg: Path | None, as_json: bool, only_measure: bool, **options: Any
) -> None:
    """Predict step time and efficiency on 1 to 4,096 ranks, for a network of --sizes or of the TOML file CONFIG.

    It measures a step and Allreduce first, in less than a minute. Under mpirun or srun it measures on their ranks.
    """
    from distprop.comm import started_by, world
    from distprop.config import ConfigError
    from distprop.predict import Question, answer, measure_here, show

    try:
        question = Question(widths=tuple(_widths(sizes)), **options)
        if started_by()[1] > 1:
            measured = question.measure(world())
            if only_measure and world().rank == 0:
                click.echo(measured.to_json())
            if only_measure or world().rank:
                return
            found = answer(question, measured)
        else:
            found = answer(question, None if question.is_told_everything else measure_here(question, ranks))
        if svg:
            from distprop.chart import as_svg

            svg.write_text(as_svg(f"{found.name}, {found.batch:,} rows, {found.scaling} scaling", found.points()))
    except (ConfigError, OSError, ValueError) as error:
        raise Refusal(str(error)) from error
    if as_json:
        click.echo(found.to_json())
    else:
        show(found)


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
