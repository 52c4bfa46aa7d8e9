"""Charts as SVG text: lines, heat maps, stacked bars. Plain functions of numbers, with nothing to load.

Colours are CSS variables of the page, so a chart follows its light or dark theme; what a mark stands for is in its
`<title>`, which browsers show when the mouse rests on it. Numbers that are not finite are left out, and said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
WIDTH, HEIGHT = 560, 220  # of a chart, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34
_COLUMNS = 240  # of a heat map, and points of a line: a screen shows no more
_CELLS = 6000  # of a heat map, about; each is 150 bytes
_LADDER = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # dark to light, in equal steps


@dataclass(frozen=True)
class Line:
    """A curve: `colour` is a CSS colour; `dots` draws its points and not only what joins them."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dots: bool = False
    dashed: bool = False


def lines(title: str, curves: Sequence[Line], logarithmic: bool | None = None, note: str = "") -> str:
    """A chart of `curves` over the step. The axis is logarithmic if all values are positive and span a factor of 30.

    Long curves are drawn as the means of equal pieces, with the range of each piece behind them.
    """
    pairs = [(np.asarray(c.x, float), np.asarray(c.y, float)) for c in curves]
    finite = np.concatenate([y[np.isfinite(y)] for _, y in pairs] or [np.empty(0)])
    bad = sum(int((~np.isfinite(y)).sum()) for _, y in pairs)
    if not finite.size:
        what = f"none of {bad:,} values is finite" if bad else "no values"
        return _figure(title, _text(WIDTH / 2, HEIGHT / 2, what, "middle"), HEIGHT)
    low, high = float(finite.min()), float(finite.max())
    if logarithmic is None:
        logarithmic = low > 0 and high > 30 * low
    logarithmic = logarithmic and low > 0
    right = max(float(x.max()) for x, y in pairs if x.size)
    left = min(float(x.min()) for x, y in pairs if x.size)
    ticks = log_ticks(low, high) if logarithmic else linear_ticks(low, high)
    if logarithmic:
        low, high = low / 1.15, high * 1.15
    else:
        low, high = ticks[0], ticks[-1]
    plot = _Plot(left, right, low, high, logarithmic)
    parts = [*_grid(plot, ticks)]
    for curve, (x, y) in zip(curves, pairs, strict=True):
        parts += _curve(plot, curve, x, y)
        where = x[~np.isfinite(y)][:200]
        parts += [f'<path class="bad" d="M{plot.x(at):.1f} {_TOP}v6"/>' for at in where]
    if bad:
        note = f"{bad:,} value{'s' * (bad > 1)} not finite, marked at the top. {note}"
    return _figure(title, "".join(parts), HEIGHT, legend([(c.name, c.colour, c.dashed) for c in curves]), note)


def heat_map(
    title: str,
    rows: Sequence[str],
    steps: Sequence[float],
    values: Numbers,
    note: str = "",
    logarithmic: bool = True,
) -> str:
    """`values` (rows, steps) as colours; a cell that is NaN stays empty, one that is infinite is red.

    Colours follow the logarithm of positive numbers, or shares between 0 and 1. Several steps share a column where
    there are too many; it shows their mean, the geometric one where colours are logarithmic.
    """
    if not len(rows) or not len(steps):
        return _figure(title, _text(WIDTH / 2, 40, "no values", "middle"), 80)
    count = min(len(steps), _COLUMNS, max(60, _CELLS // len(rows)))
    columns = np.array_split(np.arange(len(steps)), count)
    ok = np.isfinite(values) & ((values > 0) | (not logarithmic))
    if not ok.any():
        what = "no value is finite" + " and more than 0" * logarithmic
        return _figure(title, _text(WIDTH / 2, 40, what, "middle"), 80)
    shown = np.where(ok, values, 1)
    if logarithmic:
        shown = np.log10(shown)
    low, high = (float(shown[ok].min()), float(shown[ok].max())) if logarithmic else (0.0, 1.0)
    left = min(190, 12 + 6.4 * max(map(len, rows)))
    width = (WIDTH - left - _RIGHT) / len(columns)
    height = max(12, min(22, 260 / len(rows)))
    parts = []
    for i, name in enumerate(rows):
        top = 4 + i * height
        parts.append(_text(left - 6, top + height / 2 + 4, _shortened(name, 28), "end", name))
        for j, column in enumerate(columns):
            good = column[ok[i, column]]
            at = f"step {steps[column[0]]:g}"
            place = f'x="{left + j * width:.2f}" y="{top:.1f}" width="{width + 0.3:.2f}" height="{height - 1:.1f}"'
            if np.isinf(values[i, column]).any():
                parts.append(f'<rect class="bad" {place}><title>{escape(name)}, {at}: not finite</title></rect>')
            elif len(good):
                mean = float(shown[i, good].mean())
                said = f"{escape(name)}, {at}: {10**mean if logarithmic else mean:.3g}"
                parts.append(f'<rect {place} fill="{ladder(mean, low, high)}"><title>{said}</title></rect>')
    bottom = 4 + len(rows) * height
    parts.append(_text(left, bottom + 14, f"step {steps[0]:g}", "start"))
    parts.append(_text(WIDTH - _RIGHT, bottom + 14, f"{steps[-1]:g}", "end"))
    ends = (f"{10**low:.1g}", f"{10**high:.1g}") if logarithmic else ("0", "1")
    parts.append(_key(left + 70, bottom + 6, *ends))
    return _figure(title, "".join(parts), bottom + 24, note=note)


def stacked_bars(title: str, rows: Sequence[str], parts: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    """A bar for each row, in seconds, cut into `parts` (name, colour, a number for each row)."""
    totals = [sum(values[i] for _, _, values in parts) for i in range(len(rows))]
    if not rows or not max(totals, default=0) > 0:
        return _figure(title, _text(WIDTH / 2, 40, "no times", "middle"), 80)
    height, left = (26 if len(rows) <= 12 else 14), 60
    scale = (WIDTH - left - 64) / max(totals)
    drawn = []
    for i, name in enumerate(rows):
        x, top = float(left), 4 + i * height
        drawn.append(_text(left - 6, top + height / 2 + 3, name, "end"))
        for part, colour, values in parts:
            width = values[i] * scale
            said = (
                f"{escape(name)}, {escape(part)}: {values[i]:.3g} s, {values[i] / totals[i]:.1%}" if totals[i] else ""
            )
            drawn.append(
                f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{height - 5}" fill="{colour}">'
                f"<title>{said}</title></rect>"
            )
            x += width
        drawn.append(_text(x + 5, top + height / 2 + 3, f"{totals[i]:.3g} s", "start"))
    return _figure(title, "".join(drawn), 8 + len(rows) * height, legend([(p, c, False) for p, c, _ in parts]))


def legend(entries: Sequence[tuple[str, str, bool]]) -> str:
    """The names with their colours, and whether their lines are dashed; nothing for a single one."""
    if len(entries) < 2:
        return ""
    spans = [
        f'<span><i class="dashed" style="color:{colour}"></i>{escape(name)}</span>'
        if dashed
        else f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour, dashed in entries
    ]
    return f'<div class="legend">{"".join(spans)}</div>'


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that enclose `low` and `high`.

    >>> linear_ticks(0.13, 0.97)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        middle, spread = low, abs(low) * 0.1 or 1.0
        low, high = middle - spread, middle + spread
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step)) + 1)
    return [round(number * step, digits) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, at most about nine: powers of ten, or also their double and fivefold.

    >>> log_ticks(0.02, 30), log_ticks(0.05, 2.3)
    ([0.1, 1.0, 10.0], [0.05, 0.1, 0.2, 0.5, 1.0, 2.0])
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if high < 300 * low else (1,)
    every = max(1, math.ceil((last - first) / 7))
    ticks = [float(f"{factor}e{power}") for power in range(first, last + 1, every) for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001] or [low]


def ladder(value: float, low: float, high: float) -> str:
    """A colour between dark (`low`) and light (`high`)."""
    place = (value - low) / (high - low) * (len(_LADDER) - 1) if high > low else (len(_LADDER) - 1) / 2
    step = min(int(place), len(_LADDER) - 2)
    below, above = _LADDER[step], _LADDER[step + 1]
    mixed = [round(b + (a - b) * (place - step)) for b, a in zip(below, above, strict=True)]
    return f"#{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"


@dataclass(frozen=True)
class _Plot:
    """Where a number lies in the picture."""

    left: float
    right: float
    low: float
    high: float
    logarithmic: bool

    def x(self, value: float) -> float:
        span = self.right - self.left or 1
        return _LEFT + (value - self.left) / span * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return HEIGHT - _BOTTOM - (value - low) / (high - low or 1) * (HEIGHT - _BOTTOM - _TOP)


def _grid(plot: _Plot, ticks: Sequence[float]) -> list[str]:
    parts = []
    for tick in ticks:
        y = plot.y(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, y + 4, _number(tick), "end"))
    across = [tick for tick in linear_ticks(plot.left, plot.right, 6) if plot.left <= tick <= plot.right]
    for tick in across if plot.right > plot.left else [plot.left]:
        parts.append(_text(plot.x(tick), HEIGHT - _BOTTOM + 15, f"{tick:,g}", "middle"))
    return [*parts, _text(WIDTH - _RIGHT, HEIGHT - 4, "step", "end")]


def _curve(plot: _Plot, curve: Line, x: Numbers, y: Numbers) -> list[str]:
    """The line through the means of pieces, with gaps where nothing is finite, and the band of each piece's range."""
    if not x.size:
        return []
    pieces = np.array_split(np.arange(x.size), min(x.size, _COLUMNS))
    runs: list[list[tuple[float, float, float, float]]] = [[]]
    for piece in pieces:
        good = piece[np.isfinite(y[piece])]
        if not good.size:
            runs.append([])
            continue
        middle, low, high = float(y[good].mean()), float(y[good].min()), float(y[good].max())
        runs[-1].append((plot.x(float(x[good].mean())), plot.y(middle), plot.y(low), plot.y(high)))
    parts = []
    for run in filter(None, runs):
        if x.size > _COLUMNS:
            edge = [f"{px:.1f},{bottom:.1f}" for px, _, bottom, _ in run]
            edge += [f"{px:.1f},{top:.1f}" for px, _, _, top in reversed(run)]
            parts.append(f'<polygon points="{" ".join(edge)}" fill="{curve.colour}" opacity="0.18"/>')
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in run)
        dashes = ' stroke-dasharray="5 4"' if curve.dashed else ""
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{curve.colour}" stroke-width="1.6"{dashes}>'
            f"<title>{escape(curve.name)}</title></polyline>"
        )
        if curve.dots or len(run) == 1:
            parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" fill="{curve.colour}"/>' for px, py, _, _ in run]
    return parts


def _key(x: float, y: float, low: str, high: str) -> str:
    """The colours of a heat map with the numbers at both ends."""
    cells = [
        f'<rect x="{x + 44 + 4 * i:.1f}" y="{y}" width="4.3" height="9" fill="{ladder(i, 0, 29)}"/>' for i in range(30)
    ]
    return _text(x + 38, y + 8, low, "end") + "".join(cells) + _text(x + 170, y + 8, high, "start")


def _figure(title: str, content: str, height: float, below: str = "", note: str = "") -> str:
    remark = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{content}</svg>{below}{remark}</figure>'
    )


def _text(x: float, y: float, text: str, anchor: str, full: str = "") -> str:
    title = f"<title>{escape(full)}</title>" if full and full != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}{title}</text>'


def _shortened(name: str, length: int) -> str:
    """Without its middle if it is too long: layers are told apart by both ends."""
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[head + 1 - length :]}"


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,g}" if value < 1000 else f"{value:,.0f}"
