"""`distprop fingerprint`, `trace`, `report` and `export`: what the folder of a run says."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from distprop.cli.start import refusing


@click.command(short_help="Print a hash of the parameters at each step, or compare runs.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path), required=False)
def fingerprint(run: Path, other: Path | None) -> None:
    """Print one hash of the parameters for each step of a run, or compare two runs.

    The lines of RUN can be compared with those of another run by `diff`. With OTHER, the first step, the first layer
    and the first rank that differ are named instead. The exit status is 1 if the runs, or the ranks of one, differ.
    """
    from distprop.fingerprint import RecordError, compare, first_difference, read, replay_advice

    with refusing(RecordError):
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
    if difference is not None:
        click.echo(str(difference), err=True)
        if advice := replay_advice(run, difference.step, difference.rank, other):
            click.echo(advice, err=True)
        sys.exit(1)


@click.command(short_help="Sum up the time line of a profiled run.")
@click.argument("run", type=click.Path(path_type=Path))
def trace(run: Path) -> None:
    """Sum up the time line of a profiled run: where the time went, on which rank, and the critical path.

    The file itself, trace.json in RUN, opens in Perfetto (ui.perfetto.dev) and in chrome://tracing.
    """
    from distprop.rundir import RunDirError
    from distprop.trace import read_trace, show

    with refusing(RunDirError):
        click.echo(show(read_trace(run)))


@click.command(short_help="Make one HTML file of one or several runs.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="By default report.html in the (first) run.")
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """Make one HTML file of a run, or of several side by side: curves, gradient health, times, configuration.

    The file needs no network. A run that is still going, or that crashed, is shown as far as it came.
    """
    from distprop.report import page
    from distprop.rundir import RunDirError, read_run

    target = output or runs[0] / "report.html"
    with refusing(RunDirError, OSError):
        html = page([read_run(run) for run in runs])
        target.write_text(html, encoding="utf-8")
    click.echo(f"{target}: {len(html) / 1e3:,.0f} kB")


@click.command(short_help="Write a run's numbers as CSV or for TensorBoard.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--csv", "table", type=click.Path(path_type=Path), metavar="FILE", help="A row for each step; - prints.")
@click.option("--tensorboard", "folder", type=click.Path(path_type=Path), metavar="DIR", help="Event files, in DIR.")
def export(run: Path, table: Path | None, folder: Path | None) -> None:
    """Write what metrics.jsonl of RUN says, all its numbers, as a table in CSV or for TensorBoard.

    For TensorBoard while a run is going, give the Trainer callbacks=[distprop.tensorboard.TensorBoard(DIR)].
    """
    from distprop import tensorboard
    from distprop.logs import write_csv
    from distprop.rundir import RunDirError, read_run

    if table is None and folder is None:
        raise click.UsageError("Say what to write: --csv FILE, --tensorboard DIR, or both.")
    with refusing(RunDirError, OSError, ImportError):
        found = read_run(run)
        if folder is not None:
            click.echo(f"{folder}: {tensorboard.export(found, folder):,} events")
        if table is not None and table != Path("-"):
            with table.open("w", encoding="utf-8", newline="") as file:
                rows = write_csv(found, file)
            click.echo(f"{table}: {rows:,} rows")
    if table == Path("-"):
        write_csv(found, sys.stdout)  # a reader that has seen enough, as head, is no error
    for remark in found.remarks:
        click.echo(f"distprop: {remark}", err=True)
