"""The arrays of a replayed step for people: a line for each, the first NaN, and where two steps differ first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from distprop.data.npz import read_npz
from distprop.tape import Array

if TYPE_CHECKING:
    from pathlib import Path

_COLUMNS = ("norm", "mean", "min", "max", "NaN", "inf")


class NumbersError(ValueError):
    """A file that does not hold the arrays of a replayed step."""


def load(path: Path) -> dict[str, Array]:
    """The arrays of a file that a replay has saved, in the order of the step.

    Raises:
        NumbersError: it is not such a file.
    """
    try:
        return read_npz(path)
    except ValueError as error:
        raise NumbersError(f"{path} is not an .npz file that distprop replay has saved: {error}") from error


def table(arrays: Mapping[str, Array], kinds: Mapping[str, str] | None = None) -> str:
    """A line for each array: its shape, and norm, mean, least and largest of its finite numbers, and how many are not.

    >>> print(table({"loss": np.array(0.5)}))
          shape  norm  mean  min  max  NaN  inf
    loss  ()      0.5   0.5  0.5  0.5    0    0
    """
    rows: list[tuple[str, ...]] = [("", "shape", *_COLUMNS)]
    for name, array in arrays.items():
        rows.append((_label(name, kinds or {}), str(array.shape).replace(" ", ""), *_statistics(array)))
    return _aligned(rows)


def first_not_finite(arrays: Mapping[str, Array], kinds: Mapping[str, str] | None = None) -> str | None:
    """Where NaN or infinity comes up first, in the order of the step; None if nowhere."""
    for name, array in arrays.items():
        bad = ~_finite(array)
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0])
            where = f"the first at {place}" if place else "it"
            return (
                f"the first that is not finite is {_label(name, kinds or {})}: {np.count_nonzero(bad):,} of "
                f"{array.size:,} numbers, {where} is {array[place]}"
            )
    return None


def difference(first: Mapping[str, Array], second: Mapping[str, Array]) -> str | None:
    """Where two steps differ, array by array in the order of the step; None if all bits are the same."""
    rows: list[tuple[str, ...]] = [("", "shape", "largest difference", "at", "first", "second", "relative")]
    same = 0
    for name in [*first, *(name for name in second if name not in first)]:
        if name not in first or name not in second:
            rows.append((name, "", "", "", *("there" if name in side else "not there" for side in (first, second)), ""))
        elif row := _difference(first[name], second[name]):
            rows.append((name, *row))
        else:
            same += 1
    if len(rows) == 1:
        return None
    return (
        f"the first difference is in {rows[1][0]}; {same} of {same + len(rows) - 1} arrays are equal\n{_aligned(rows)}"
    )


def _difference(one: Array, other: Array) -> tuple[str, ...] | None:
    """The columns of a line of `difference`; None for the same bits."""
    shapes = [str(array.shape).replace(" ", "") for array in (one, other)]
    if one.shape != other.shape or one.dtype != other.dtype:
        return "", "", "", *(f"{shape} {array.dtype}" for shape, array in zip(shapes, (one, other), strict=True)), ""
    if one.tobytes() == other.tobytes():
        return None
    x, y = one.astype(np.float64), other.astype(np.float64)
    with np.errstate(all="ignore"):
        apart = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, np.abs(x - y))
    place = np.unravel_index(int(np.argmax(np.where(np.isnan(apart), np.inf, apart))), one.shape)
    size = np.linalg.norm(x.ravel())
    relative = float(np.linalg.norm(apart.ravel()) / size) if size else np.inf
    index = str(tuple(int(i) for i in place)).replace(" ", "")
    return shapes[0], _short(apart[place]), index, _short(one[place]), _short(other[place]), _short(relative)


def _statistics(array: Array) -> tuple[str, ...]:
    finite = array[_finite(array)].astype(np.float64)
    with np.errstate(over="ignore"):
        norm = np.linalg.norm(finite)
    numbers = (norm, finite.mean(), finite.min(), finite.max()) if finite.size else ()
    floating = array.dtype.kind == "f"
    nan, inf = (np.count_nonzero(test(array)) if floating else 0 for test in (np.isnan, np.isinf))
    return *(map(_short, numbers) if numbers else ["-"] * 4), f"{nan:,}", f"{inf:,}"


def _finite(array: Array) -> Array:
    return np.isfinite(array) if array.dtype.kind in "fc" else np.ones(array.shape, bool)


def _label(name: str, kinds: Mapping[str, str]) -> str:
    return f"{name} {kinds[name]}" if name in kinds else name


def _short(number: float) -> str:
    return f"{number:.4g}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The first two columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
