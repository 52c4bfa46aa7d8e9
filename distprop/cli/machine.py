"""`distprop doctor` and `distprop predict`: what this machine, or a cluster, is good for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from distprop.cli.start import HOSTFILE, HOSTS, SIZES, Refusal, Where, parse_widths, refusing


@click.command("doctor", short_help="Say what is amiss with MPI, BLAS, this machine or hosts.")
@click.option("-n", "--ranks", type=click.IntRange(1), metavar="N", help="Start N ranks, and measure.")
@HOSTS
@HOSTFILE
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="The folder of runs, in which checkpoints are to be written.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor_command(ranks: int | None, hosts: str | None, hostfile: Path | None, run_dir: Path, as_json: bool) -> None:
    """Look at MPI, BLAS and this machine, and say what to do about what is amiss.

    With -n N or with hosts it starts ranks, which look at their hosts and time their messages. The exit status is 1 if
    something fails. Under mpirun or srun it looks at all their ranks and hosts.
    """
    from distprop.comm import LauncherMismatchError, SoloCommunicator, started_by, world
    from distprop.doctor import check_host, check_job, examine, show, to_json, worst
    from distprop.hosts import HostsError

    with refusing(ValueError):
        launcher, started = started_by()
    asked = launcher == "distprop run"  # by another doctor, which shows what is found and has the exit status
    if asked or started > 1:
        try:
            comm = world()
            findings = check_job(comm, run_dir)
        except LauncherMismatchError:
            comm, findings = SoloCommunicator(), check_host(run_dir)
        if comm.rank:
            sys.exit(not asked and worst(findings) == "fail")
    else:
        with refusing(HostsError):
            findings = examine(run_dir, ranks, Where(hosts, hostfile).read())
    if as_json:
        click.echo(to_json(findings))
    else:
        show(findings)
    sys.exit(not asked and worst(findings) == "fail")


@click.command("predict", short_help="Predict step time and efficiency on 1 to 4,096 ranks.")
@click.argument("config", type=click.Path(path_type=Path), required=False)
@SIZES
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
@click.option("-n", "--ranks", type=int, metavar="N", help="Measure on N ranks; one a core of this host by default.")
@HOSTS
@HOSTFILE
@click.option(
    "--svg", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Draw the speed-up into FILE."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--measure", "only_measure", is_flag=True, hidden=True)
def predict_command(
    sizes: str,
    ranks: int | None,
    hosts: str | None,
    hostfile: Path | None,
    svg: Path | None,
    as_json: bool,
    only_measure: bool,
    **options: Any,
) -> None:
    """Predict step time and efficiency on 1 to 4,096 ranks, for a network of --sizes or of the TOML file CONFIG.

    It measures a step and Allreduce first, in less than a minute: here, or with --hosts on these and between them.
    Under mpirun or srun it measures on their ranks.
    """
    from distprop.comm import started_by, world
    from distprop.config import ConfigError
    from distprop.hosts import HostsError
    from distprop.predict import Question, answer, measure_here, show

    with refusing(ConfigError, HostsError, OSError, ValueError):
        question = Question(widths=tuple(parse_widths(sizes)), **options)
        if question.config and click.get_current_context().get_parameter_source("sizes") is ParameterSource.COMMANDLINE:
            raise Refusal("--sizes and CONFIG both say which network; give one of them")
        if only_measure or started_by()[1] > 1:
            measured = question.measure(world())
            if only_measure and world().rank == 0:
                click.echo(measured.to_json())
            if only_measure or world().rank:
                return
            found = answer(question, measured)
        else:
            if svg and not svg.absolute().parent.is_dir():
                raise Refusal(f"--svg: there is no folder {svg.parent}")
            where = Where(hosts, hostfile).read()
            told = question.is_told_everything and ranks is None and not where
            found = answer(question, None if told else measure_here(question, ranks, where))
        if svg:
            from distprop.chart import as_svg

            svg.write_text(as_svg(f"{found.name}, {found.batch:,} rows, {found.scaling} scaling", found.points()))
    if as_json:
        click.echo(found.to_json())
    else:
        show(found)
