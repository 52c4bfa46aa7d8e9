"""The command `distprop`. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    from distprop.hosts import Host


class Refusal(click.ClickException):
    """An error that the user can put right: one message, no traceback, exit status 2."""

    exit_code = 2


_TIMEOUT = click.option(
    "--timeout",
    type=click.FloatRange(0, 365 * 86400),
    metavar="SECONDS",
    help="End the job when a rank makes no progress for so long while others wait for it; 0 for never.  "
    "[default: DISTPROP_TIMEOUT, or 120]",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distprop")
def main() -> None:
    """Data-parallel training on CPUs: NumPy and MPI."""


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
@_MAX_RESTARTS
@_MAX_TIME
@click.option("--dry-run", is_flag=True, help="Print the command, and start nothing.")
@_TIMEOUT
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run_command(
    ranks: int | None,
    hosts: str | None,
    hostfile: Path | None,
    module: bool,
    max_restarts: int,
    max_time: float,
    timeout: float | None,
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
    where, limits = Where(hosts, hostfile), Limits(max_restarts, max_time, timeout)
    _start(ranks, [program, *arguments], module=module, dry_run=dry_run, where=where, limits=limits)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one value, as in optim.lr=0.1.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run.")
@click.option("--profile", is_flag=True, help="Write a time line of every rank's first steps; see `distprop trace`.")
@click.option("-n", "--ranks", type=int, default=None, metavar="N", help="Start N ranks of this host.")
@_MAX_RESTARTS
@_MAX_TIME
@_TIMEOUT
@_HOSTS
@_HOSTFILE
def train(
    config: Path,
    settings: tuple[str, ...],
    resume: bool,
    profile: bool,
    ranks: int | None,
    max_restarts: int,
    max_time: float,
    timeout: float | None,
    hosts: str | None,
    hostfile: Path | None,
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
            again += ["--resume"] * resume + ["--profile"] * profile
            where, limits = Where(hosts, hostfile, [str(config)]), Limits(max_restarts, max_time, timeout)
            _start(ranks, again, module=True, where=where, limits=limits, resume=_resume_train)
            return
        if max_restarts:
            raise Refusal("--max-restarts is for the process that starts the ranks: give -n N too, or --hosts")
        if math.isfinite(max_time):
            os.environ["DISTPROP_DEADLINE"] = str(time.time() + max_time)
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

    from distprop.bench.ops import HEADER, bench_ops, show, summary
    from distprop.environment import blas_description

    threadpoolctl.threadpool_limits(1, user_api="blas")
    click.echo(f"BLAS: {blas_description()}\n{HEADER}")
    table = []
    for times in bench_ops(names, repeats):
        table.append(times)
        click.echo(show(times))
    click.echo(summary(table))


@bench.command()
@click.option("--sizes", default=None, metavar="MB,MB", help="Millions of bytes; from 1 kB to 100 MB by default.")
@click.option("--repeats", default=None, type=click.IntRange(1), help="For each size; by default as its size allows.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_RANKS
def allreduce(sizes: str | None, repeats: int | None, as_json: bool, ranks: int | None) -> None:
    """Time the sum of an array over the ranks, beside the MPI library's own blocking Allreduce."""
    if ranks is not None:
        options = [("--sizes", sizes), ("--repeats", repeats)]
        again = [word for name, value in options if value is not None for word in (name, str(value))]
        _start(ranks, ["distprop", "bench", "allreduce", *again, *["--json"] * as_json], module=True)
        return
    import json

    from distprop.bench import allreduce as measured
    from distprop.comm import mpi, world

    comm = world()
    if comm.size == 1:
        raise Refusal("one rank has nothing to add up; distprop bench allreduce -n 2")
    megabytes = measured.SIZES if sizes is None else _megabytes(sizes)
    rows = list(measured.bench_allreduce(comm, mpi.MPICommunicator(share_memory=False), megabytes, repeats))
    if comm.rank == 0:
        click.echo(json.dumps(measured.as_json(rows)) if as_json else measured.show(rows, comm, mpi.library().name))


@bench.command()
@click.argument("parts", nargs=-1, metavar="[model|batch|depth|ranks|dataset]...")
@click.option("--quick", is_flag=True, help="The small end of each, in seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def scaling(parts: tuple[str, ...], quick: bool, as_json: bool) -> None:
    """Time a step against model size, batch, depth, ranks and dataset size, on one thread a rank, in about 3 minutes.

    The exit status is 1 if cost does not grow linearly, a layer costs too much Python, the number of ranks changes the
    result, or memory grows with the dataset.
    """
    import json

    import threadpoolctl

    from distprop.bench.scaling import PARTS, show
    from distprop.environment import blas_description

    if unknown := set(parts) - set(PARTS):
        raise Refusal(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    threadpoolctl.threadpool_limits(1, user_api="blas")
    if not as_json:
        click.echo(f"BLAS: {blas_description()}")
    measured = []
    for name in parts or PARTS:
        measured.append(PARTS[name](quick))
        if not as_json:
            click.echo(f"\n{show(measured[-1])}")
    if as_json:
        click.echo(json.dumps({part.name: {"met": part.met, "figures": part.figures} for part in measured}))
    sys.exit(0 if all(part.met for part in measured) else 1)


def _megabytes(sizes: str) -> list[float]:
    try:
        megabytes = [float(size) for size in sizes.split(",")]
    except ValueError:
        megabytes = []
    if not megabytes or not all(0 < size < float("inf") for size in megabytes):
        raise Refusal(f"--sizes takes positive numbers of MB with commas between them, got {sizes!r}")
    return megabytes


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


def _resume_train(run_dir: str) -> list[str]:
    return ["distprop", "train", str(Path(run_dir, "config.toml")), "--resume"]


class Limits(NamedTuple):
    """How long a job may take, wait and fail."""

    max_restarts: int = 0
    max_time: float = math.inf
    timeout: float | None = None  # None: that of the environment


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


_HERE, _NO_LIMITS = Where(), Limits()


def _start(
    ranks: int | None,
    program: list[str],
    *,
    module: bool = False,
    dry_run: bool = False,
    where: Where = _HERE,
    limits: Limits = _NO_LIMITS,
    resume: Callable[[str], list[str]] | None = None,
) -> None:
    """Start the ranks and leave with their exit status; a restart runs `resume(run_dir)` instead, if that is given."""
    from distprop.comm.mpi import MPIMissingError
    from distprop.hosts import Host, HostsError, alive
    from distprop.launch import Job, LaunchError, plan
    from distprop.restart import Attempt, run_restarting

    def plan_on(ranks: int | None, program: list[str], hosts: Sequence[Host]) -> Job:
        files, timeout_seconds = where.files, limits.timeout
        return plan(ranks, program, module=module, hosts=hosts, files=files, timeout_seconds=timeout_seconds)

    def plan_attempt(attempt: Attempt) -> Job:
        again = resume(next(iter(attempt.run_dirs))) if resume and attempt.run_dirs else program
        return plan_on(attempt.ranks, again, [Host(name, slots) for name, slots in attempt.hosts.items()])

    try:
        hosts = where.read()
        if hosts and limits.max_restarts:
            os.environ["DISTPROP_RESTARTS"] = str(limits.max_restarts)  # the ranks then refuse a run_dir not shared
        job = plan_on(ranks, program, hosts)
    except (LaunchError, HostsError, MPIMissingError) as error:
        raise Refusal(str(error)) from error
    if dry_run:
        click.echo(job.shell())
        return
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
    )
    sys.exit(status)


if __name__ == "__main__":
    main()
