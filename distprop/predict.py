"""The command `distprop predict`: what it measures, what it is told, what it assumes, and how it says so."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distprop.cost import Cluster, Link
from distprop.forecast import Forecast, Scaling, Steps, parse_link, parse_seconds, predict, verdicts

if TYPE_CHECKING:
    from distprop.bench.cluster import Measured
    from distprop.bench.workload import Workload
    from distprop.comm import Communicator
    from distprop.hosts import Host

ASSUMED_NETWORK = "10gbit,50us"  # where one host was measured and no network named


@dataclass(frozen=True)
class Question:
    """The command's options. Links and times are as typed; a mistake in one is a ValueError."""

    config: Path | None
    widths: tuple[int, ...]
    batch: int | None = None
    scaling: Scaling | None = None
    network: str | None = None
    within: str | None = None
    step_time: str | None = None
    ranks_per_host: int | None = None

    def __post_init__(self) -> None:
        for text in filter(None, (self.network, self.within)):
            parse_link(text)
        if self.step_time and not parse_seconds(self.step_time):
            raise ValueError("--step-time must be more than 0")
        if self.config:
            from distprop.config import load_config

            load_config(self.config)  # before any rank starts, each of which would refuse it

    def words(self) -> list[str]:
        """The command line of a rank that measures."""
        words = [str(self.config)] if self.config else ["--sizes", ",".join(map(str, self.widths))]
        words += ["--batch", str(self.batch)] if self.batch else []
        return [*words, "--measure"]

    @property
    def is_told_everything(self) -> bool:
        """Whether there is nothing to measure."""
        return bool(self.step_time and self.network and (self.within or (self.ranks_per_host or 1) == 1))

    def workload(self) -> tuple[Workload, int]:
        """What is trained, and the batch."""
        from distprop.bench import workload
        from distprop.config import load_config

        if self.config is None:
            return workload.network(self.widths), self.batch or 128
        config = load_config(self.config)
        return workload.configured(config), self.batch or config.train.batch_size

    def measure(self, comm: Communicator) -> Measured:
        """Measure on these ranks, all of them computing at once. Collective."""
        from distprop.bench.cluster import measure

        workload, batch = self.workload()
        return measure(comm, workload, batch)


def measure_here(question: Question, ranks: int | None, hosts: Sequence[Host] = ()) -> Measured | None:
    """Measure on `hosts`, or on `ranks` ranks of this one: by default one for each core, or one alone without MPI.

    In a Slurm job on its nodes, by default on all its slots.

    Raises:
        ValueError: the ranks could not be started, or did not come to an end.
        HostsError: the hosts cannot run them.
    """
    from distprop import slurm
    from distprop.bench.cluster import Measured
    from distprop.comm import SoloCommunicator
    from distprop.comm.mpi import MPIMissingError
    from distprop.launch import allowed_cores, ask, plan
    from distprop.launcher import LaunchError

    wanted = ranks if ranks is not None or hosts or slurm.job_name() else allowed_cores()
    if wanted == 1 and not hosts:
        return question.measure(SoloCommunicator())
    try:
        program, files = ["distprop", "predict", *question.words()], [str(question.config)] * bool(question.config)
        job = plan(wanted, program, module=True, hosts=hosts, files=files)
    except (LaunchError, MPIMissingError) as error:
        if ranks is not None or hosts:
            raise ValueError(str(error)) from error
        print(f"distprop: measuring one rank alone, because {error}", file=sys.stderr)
        return question.measure(SoloCommunicator())
    print(f"distprop: measuring on {job.description}", file=sys.stderr, flush=True)
    status, line = ask(job)
    if status or not line:
        raise ValueError(f"the measurement on {job.ranks} ranks ended with status {status}")
    return Measured.from_json(line)


@dataclass(frozen=True)
class Answer:
    """A prediction with all that it rests on. `notes` say of each figure whether it was measured, given or assumed."""

    name: str
    batch: int
    scaling: Scaling
    steps: Steps
    cluster: Cluster
    forecasts: tuple[Forecast, ...]
    notes: tuple[str, ...]
    measured: Measured | None
    measured_ranks: Forecast | None  # the same ranks as in `measured`, whose real step was timed

    def points(self) -> list[tuple[float, float]]:
        """Ranks and speed-up, to be drawn."""
        return [(forecast.ranks, forecast.speedup) for forecast in self.forecasts]

    def to_json(self) -> str:
        """One line."""
        values = asdict(self) | {"verdicts": verdicts(self.forecasts)}
        for forecast, row in zip(self.forecasts, values["forecasts"], strict=True):
            row["efficiency"] = forecast.efficiency
        return json.dumps(values)


def answer(question: Question, measured: Measured | None) -> Answer:
    """What follows from the options and the measurement; an option wins over what was measured.

    Raises:
        ValueError: there are several ranks a host, but nothing says how fast they exchange messages.
    """
    if measured is not None and not question.step_time:
        name, batch = measured.name, measured.batch
        steps = Steps(measured.rows, measured.seconds, measured.message_bytes)
    else:
        workload, batch = question.workload()
        name, taken = workload.name, parse_seconds(question.step_time or "")
        steps = Steps((0.0, float(batch)), (0.0, taken), workload.message_bytes)
    per_host = question.ranks_per_host or (measured.ranks_per_host if measured else 1)
    within, between = measured.within if measured else None, measured.between if measured else None
    origin = "measured"
    if question.within:
        within, origin = parse_link(question.within), "given"
    if within is None and per_host > 1:
        raise ValueError(
            f"nothing says how fast {per_host} ranks of a host exchange messages: measure with -n {per_host}, or give "
            "--within RATE,LATENCY"
        )
    notes = [f"step: {f'measured on {_who(measured)}' if measured and not question.step_time else 'given'}"]
    if within is not None and per_host > 1:
        notes.append(f"within a host: {per_host} ranks, {describe(within)} ({origin})")
    network = question.network or ("" if between else ASSUMED_NETWORK)
    between = parse_link(network) if network else between
    assert between is not None
    origin = "given" if question.network else "assumed: say --network RATE,LATENCY" if network else "measured"
    notes.append(f"between hosts: {describe(between)} ({origin})")
    cluster = Cluster(per_host, within or between, between)
    for option, link, ranks in (("--within", within, per_host), ("--network", between, 2)):
        if link is not None and ranks > 1 and math.isinf(link.gigabits):
            raise ValueError(
                f"a message of {steps.message_bytes:,} bytes took no longer than one of 8, so its rate is unknown: "
                f"the machine was busy, or the message is too small. Measure again, or give {option} RATE,LATENCY"
            )
    check = _check(measured, steps, cluster, batch) if not question.step_time else None
    if measured and measured.step_seconds and check:
        difference = check.step_seconds / measured.step_seconds - 1
        notes.append(
            f"check: {measured.ranks} ranks measured together take {show_time(measured.step_seconds)} a step, "
            f"predicted {show_time(check.step_seconds)} ({difference:+.1%})"
        )
    scaling = question.scaling or ("strong" if question.config else "weak")
    forecasts = tuple(predict(steps, cluster, batch, scaling))
    return Answer(name, batch, scaling, steps, cluster, forecasts, tuple(notes), measured, check)


def _check(measured: Measured | None, steps: Steps, cluster: Cluster, batch: int) -> Forecast | None:
    """What is predicted for the ranks that were measured."""
    if measured is None or measured.step_seconds is None or cluster.ranks_per_host != measured.ranks_per_host:
        return None
    return predict(steps, cluster, batch, "weak", [measured.ranks])[0]


def _who(measured: Measured) -> str:
    ranks, (first, *others) = measured.ranks, measured.hosts
    alone = "this host" if first == os.uname().nodename else first
    return f"{ranks} rank{'s' * (ranks > 1)} of {f'{1 + len(others)} hosts' if others else alone}"


def show(answer: Answer) -> None:
    """Print where the figures come from, the table, the plot and the verdict."""
    from rich.console import Console
    from rich.table import Table

    from distprop.chart import as_text

    console, weak = Console(highlight=False), answer.scaling == "weak"
    kept = "on each rank (weak scaling)" if weak else "in the global batch (strong scaling)"
    sent = f"{answer.steps.message_bytes / 1e6:.3g} MB"
    title = f"{answer.name}: {answer.batch:,} rows {kept}; a step sends {sent}"
    console.print(title, *answer.notes, "", sep="\n", soft_wrap=True)
    table, needed = Table(box=None, pad_edge=False), "rows a rank" if weak else "batch"
    for heading in ("ranks", "hosts", "step", "Allreduce", "samples/s", "efficiency", f"{needed} for 90 %"):
        table.add_column(heading, justify="right")
    for forecast in answer.forecasts:
        enough = forecast.enough_rows * (1 if weak else forecast.ranks)
        several = forecast.ranks > 1
        table.add_row(
            f"{forecast.ranks:,}",
            f"{forecast.hosts:,}",
            show_time(forecast.step_seconds),
            show_time(forecast.allreduce_seconds) if several else "",
            f"{forecast.rate:,.0f}",
            f"{forecast.efficiency:.1%}",
            f"{enough:,.0f}" if several else "",
        )
    console.print(table)
    console.print(f"\nspeed-up over one rank (* predicted, . ideal)\n{as_text(answer.points())}\n", markup=False)
    for line in verdicts(answer.forecasts):
        console.print(f"[bold]{line}[/bold]", soft_wrap=True)


def describe(link: Link) -> str:
    """A link in the units of `parse_link`; the rate is that of the data.

    >>> describe(Link(1e-5, 8e-10)), describe(Link(1e-5, 0.0))
    ('10 Gbit/s, 10 µs', 'a rate lost in the noise, 10 µs')
    """
    rate = f"{link.gigabits:.3g} Gbit/s" if math.isfinite(link.gigabits) else "a rate lost in the noise"
    return f"{rate}, {show_time(link.latency)}"


def show_time(seconds: float) -> str:
    """Three digits and the unit that suits.

    >>> show_time(0.00123)
    '1.23 ms'
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs"
