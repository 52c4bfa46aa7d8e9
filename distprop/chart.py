"""Speed-up against the number of ranks, both on logarithmic axes, as characters for a terminal and as an SVG file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

Point = tuple[float, float]  # ranks, speed-up over one rank


def as_text(predicted: Sequence[Point], width: int = 78) -> str:
    """Predicted speed-up as `*`, the ideal one as `.`, with the lines between the points; a line for each doubling."""
    low, high = _range(predicted)
    right, columns = math.log2(predicted[-1][0]), width - 10
    cells = {power: [" "] * columns for power in range(high, low - 1, -1)}
    for column in range(columns):
        x = right * column / (columns - 1)
        cells[round(x)][column] = "."
        cells[round(_between(predicted, x))][column] = "*"
    lines = [f"{_short(2.0**power):>7} |{''.join(row)}".rstrip() for power, row in cells.items()]
    axis = ""
    for ranks, _ in predicted:
        axis = axis.ljust(round(math.log2(ranks) / right * (columns - 1))) + f"{ranks:.0f} "
    return "\n".join([*lines, " " * 8 + "+" + "-" * columns, " " * 9 + axis.rstrip()])


def as_svg(title: str, predicted: Sequence[Point]) -> str:
    """A drawing of 720 × 440 that needs nothing beside itself."""
    low, high = _range(predicted)
    right = math.log2(predicted[-1][0])

    def place(point: Point) -> str:
        x, y = math.log2(point[0]), math.log2(point[1])
        return f"{70 + 620 * x / right:.1f},{390 - 330 * (y - low) / (high - low):.1f}"

    def line(points: Sequence[Point], style: str) -> str:
        return f'<polyline points="{" ".join(map(place, points))}" fill="none" {style}/>'

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 440" font-family="sans-serif" font-size="12">',
        '<rect width="720" height="440" fill="white"/>',
        f'<text x="70" y="28" font-size="15">{escape(title)}</text>',
        '<text x="380" y="432" text-anchor="middle">ranks</text>',
        '<text x="70" y="50">times the speed of one rank</text>',
    ]
    for power in range(low, high + 1):
        x, y = place((1, 2.0**power)).split(",")
        parts.append(line([(1, 2.0**power), (predicted[-1][0], 2.0**power)], 'stroke="#ddd"'))
        parts.append(f'<text x="{float(x) - 8}" y="{float(y) + 4}" text-anchor="end">{_short(2.0**power)}</text>')
    for ranks, _ in predicted:
        x = place((ranks, 1)).split(",")[0]
        parts.append(f'<text x="{x}" y="410" text-anchor="middle">{int(ranks)}</text>')
    ideal = [(ranks, ranks) for ranks, _ in predicted]
    parts.append(line(ideal, 'stroke="#888" stroke-dasharray="5 4"'))
    parts.append(line(predicted, 'stroke="#06c" stroke-width="2.5"'))
    for ranks, speedup in predicted:
        x, y = place((ranks, speedup)).split(",")
        parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="#06c"><title>{ranks}: {speedup:.3g}</title></circle>')
    parts.append('<text x="560" y="50" fill="#06c">predicted</text><text x="630" y="50" fill="#666">ideal</text>')
    return "\n".join([*parts, "</svg>", ""])


def _range(predicted: Sequence[Point]) -> tuple[int, int]:
    """The powers of two between which the speed-up is shown; the ideal line is always seen whole."""
    lowest = min(math.log2(speedup) for _, speedup in predicted)
    return math.floor(min(0.0, lowest)), math.ceil(math.log2(predicted[-1][0]))


def _between(points: Sequence[Point], x: float) -> float:
    """The line through `points` at `x`, all as powers of two."""
    logs = [(math.log2(a), math.log2(b)) for a, b in points]
    for (x0, y0), (x1, y1) in itertools.pairwise(logs):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return logs[-1][1]  # rounding has put x a little beyond it


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
