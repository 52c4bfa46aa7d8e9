"""One HTML file about a run, or about several side by side: what it was, how it went, what was wrong, where time went.

The file is complete: styles and charts are in it, nothing is loaded from anywhere, and no script runs. A section for
which a run has no numbers says so, since a run that has just begun, or crashed, is as worth looking at as any other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from distprop import svg
from distprop.rundir import Run, RunDirError
from distprop.stylesheet import STYLE
from distprop.timeline import PHASES
from distprop.trace import describe_path, read_trace, summarise
from distprop.verdicts import advice_about_ranks

_RUN_COLOURS = [f"var(--run{number})" for number in range(6)]
_PHASE_COLOURS = {phase: f"var(--phase{number})" for number, phase in enumerate(PHASES)}
_STATES = {"finished": "good", "going": "busy", "stopped": "busy", "failed": "wrong", "died": "wrong"}
_MANY_ROWS = 40  # of a heat map; biases have none where there are more
_RESULT_KEYS = {"step", "epoch", "loss", "lr", "examples", "seconds"}


def page(runs: Sequence[Run]) -> str:
    """The HTML text of a report about `runs`, one or more of them."""
    names = _names(runs)
    title = "distprop: " + ", ".join(names)
    sections = [
        _overview(runs, names),
        _verdicts(runs, names),
        _section("Curves", _curves(runs, names)),
        _section("Gradient health", _side_by_side(runs, names, _health)),
        _section("Time", _rates(runs, names) + _side_by_side(runs, names, _times)),
        _configuration(runs, names),
        _environment(runs, names),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f"<h1>{escape(', '.join(names))}</h1>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def _overview(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = [
        ("state", [_state(run) for run in runs]),
        ("steps", [f"{run.steps[-1]['step']:,}" if run.steps else "0" for run in runs]),
        ("loss of the last step", [_last(run.steps, "loss") for run in runs]),
        *((f"{_spoken(key)} of the last epoch", [_last(run.epochs, key) for run in runs]) for key in _epoch_keys(runs)),
        ("ranks", [_ranks(run) for run in runs]),
        ("parameters", [f"{s['parameters']:,}" if (s := run.last_session).get("parameters") else "–" for run in runs]),
        ("time in steps", [_duration(sum(_finite(run.steps, "seconds"))) for run in runs]),
        ("samples a second", [_samples_a_second(run) for run in runs]),
    ]
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>" for name, values in rows
    )
    remarks = "".join(
        f'<p class="note">{escape(name)}: {escape(remark)}</p>'
        for run, name in zip(runs, names, strict=True)
        for remark in run.remarks
    )
    return f'<section><div class="scroll"><table>{_heads(names)}{body}</table></div>{remarks}</section>'


def _verdicts(runs: Sequence[Run], names: Sequence[str]) -> str:
    items = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        who = f"{_swatch(number)}{escape(name)}: " if len(runs) > 1 else ""
        error = run.last_session.get("error")
        if error:
            items.append(f'<li class="wrong">{who}{escape(str(error))}</li>')
        if run.state == "died":
            silence = f"no word for {_duration(run.silent_seconds)} and no end: it was killed, or hangs"
            items.append(f'<li class="wrong">{who}{silence}</li>')
        losses = [_number(line.get("loss")) for line in run.steps]
        bad = [line["step"] for line, loss in zip(run.steps, losses, strict=True) if not math.isfinite(loss)]
        if bad:
            items.append(
                f'<li class="wrong">{who}the loss was not finite in {len(bad):,} of {len(losses):,} steps, '
                f"first in step {bad[0]:,}</li>"
            )
        first: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for verdict in run.verdicts:
            first.setdefault((str(verdict.get("kind")), str(verdict.get("layer"))), []).append(verdict)
        for (kind, _), said in first.items():
            steps = f"step {said[0]['step']:,}" + (f", and {len(said) - 1} times more" if len(said) > 1 else "")
            text = re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(str(said[-1].get("text", kind))))
            items.append(f'<li class="warn">{who}{text} <small>({escape(kind)}, {steps})</small></li>')
    if not items:
        items = ['<li class="fine">nothing wrong was noticed</li>']
    return _section("Verdicts", f'<ul class="verdicts">{"".join(items)}</ul>')


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Training values of each step, validation values of each epoch, all runs in one chart."""
    metrics = sorted({k for run in runs for line in run.steps[:1] + run.steps[-1:] for k in line} - _RESULT_KEYS)
    charts = []
    for key in ["loss", *metrics]:
        curves = []
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            colour, label = _RUN_COLOURS[number % len(_RUN_COLOURS)], f"{name} " if len(runs) > 1 else ""
            curves.append(svg.Line(f"{label}training", *_series(run.steps, key), colour))
            steps, values = _series(run.epochs, f"validation_{key}")
            if len(steps):
                second = colour if len(runs) > 1 else _RUN_COLOURS[1]
                curves.append(svg.Line(f"{label}validation", steps, values, second, dots=True, dashed=True))
        linear = False if key.endswith("accuracy") else None
        charts.append(svg.lines(_spoken(key), [curve for curve in curves if len(curve.x)], logarithmic=linear))
    rates = [
        svg.Line(name, *_series(run.steps, "lr"), _RUN_COLOURS[number % len(_RUN_COLOURS)])
        for number, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    charts.append(svg.lines("learning rate", [rate for rate in rates if len(rate.x)]))
    return f'<div class="charts">{"".join(charts)}</div>'


def _health(run: Run, number: int) -> str:
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
        scales = [_number(line["noise_scale"]) for line in run.health if "noise_scale" in line]
        batch = _number(run.last_session.get("batch_size"))
        note = "A global batch far below it gains by more ranks; far above it they are wasted."
        if math.isfinite(scales[-1]) and math.isfinite(batch):
            note = advice_about_ranks(scales[-1], batch)
        curve = svg.Line("noise scale", *_series(run.health, "noise_scale"), _RUN_COLOURS[number % len(_RUN_COLOURS)])
        charts.append(svg.lines("gradient noise scale, in examples", [curve], note=note))
    remark = f'<p class="note">{left_out} biases are left out of these charts.</p>' if left_out else ""
    return "".join(charts) + remark


def _rates(runs: Sequence[Run], names: Sequence[str]) -> str:
    curves = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        lines = [line for line in run.steps if _number(line.get("seconds")) > 0]
        rates = [_number(line.get("examples")) / line["seconds"] for line in lines]
        if rates:
            colour = _RUN_COLOURS[number % len(_RUN_COLOURS)]
            curves.append(svg.Line(name, [line["step"] for line in lines], rates, colour))
    return f'<div class="charts">{svg.lines("samples a second, without waiting for data", curves)}</div>'


def _times(run: Run, number: int) -> str:
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


def _seconds_by_rank(run: Run) -> dict[str, list[float]]:
    """For each phase a number by rank, over the epochs on the last number of ranks."""
    tables = [
        {phase: [_number(value) for value in values] for phase, values in line["seconds"].items()}
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
        of_rank = [(step, 1e3 * _number(values[rank])) for step, values in measured if len(values) > rank]
        of_rank = [(step, value) for step, value in of_rank if math.isfinite(value)]
        colour = _RUN_COLOURS[rank % len(_RUN_COLOURS)]
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


def _configuration(runs: Sequence[Run], names: Sequence[str]) -> str:
    flat = [run.config or _settings(run) for run in runs]
    models = [run.last_session.get("model") for run in runs]
    blocks = "".join(
        f"<details><summary>model of {escape(name)}</summary><pre>{escape(str(model))}</pre></details>"
        for name, model in zip(names, models, strict=True)
        if model
    )
    return _section("Configuration", _table(flat, names) + blocks)


def _environment(runs: Sequence[Run], names: Sequence[str]) -> str:
    flat = []
    for run in runs:
        session = run.last_session
        hosts = session.get("hosts") or []
        flat.append(
            {
                **(session.get("environment") or {}),
                "hosts": ", ".join(f"{host} × {hosts.count(host)}" for host in dict.fromkeys(hosts)),
                "began": ", ".join(str(s.get("began")) for s in run.sessions),
                "ended": session.get("ended"),
                "run folder": str(run.path),
            }
        )
    return _section("Environment", _table(flat, names))


def _settings(run: Run) -> dict[str, Any]:
    hidden = {"environment", "hosts", "began", "ended", "error", "stopped", "model", "ranks", "from_step"}
    return {key: value for key, value in run.last_session.items() if key not in hidden}


def _table(columns: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """A row for each key; those in which the runs differ are marked."""
    keys = list(dict.fromkeys(key for column in columns for key in column))
    if not keys:
        return '<p class="note">The folder says nothing about it.</p>'
    rows = []
    for key in keys:
        values = ["–" if (value := column.get(key)) in (None, "") else str(value) for column in columns]
        kind = ' class="differs"' if len(set(values)) > 1 else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        rows.append(f"<tr{kind}><th>{escape(key)}</th>{cells}</tr>")
    return f'<div class="scroll"><table>{_heads(names)}{"".join(rows)}</table></div>'


def _heads(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    return (
        f"<tr><th></th>{''.join(f'<th>{_swatch(number)}{escape(name)}</th>' for number, name in enumerate(names))}</tr>"
    )


def _side_by_side(runs: Sequence[Run], names: Sequence[str], content: Callable[[Run, int], str]) -> str:
    """A column for each run; a single run has as many as fit."""
    if len(runs) == 1:
        return f'<div class="charts">{content(runs[0], 0)}</div>'
    columns = [
        f"<div><h3>{_swatch(number)}{escape(name)}</h3>{content(run, number)}</div>"
        for number, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    return f'<div class="columns">{"".join(columns)}</div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with as much of the path as tells them apart."""
    paths = [run.path.resolve() for run in runs]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def _matrix(lines: Sequence[Mapping[str, Any]], part: str, rows: Sequence[str], key: str) -> svg.Numbers:
    """`(rows, lines)`; NaN where nothing was recorded, infinity where the value was not finite."""
    values = np.full((len(rows), len(lines)), np.nan)
    for j, line in enumerate(lines):
        of_line = line.get(part) or {}
        for i, row in enumerate(rows):
            entry = of_line.get(row)
            if isinstance(entry, dict) and key in entry:
                value = _number(entry[key])
                values[i, j] = value if math.isfinite(value) and not entry.get("bad") else math.inf
    return values


def _series(lines: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values; a value that is no number, as NaN is in JSON, is NaN."""
    found = [(float(line["step"]), _number(line[key])) for line in lines if key in line]
    return [step for step, _ in found], [value for _, value in found]


def _finite(lines: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [value for line in lines if math.isfinite(value := _number(line.get(key)))]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _last(lines: Sequence[Mapping[str, Any]], key: str) -> str:
    if not lines or key not in lines[-1]:
        return "–"
    value = _number(lines[-1][key])
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2%}" if key.endswith("accuracy") else f"{value:.4g}"


def _epoch_keys(runs: Sequence[Run]) -> list[str]:
    keys = dict.fromkeys(key for run in runs for line in run.epochs[-1:] for key in line)
    return [key for key in keys if key not in {"epoch", "step", "seconds"}]


def _spoken(key: str) -> str:
    return "loss" if key == "epoch_loss" else key.replace("_", " ")


def _samples_a_second(run: Run) -> str:
    lines = [line for line in run.steps if _number(line.get("seconds")) > 0]
    seconds = sum(line["seconds"] for line in lines)
    return f"{sum(_number(line.get('examples')) for line in lines) / seconds:,.0f}" if seconds else "–"


def _ranks(run: Run) -> str:
    return ", then ".join(str(entry.get("ranks", "?")) for entry in run.sessions[-3:]) or "–"


def _state(run: Run) -> str:
    return f'<span class="state {_STATES[run.state]}">{run.state}</span>'


def _duration(seconds: float) -> str:
    """As people say it.

    >>> _duration(12.34), _duration(3725)
    ('12.3 s', '1 h 02 min')
    """
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, hours = int(seconds // 60 % 60), int(seconds // 3600)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {int(seconds % 60):02d} s"


def _swatch(number: int) -> str:
    return f'<i class="swatch" style="background:{_RUN_COLOURS[number % len(_RUN_COLOURS)]}"></i>'
