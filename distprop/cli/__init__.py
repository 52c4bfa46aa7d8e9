"""The command `distprop`. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import click

from distprop.cli.benchmarks import bench
from distprop.cli.machine import doctor_command, predict_command
from distprop.cli.replay import replay
from distprop.cli.results import export, fingerprint, report, trace
from distprop.cli.run import run_command, train_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distprop")
def main() -> None:
    """Data-parallel training on CPUs: NumPy and MPI."""


_COMMANDS = (
    run_command,
    train_command,
    doctor_command,
    predict_command,
    report,
    trace,
    export,
    fingerprint,
    replay,
    bench,
)
for command in _COMMANDS:
    main.add_command(command)
