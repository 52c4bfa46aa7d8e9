"""`distprop replay`: one rank's step of a run, made again, with its numbers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distprop.cli.start import refusing

if TYPE_CHECKING:
    from distprop.tape import Array


@click.command(short_help="Make one rank's step of a run again, without MPI.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=int, required=True, metavar="S", help="Which update, 1 for the first.")
@click.option("--rank", type=int, required=True, metavar="R", help="Whose share of it.")
@click.option("-i", "--interactive", is_flag=True, help="Then open a Python prompt with the arrays.")
@click.option(
    "--compare", "other", type=click.Path(path_type=Path), metavar="NPZ", help="Name the first array that differs."
)
@click.option("--script", type=click.Path(path_type=Path), help="Where the script of the run is now, if it has moved.")
def replay(run: Path, step: int, rank: int, interactive: bool, other: Path | None, script: Path | None) -> None:
    """Make one rank's step of RUN again, in this process without MPI, and show its numbers.

    Inputs, activations and gradients of every layer go to RUN/replay/step-S-rank-R.npz. The run's program is started
    again and goes on from the newest checkpoint before the step; nothing else in RUN is changed. With --compare the
    exit status is 1 if a number differs.
    """
    from distprop import numbers
    from distprop.hosts.hostfile import count
    from distprop.replay import ReplayError, plan
    from distprop.replay import replay as make

    with refusing(ReplayError, numbers.NumbersError, OSError):
        wanted = plan(run, step, rank, script=script)
        of_other = numbers.load(other) if other is not None else None
        for remark in wanted.remarks:
            click.echo(f"distprop: {remark}", err=True)
        if (steps := wanted.step - wanted.begins) > 1:
            on = count(wanted.size, "rank")
            click.echo(f"distprop: makes {steps} steps on {on}, from step {wanted.begins}", err=True)
        made = make(wanted)
    click.echo(f"{made.summary}\n\n{numbers.table(made.arrays, made.kinds)}\n")
    if bad := numbers.first_not_finite(made.arrays, made.kinds):
        click.echo(bad)
    different = None
    if of_other is not None:
        different = numbers.difference(made.arrays, of_other)
        click.echo(f"{different}\n" if different else f"all {len(made.arrays)} arrays are those of {other}, to the bit")
    _drop_in(made.arrays, made.path, interactive)
    sys.exit(1 if different else 0)


def _drop_in(arrays: Mapping[str, Array], path: Path, interactive: bool) -> None:
    """Open a prompt if it was asked for and there is a terminal; otherwise say how to get at the numbers."""
    hint = f'numpy.load("{path}")["output"]'
    if not (interactive and sys.stdin.isatty()):
        click.echo(f"saved for {hint} and so on")
        return
    import code

    import numpy

    banner = f'numbers["output"] and so on are the arrays; numbers.keys() lists them. They are saved for {hint}'
    code.interact(banner, local={"numbers": dict(arrays), "numpy": numpy, "np": numpy}, exitmsg="")
