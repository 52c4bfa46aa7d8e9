"""The charts of the report: curves, gradient health by layer, and where each rank's time went.

They are made of the lines of `metrics.jsonl` and, for a profiled run, of its trace. Where a run has no numbers for one,
its place says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from distprop import svg
from distprop.rundir import Run, RunDirError
from distprop.timeline import PHASES
from distprop.trace import describe_path, read_trace, summarise
from distprop.verdicts import advice_about_ranks

_PHASE_COLOURS = {phase: f"var(--phase{number})" for number, phase in enumerate(PHASES)}
_MANY_ROWS = 40  # of a heat map; biases have none where there are more
_RESULT_KEYS = {"step", "epoch", "loss", "lr", "examples", "seconds"}


def curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Training values of each step, validation values of each epoch, all runs in one chart."""
    metrics = sorted({k for run in runs for line in run.steps[:1] + run.steps[-1:] for k in line} - _RESULT_KEYS)
    charts = []
    for key in ["loss", *metrics]:
        drawn = []
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            colour, label = colour_of(number), f"{name} " if len(runs) > 1 else ""
            drawn.append(svg.Line(f"{label}training", *_series(run.steps, key), colour))
            steps, values = _series(run.epochs, f"validation_{key}")
            if len(steps):
                second = colour if len(runs) > 1 else colour_of(1)
                drawn.append(svg.Line(f"{label}validation", steps, values, second, dots=True, dashed=True))
        linear = False if key.endswith("accuracy") else None
        charts.append(svg.lines(spoken(key), [curve for curve in drawn if len(curve.x)], logarithmic=linear))
    lrs = [
        svg.Line(name, *_series(run.steps, "lr"), colour_of(number))
        for number, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    charts.append(svg.lines("learning rate", [lr for lr in lrs if len(lr.x)]))
    return f'<div class="charts">{"".join(charts)}</div>'


def health(run: Run, number: int) -> str:
    """Heat maps by layer over the steps, and the noise scale."""
    if not run.health:
        return '<p class="note">This run recorded no gradient health.</p>'
    steps = [float(line["step"]) for line in run.health]
    layers = list(dict.fromkeys(name for line in run.health for name in line["health"]))
    weights = [name for name in layers if not name.rpartition(".")[2].startswith("bias")]
    left_out = len(layers) - len(weights) if len(layers) > _MANY_ROWS and weights else 0
    layers = weights if left_out else layers
    units = list(dict.fromkeys(name for line in run.health for name in line.get("units") or {}))
    charts = [
        svg.heat_map("norm of the gradient", layers, steps, _matrix(run.health, "health", layers, "grad_norm")),
        svg.heat_map(
            "update-to-weight ratio",
            layers,
            steps,
            _matrix(run.health, "health", layers, "update_ratio"),
            "About 0.001 is usual; far above it a layer jumps about, far below it stands still.",
        ),
        svg.heat_map("norm of the weights", layers, steps, _matrix(run.health, "health", layers, "weight_norm")),
    ]
    for key in ("dead", "saturated"):
        values = _matrix(run.health, "units", units, key)
        shown = [i for i in range(len(units)) if np.nanmax(values[i], initial=0) > 0]
        if shown:
            names, title = [units[i] for i in shown], f"share of {key} units"
            charts.append(svg.heat_map(title, names, steps, values[shown], logarithmic=False))
    if any("noise_scale" in line for line in run.health):
        scales = [number_in(line["noise_scale"]) for line in run.health if "noise_scale" in line]
        batch = number_in(run.last_session.get("batch_size"))
        note = "A global batch far below it gains by more ranks; far above it they are wasted."
        if math.isfinite(scales[-1]) and math.isfinite(batch):
            note = advice_about_ranks(scales[-1], batch)
        curve = svg.Line("noise scale", *_series(run.health, "noise_scale"), colour_of(number))
        charts.append(svg.lines("gradient noise scale, in examples", [curve], note=note))
    remark = f'<p class="note">{left_out} biases are left out of these charts.</p>' if left_out else ""
    return "".join(charts) + remark


def rates(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Samples a second in every step, all runs in one chart."""
    drawn = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        lines = [line for line in run.steps if number_in(line.get("seconds")) > 0]
        values = [number_in(line.get("examples")) / line["seconds"] for line in lines]
        if values:
            colour = colour_of(number)
            drawn.append(svg.Line(name, [line["step"] for line in lines], values, colour))
    return f'<div class="charts">{svg.lines("samples a second, without waiting for data", drawn)}</div>'


def times(run: Run, number: int) -> str:
    """Where each rank's time went, how even the ranks were, and the profile's critical path if there is one."""
    sums = _seconds_by_rank(run)
    ranks = max(map(len, sums.values()), default=0)
    if not ranks:
        parts = ['<p class="note">No epoch has ended, so there are no times by rank yet.</p>']
    else:
        shown = [(p, _PHASE_COLOURS.get(p, "var(--muted)"), v) for p, v in sums.items() if any(v)]
        bars = svg.stacked_bars("where the time went", [f"rank {rank}" for rank in range(ranks)], shown)
        parts = [f"<div>{bars}{_imbalance(sums, ranks)}</div>"]
    parts.append(_compute_over_time(run))
    try:
        summary = summarise(read_trace(run.path))
    except RunDirError:
        return "".join(parts)
    slowest = sorted(summary.layers.items(), key=lambda item: -sum(item[1]))[:10]
    per_step = 1e3 / max(1, summary.steps)
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{forward * per_step:.3f}</td><td>{backward * per_step:.3f}</td></tr>"
        for name, (forward, backward) in slowest
    )
    path = "".join(f"<p>{escape(line)}</p>" for line in describe_path(summary))
    parts.append(
        f"<div><h4>Profile of {summary.steps} steps</h4>{path}"
        f"<table><tr><th>ms a step</th><th>forward</th><th>backward</th></tr>{rows}</table></div>"
    )
    return "".join(parts)


def colour_of(number: int) -> str:
    """The colour of a run, or of a rank, by its number."""
    return f"var(--run{number % 6})"


def spoken(key: str) -> str:
    """A key of `metrics.jsonl` for people."""
    return "loss" if key == "epoch_loss" else key.replace("_", " ")


def number_in(value: object) -> float:
    """What a line says; NaN for what is no number, as NaN and infinity are in JSON."""
    return float(value) if isinstance(value, int | float) else math.nan


def _seconds_by_rank(run: Run) -> dict[str, list[float]]:
    """For each phase a number by rank, over the epochs on the last number of ranks."""
    tables = [
        {phase: [number_in(value) for value in values] for phase, values in line["seconds"].items()}
        for line in run.epochs
        if isinstance(line.get("seconds"), dict) and all(isinstance(row, list) for row in line["seconds"].values())
    ]
    sums: dict[str, list[float]] = {}
    for table in reversed(tables):
        for phase, values in table.items():
            if len(values) == len(next(iter(tables[-1].values()))):
                sums[phase] = [a + b for a, b in zip(sums.get(phase, [0.0] * len(values)), values, strict=True)]
    return {phase: values for phase, values in sums.items() if all(map(math.isfinite, values))}


def _compute_over_time(run: Run) -> str:
    """Each rank's time in a step without reductions, where the health lines have it."""
    measured = [
        (line["step"], line["seconds"]["compute"])
        for line in run.health
        if isinstance(line.get("seconds"), dict) and isinstance(line["seconds"].get("compute"), list)
    ]
    ranks = max((len(values) for _, values in measured), default=0)
    curves = []
    for rank in range(min(ranks, 64)):
        of_rank = [(step, 1e3 * number_in(values[rank])) for step, values in measured if len(values) > rank]
        of_rank = [(step, value) for step, value in of_rank if math.isfinite(value)]
        colour = colour_of(rank)
        if of_rank:
            steps, values = zip(*of_rank, strict=True)
            curves.append(svg.Line(f"rank {rank}", steps, values, colour))
    return svg.lines("computing, ms a step", curves) if curves else ""


def _imbalance(sums: Mapping[str, Sequence[float]], ranks: int) -> str:
    """In words: which rank works longest, and what the others lose by it."""
    if ranks < 2:
        return ""
    own = [sum(sums.get(phase, [0] * ranks)[r] for phase in ("data", "forward", "backward")) for r in range(ranks)]
    mean = sum(own) / ranks
    if not mean:
        return ""
    slowest = max(range(ranks), key=own.__getitem__)
    total = sum(map(sum, sums.values()))
    share = sum(sums.get("reduction", [])) / total if total else 0.0
    return (
        f"<p>Rank imbalance: rank {slowest} computes longest, {own[slowest] / mean - 1:.1%} more than the mean. "
        f"{share:.0%} of all time went into reductions, waiting for later ranks included.</p>"
    )


def _matrix(lines: Sequence[Mapping[str, Any]], part: str, rows: Sequence[str], key: str) -> svg.Numbers:
    """`(rows, lines)`; NaN where nothing was recorded, infinity where the value was not finite."""
    values = np.full((len(rows), len(lines)), np.nan)
    for j, line in enumerate(lines):
        of_line = line.get(part) or {}
        for i, row in enumerate(rows):
            entry = of_line.get(row)
            if isinstance(entry, dict) and key in entry:
                value = number_in(entry[key])
                values[i, j] = value if math.isfinite(value) and not entry.get("bad") else math.inf
    return values


def _series(lines: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values; a value that is no number, as NaN is in JSON, is NaN."""
    found = [(float(line["step"]), number_in(line[key])) for line in lines if key in line]
    return [step for step, _ in found], [value for _, value in found]
