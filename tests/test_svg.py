"""Charts: every number ends where it belongs, and no number, however odd, breaks the picture."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from distprop import svg
from distprop.svg import HEIGHT, WIDTH, Line


def parsed(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure)


def points(figure: str) -> list[tuple[float, float]]:
    found = [element.get("points") for element in parsed(figure).iter("polyline")]
    return [tuple(map(float, pair.split(","))) for text in found for pair in text.split()]


def test_a_line_is_linear_in_its_numbers() -> None:
    (x0, y0), (x1, y1), (x2, y2) = points(svg.lines("loss", [Line("a", [0, 5, 10], [1, 2, 3], "red")]))
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert y0 > y1 > y2  # larger is higher up
    assert x0 < x1 < x2


def test_a_wide_range_of_positive_numbers_is_drawn_by_its_logarithm() -> None:
    (_, y0), (_, y1), (_, y2) = points(svg.lines("loss", [Line("a", [0, 1, 2], [0.01, 1, 100], "red")]))
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)


VALUES = {
    "nothing": [],
    "one": [3.0],
    "all NaN": [math.nan] * 5,
    "all infinite": [math.inf, -math.inf],
    "some NaN": [1.0, math.nan, 2.0, math.inf, 3.0],
    "constant": [2.0] * 4,
    "zero": [0.0] * 4,
    "negative": [-1.0, -2.0],
    "tiny and huge": [1e-300, 1e300],
    "denormal": [5e-324, 1e-320],
    "huge and negative": [-1e300, 1e300],
    "long": list(np.sin(np.arange(5000.0))),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.filterwarnings("error")
def test_any_numbers_make_a_picture_within_its_frame(values: list[float]) -> None:
    figure = svg.lines("<loss> & more", [Line("a <b>", range(len(values)), values, "red", dots=True)])
    root = parsed(figure)
    assert "nan" not in figure.replace("nance", "").lower().split("<p")[0]
    for x, y in points(figure):
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT
    finite = sum(map(math.isfinite, values))
    bad = len(values) - finite
    text = "".join(root.itertext())
    if not finite:
        assert (f"none of {bad} values is finite" if bad else "no values") in text
    elif bad:
        assert f"{bad} values not finite" in text
        assert len([e for e in root.iter("path") if e.get("class") == "bad"]) == bad


def test_a_gap_stays_a_gap() -> None:
    figure = svg.lines("loss", [Line("a", range(5), [1, 2, math.nan, 2, 1], "red")])
    assert len(list(parsed(figure).iter("polyline"))) == 2


def test_a_long_line_keeps_its_outliers_as_a_band() -> None:
    values = np.zeros(5000)
    values[1234] = 1
    figure = parsed(svg.lines("loss", [Line("a", range(5000), values, "red")]))
    band = next(figure.iter("polygon")).get("points").split()
    highest = min(float(pair.split(",")[1]) for pair in band)
    assert highest == pytest.approx(svg._TOP, abs=0.1)
    assert len(points(svg.lines("loss", [Line("a", range(5000), values, "red")]))) <= svg._COLUMNS


def test_a_heat_map_has_a_cell_for_each_number_and_red_where_it_is_not_finite() -> None:
    values = np.array([[1.0, 10.0, 100.0], [np.nan, np.inf, 1.0]])
    root = parsed(svg.heat_map("norm", ["0.weight", "2.weight"], [1, 2, 3], values))
    said = [title.text for rect in root.iter("rect") for title in rect.iter("title")]
    assert said == [
        "0.weight, step 1: 1",
        "0.weight, step 2: 10",
        "0.weight, step 3: 100",
        "2.weight, step 2: not finite",
        "2.weight, step 3: 1",
    ]
    colours = [rect.get("fill") for rect in root.iter("rect") if list(rect.iter("title"))]
    assert colours == [svg.ladder(0, 0, 1), svg.ladder(0.5, 0, 1), svg.ladder(1, 0, 1), None, svg.ladder(0, 0, 1)]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_a_heat_map_without_a_number_says_so(value: float) -> None:
    assert "no value is finite and more than 0" in svg.heat_map("norm", ["a"], [1], np.array([[value]]))
    assert "no values" in svg.heat_map("norm", [], [], np.empty((0, 0)))


def test_many_steps_share_columns() -> None:
    root = parsed(svg.heat_map("norm", ["a"], range(10_000), np.ones((1, 10_000))))
    assert sum(bool(list(rect.iter("title"))) for rect in root.iter("rect")) == svg._COLUMNS


def test_bars_are_as_long_as_their_numbers() -> None:
    root = parsed(svg.stacked_bars("time", ["rank 0", "rank 1"], [("a", "red", [1.0, 2.0]), ("b", "blue", [3.0, 0.0])]))
    widths = [float(rect.get("width")) for rect in root.iter("rect")]
    assert widths == pytest.approx([widths[0], 3 * widths[0], 2 * widths[0], 0], abs=0.02)
    assert "no times" in svg.stacked_bars("time", ["rank 0"], [("a", "red", [0.0])])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 1e9), (1e-12, 1.1e-12), (5, 5), (0, 0), (0.999, 1.001)])
def test_ticks_are_few_and_enclose(low: float, high: float) -> None:
    ticks = svg.linear_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))


def test_a_legend_names_what_is_dashed() -> None:
    assert svg.legend([("a", "red", False)]) == ""
    assert len(re.findall("dashed", svg.legend([("a", "red", False), ("b", "red", True)]))) == 1
