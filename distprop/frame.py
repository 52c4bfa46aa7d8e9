"""What the live view shows: bars, numbers, a sparkline of each layer's gradient norm, verdicts; as lines of text.

A frame is a function of a `Scene` and the size of the window. It never has more lines, or wider ones, than it is given,
so a window of any size has its picture: what matters least goes first, and layers that find no room are counted.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from distprop.metrics import StepResult
from distprop.progress import in_words

Numbers: TypeAlias = NDArray[np.float64]
Piece: TypeAlias = tuple[str, str]  # text, and its colour: the numbers of ECMA-48's "select graphic rendition"
PLAIN, BOLD, DIM, RED, GREEN, YELLOW, CYAN = "", "1", "2", "31", "32", "33", "36"
WIDEST = 110  # columns; beyond it a line is hard to follow
_MARKS = "▁▂▃▄▅▆▇█0×"  # eight heights, zero, not finite
_MARK_COLOURS = (CYAN, DIM, RED)
_LONGEST_VERDICT = 3  # lines


@dataclass(frozen=True)
class Scene:
    """What is known at one moment.

    Attributes:
        latest: the last step.
        epoch, epochs: which one this is, from 1, and how many there will be.
        batch, batches: of this epoch.
        done, total: steps of this call of `fit`.
        seconds_left: until it ends, evaluation included; None while nobody can tell.
        rate: samples a second.
        communication: the share of step time that goes into reductions, on rank 0.
        slowest: a rank, and by how much its own work takes longer than the mean of all; None on a single one.
        norms: by layer, the norms of its gradient, the last one now; NaN or infinity where it was not finite.
        verdicts: the last one last.
    """

    latest: StepResult | None = None
    epoch: int = 1
    epochs: int = 1
    batch: int = 0
    batches: int = 1
    done: int = 0
    total: int = 1
    seconds_left: float | None = None
    rate: float = 0.0
    communication: float | None = None
    slowest: tuple[int, float] | None = None
    norms: Mapping[str, Numbers] = field(default_factory=dict)
    verdicts: Sequence[str] = ()


def frame(scene: Scene, columns: int, rows: int, colour: bool = True) -> list[str]:
    """At most `rows` lines of at most `columns` characters, at least one."""
    columns, rows = max(1, min(columns, WIDEST)), max(1, rows)
    several = scene.epochs > 1
    epoch = _bar_line(f"epoch {scene.epoch}/{scene.epochs}", scene.batch, scene.batches, columns, "") if several else []
    total = _bar_line("total" if several else "epoch 1/1", scene.done, scene.total, columns, _left(scene))
    ranked = [(3, epoch), (1, total), (2, _numbers(scene)), (4, _shares(scene))]  # what matters most is number 1
    kept = sorted(number for number, line in ranked if line)[: max(1, rows - bool(scene.verdicts))]
    lines = [line for number, line in ranked if number in kept]
    verdicts = _verdicts(scene.verdicts, columns, rows - len(lines))
    lines += _sparklines(scene.norms, columns, rows - len(lines) - len(verdicts))
    return [_text(line, columns, colour) for line in lines + verdicts]


def sparkline(values: Numbers, low: float, high: float) -> list[Piece]:
    """A block for each value, as high as its logarithm between `low` and `high`, both positive.

    >>> "".join(text for text, _ in sparkline(np.array([0.01, 0.1, 1, math.nan, 0]), 0.01, 1))
    '▁▅█×0'
    """
    finite = np.isfinite(values)
    drawn = finite & (values > 0)
    place = (np.log10(np.where(drawn, values, 1.0)) - math.log10(low)) * (
        7 / max(math.log10(high) - math.log10(low), 1e-9)
    )
    marks = np.where(drawn, np.clip(np.rint(place), 0, 7), np.where(finite, 8, 9)).astype(np.intp).tolist()
    if drawn.all():
        return [("".join([_MARKS[mark] for mark in marks]), CYAN)]
    runs = itertools.groupby(marks, lambda mark: _MARK_COLOURS[max(7, mark) - 7])
    return [("".join([_MARKS[mark] for mark in run]), code) for code, run in runs]


def width_of(text: str) -> int:
    """How many columns of a terminal `text` takes; letters of China and Japan take two, accents none.

    >>> width_of("weight"), width_of("重み"), width_of("é")
    (6, 4, 1)
    """
    from rich.cells import cell_len  # few programs show a live view

    return cell_len(text)


def _bar_line(name: str, done: int, total: int, columns: int, after: str) -> list[Piece]:
    """A name, a bar, "done/total" and what comes after."""
    said = f"{done:,}/{total:,}" + (f"  {after}" if after else "")
    length = min(60, columns - 13 - 2 - max(len(said), 24))
    if length < 4:
        return [(f"{name}  ", BOLD), (said, PLAIN)]
    filled = min(length, int(length * done / max(1, total)))
    return [(f"{name:<13}", BOLD), ("━" * filled, GREEN), ("─" * (length - filled), DIM), (f"  {said}", PLAIN)]


def _left(scene: Scene) -> str:
    if scene.seconds_left is None:
        return ""
    seconds = round(scene.seconds_left)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    clock = f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"
    return f"{clock} left"


def _numbers(scene: Scene) -> list[Piece]:
    if scene.latest is None:
        return []
    said = in_words({"loss": scene.latest.loss, **scene.latest.metrics})
    bad = not math.isfinite(scene.latest.loss)
    return [(said, RED if bad else BOLD), (f"  {scene.rate:,.0f} samples/s  lr {scene.latest.lr:.3g}", PLAIN)]


def _shares(scene: Scene) -> list[Piece]:
    said = []
    if scene.communication is not None:
        said.append(f"communication {scene.communication:.1%} of step time")
    if scene.slowest is not None:
        rank, more = scene.slowest
        said.append(f"slowest rank {rank}, {more:.1%} above the mean")
    return [("  ".join(said), PLAIN)] if said else []


def _sparklines(norms: Mapping[str, Numbers], columns: int, rows: int) -> list[list[Piece]]:
    """A heading and a line for each layer, or for as many as there is room for, evenly spread."""
    if not norms or rows < 2:
        return []
    names = list(norms)
    shown = min(len(names), rows - 1)
    places = [round(i * (len(names) - 1) / max(1, shown - 1)) for i in range(shown)]
    chosen = {_printable(names[place]): norms[names[place]] for place in places}
    widest = min(max(map(width_of, chosen)), max(6, columns // 3))
    length = max(1, columns - widest - 2 - 10)
    recent = {name: values[-length:] for name, values in chosen.items()}
    together = np.concatenate(list(recent.values()))
    positive = together[np.isfinite(together) & (together > 0)]
    low, high = _scale(positive)
    about = f"  {low:.0e} to {high:.0e}, logarithmic" if positive.size else ""
    hidden = len(norms) - shown
    rest = f"; {hidden} of {len(norms)} layers are not shown" if hidden else ""
    lines: list[list[Piece]] = [[("norm of the gradient", BOLD), (about + rest, DIM)]]
    for name, values in recent.items():
        short = _shortened(name, widest)
        lines.append([(short + " " * (widest - width_of(short) + 1), PLAIN), *sparkline(values, low, high)])
        if values.size:
            now = float(values[-1])
            lines[-1].append((f" {now:.1e}" if math.isfinite(now) else " not finite", PLAIN))
    return lines


def _scale(positive: Numbers) -> tuple[float, float]:
    """The range of the numbers, a factor of ten at least, so that what hardly changes looks flat."""
    if not positive.size:
        return 1.0, 10.0
    low, high = math.log10(float(positive.min())), math.log10(float(positive.max()))
    missing = max(0.0, 1 - (high - low)) / 2
    return 10.0 ** max(-307.0, low - missing), 10.0 ** min(308.0, high + missing)


def _verdicts(texts: Sequence[str], columns: int, rows: int) -> list[list[Piece]]:
    """As much of the newest one as fits into `rows`, and above it those that fit into half of them, whole."""
    lines: list[list[Piece]] = []
    for text in reversed(texts):
        wrapped = textwrap.wrap(text, max(1, columns - 2)) or [""]
        longest = max(1, min(_LONGEST_VERDICT, rows))
        if len(wrapped) > longest:
            wrapped = wrapped[:longest]
            wrapped[-1] = wrapped[-1][: max(0, columns - 3)] + "…"
        if len(lines) + len(wrapped) > (rows // 2 if lines else rows):
            break
        lines = [[("! " if i == 0 else "  ", YELLOW), (line, YELLOW)] for i, line in enumerate(wrapped)] + lines
    return lines


def _text(pieces: Sequence[Piece], columns: int, colour: bool) -> str:
    """The pieces up to `columns`, in their colours."""
    parts, room = [], columns
    for text, code in pieces:
        kept = _head(_printable(text), room)
        room -= width_of(kept)
        parts.append(f"\x1b[{code}m{kept}\x1b[0m" if colour and code and kept else kept)
    return "".join(parts)


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def _head(text: str, columns: int) -> str:
    """The beginning of `text`, so much as fits; a space in the place of half a letter."""
    from rich.cells import set_cell_size

    return text if width_of(text) <= columns else set_cell_size(text, columns)


def _shortened(text: str, columns: int) -> str:
    """Without its middle if it is too long: layers are told apart by both ends."""
    if width_of(text) <= columns:
        return text
    head = _head(text, (columns - 1) // 2)
    return f"{head}…{_head(text[::-1], columns - 1 - width_of(head))[::-1]}"
