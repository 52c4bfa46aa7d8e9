"""One HTML file about a run, or about several side by side: what it was, how it went, what was wrong, where time went.

The file is complete: styles and charts are in it, nothing is loaded from anywhere, and no script runs. A section for
which a run has no numbers says so, since a run that has just begun, or crashed, is as worth looking at as any other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from distprop.run_charts import colour_of, curves, health, number_in, rates, spoken, times
from distprop.rundir import Run
from distprop.stylesheet import STYLE

_STATES = {"finished": "good", "going": "busy", "stopped": "busy", "failed": "wrong", "died": "wrong"}


def page(runs: Sequence[Run]) -> str:
    """The HTML text of a report about `runs`, one or more of them."""
    names = _names(runs)
    title = "distprop: " + ", ".join(names)
    sections = [
        _overview(runs, names),
        _verdicts(runs, names),
        _section("Curves", curves(runs, names)),
        _section("Gradient health", _side_by_side(runs, names, health)),
        _section("Time", rates(runs, names) + _side_by_side(runs, names, times)),
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
        *((f"{spoken(key)} of the last epoch", [_last(run.epochs, key) for run in runs]) for key in _epoch_keys(runs)),
        ("ranks", [_ranks(run) for run in runs]),
        ("parameters", [f"{s['parameters']:,}" if (s := run.last_session).get("parameters") else "–" for run in runs]),
        ("time in steps", [_duration(_seconds(run)) for run in runs]),
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
        losses = [number_in(line.get("loss")) for line in run.steps]
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


def _last(lines: Sequence[Mapping[str, Any]], key: str) -> str:
    if not lines or key not in lines[-1]:
        return "–"
    value = number_in(lines[-1][key])
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2%}" if key.endswith("accuracy") else f"{value:.4g}"


def _epoch_keys(runs: Sequence[Run]) -> list[str]:
    keys = dict.fromkeys(key for run in runs for line in run.epochs[-1:] for key in line)
    return [key for key in keys if key not in {"epoch", "step", "seconds"}]


def _seconds(run: Run) -> float:
    return sum(seconds for line in run.steps if math.isfinite(seconds := number_in(line.get("seconds"))))


def _samples_a_second(run: Run) -> str:
    lines = [line for line in run.steps if number_in(line.get("seconds")) > 0]
    seconds = sum(line["seconds"] for line in lines)
    return f"{sum(number_in(line.get('examples')) for line in lines) / seconds:,.0f}" if seconds else "–"


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
    return f'<i class="swatch" style="background:{colour_of(number)}"></i>'
