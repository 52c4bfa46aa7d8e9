"""`distprop bench`: what takes how long."""

from __future__ import annotations

import sys

import click

from distprop.cli.start import RANKS, SIZES, Refusal, parse_widths, start


@click.group(short_help="Measure this machine.")
def bench() -> None:
    """Measure this machine; every figure beside what it is compared with, in the same run."""


_STEPS = click.option("--steps", default=300, show_default=True, type=click.IntRange(1))


@bench.command(short_help="Time a step's parts beside a hand-written NumPy loop.")
@SIZES
@click.option("--batch", default=128, show_default=True, type=click.IntRange(1), help="Rows on each rank.")
@_STEPS
@RANKS
def step(sizes: str, batch: int, steps: int, ranks: int | None) -> None:
    """Time forward, backward, reduction and update of a step, beside a hand-written NumPy loop."""
    if ranks is not None:
        again = ["distprop", "bench", "step", "--sizes", sizes, "--batch", str(batch), "--steps", str(steps)]
        start(ranks, again, module=True)
    from distprop.bench.step import bench_step, show
    from distprop.comm import world

    widths, comm = parse_widths(sizes), world()
    times = bench_step(comm, widths, batch, steps)
    if comm.rank == 0:
        click.echo(show(times, widths, batch, comm.size))


@bench.command()
@SIZES
@click.option("--batch-size", default=1024, show_default=True, type=click.IntRange(1), help="Rows of the global batch.")
@click.option("--shards", default=8, show_default=True, type=click.IntRange(1), help="Pieces of a global batch.")
@_STEPS
@RANKS
def determinism(sizes: str, batch_size: int, shards: int, steps: int, ranks: int | None) -> None:
    """Time the deterministic mode beside the default one."""
    if ranks is not None:
        again = ["distprop", "bench", "determinism", "--sizes", sizes, "--batch-size", str(batch_size)]
        start(ranks, [*again, "--shards", str(shards), "--steps", str(steps)], module=True)
    from distprop.bench.determinism import bench_determinism, show
    from distprop.comm import world

    widths, comm = parse_widths(sizes), world()
    times = bench_determinism(comm, widths, batch_size, shards, steps)
    if comm.rank == 0:
        click.echo(show(times, widths, batch_size, shards, comm.size))


@bench.command(short_help="Time training with gradient health and without.")
@click.argument("networks", nargs=-1, metavar="[mlp|convolutional]...")
@click.option("--batch", default=128, show_default=True, type=click.IntRange(1), help="Rows on each rank.")
@click.option("--steps", default=1000, show_default=True, type=click.IntRange(1), help="With looks, and without.")
@RANKS
def health(networks: tuple[str, ...], batch: int, steps: int, ranks: int | None) -> None:
    """Time training with gradient health beside the same training without."""
    if ranks is not None:
        again = ["distprop", "bench", "health", *networks, "--batch", str(batch), "--steps", str(steps)]
        start(ranks, again, module=True)
    from distprop.bench.health import NETWORKS, bench_health, show
    from distprop.comm import world

    if unknown := set(networks) - set(NETWORKS):
        raise Refusal(f"no network {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    comm = world()
    for network in networks or NETWORKS:
        times = bench_health(comm, network, batch, steps)
        if comm.rank == 0:
            click.echo(show(network, times, batch, comm.size))


@bench.command(short_help="Time every operation beside PyTorch's.")
@click.argument("names", nargs=-1)
@click.option("--repeats", default=15, show_default=True, type=click.IntRange(1))
def ops(names: tuple[str, ...], repeats: int) -> None:
    """Time every operation (or those whose name contains one of NAMES) beside PyTorch's, on one thread, in ms."""
    import threadpoolctl

    from distprop.bench.ops import HEADER, bench_ops, cases, show, summary
    from distprop.environment import blas_description

    known = [case.name for case in cases()]
    if unknown := [name for name in names if not any(name in of_one for of_one in known)]:
        raise Refusal(f"no operation has {' or '.join(map(repr, unknown))} in its name; there are {', '.join(known)}")
    threadpoolctl.threadpool_limits(1, user_api="blas")
    click.echo(f"BLAS: {blas_description()}\n{HEADER}")
    table = []
    for times in bench_ops(names, repeats):
        table.append(times)
        click.echo(show(times))
    click.echo(summary(table))


@bench.command(short_help="Time the sum of an array beside MPI's own Allreduce.")
@click.option("--sizes", default=None, metavar="MB,MB", help="Millions of bytes; from 1 kB to 100 MB by default.")
@click.option("--repeats", default=None, type=click.IntRange(1), help="For each size; by default as its size allows.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@RANKS
def allreduce(sizes: str | None, repeats: int | None, as_json: bool, ranks: int | None) -> None:
    """Time the sum of an array over the ranks, beside the MPI library's own blocking Allreduce."""
    from distprop.bench import allreduce as measured

    megabytes = measured.SIZES if sizes is None else _megabytes(sizes)
    if ranks is not None:
        options = [("--sizes", sizes), ("--repeats", repeats)]
        again = [word for name, value in options if value is not None for word in (name, str(value))]
        start(ranks, ["distprop", "bench", "allreduce", *again, *["--json"] * as_json], module=True)
    import dataclasses
    import json

    from distprop.comm import mpi, world

    comm = world()
    if comm.size == 1:
        raise Refusal("one rank has nothing to add up; distprop bench allreduce -n 2")
    rows = list(measured.bench_allreduce(comm, mpi.MPICommunicator(share_memory=False), megabytes, repeats))
    if comm.rank == 0:
        table = [dataclasses.asdict(row) for row in rows]
        click.echo(json.dumps(table) if as_json else measured.show(rows, comm, mpi.library().name))


@bench.command(short_help="Time steps against model, batch, depth, ranks and dataset.")
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
    from distprop.hosts.probe import free_memory

    try:
        megabytes = [float(size) for size in sizes.split(",")]
    except ValueError:
        megabytes = []
    if not megabytes or not all(0 < size < float("inf") for size in megabytes):
        raise Refusal(f"--sizes takes positive numbers of MB with commas between them, got {sizes!r}")
    if 0 < (free := free_memory()) < max(megabytes) * 5e6:
        raise Refusal(f"--sizes {max(megabytes):g}: a rank takes 5 times as much, and {free / 1e6:,.0f} MB are free")
    return megabytes
