"""The picture of the live view: within its frame at any size, right in its numbers, whole whatever the numbers are."""

import math
import re

import numpy as np
import pytest

from distprop.frame import WIDEST, Scene, frame, width_of
from distprop.metrics import StepResult

LAYERS = 50


def scene(**changes) -> Scene:
    norms = {f"blocks.{k}.weight": np.geomspace(1.0, 10.0 ** (-k / 10), 40) for k in range(LAYERS)}
    values = {
        "latest": StepResult(130, 1, 0.1234, {"accuracy": 0.9876}, 64, 0.05, 0.01),
        **{"epoch": 2, "epochs": 3, "batch": 30, "batches": 100, "done": 130, "total": 300, "seconds_left": 3723.4},
        **{"rate": 12345.6, "communication": 0.123, "slowest": (1, 0.05), "norms": norms},
        "verdicts": ["gradients vanish: `2.weight` learns slowly; try ReLU"],
    }
    return Scene(**{**values, **changes})


def text(line: str) -> str:
    return re.sub(r"\x1b\[\d*m", "", line)


def test_every_number_is_there() -> None:
    lines = [text(line) for line in frame(scene(), 100, 70)]
    assert re.fullmatch(r"epoch 2/3 +━{18}─{42}  30/100", lines[0])
    assert re.fullmatch(r"total +━{26}─{34}  130/300  1:02:03 left", lines[1])
    assert lines[2] == "loss 0.1234  accuracy 98.76%  12,346 samples/s  lr 0.05"
    assert lines[3] == "communication 12.3% of step time  slowest rank 1, 5.0% above the mean"
    assert lines[4] == "norm of the gradient  1e-05 to 1e+00, logarithmic"
    assert [line.split()[0] for line in lines[5:-1]] == [f"blocks.{k}.weight" for k in range(LAYERS)]
    assert lines[5].split()[1:] == ["█" * 40, "1.0e+00"]
    assert lines[-2].split()[1][0] == "█"
    assert lines[-2].split()[1][-1] == "▁"
    assert lines[-1] == "! gradients vanish: `2.weight` learns slowly; try ReLU"


@pytest.mark.parametrize("colour", [False, True])
def test_a_window_of_any_size_has_its_picture(colour: bool) -> None:
    for columns in (*range(1, 20), 29, 30, 40, 47, 80, 200):
        for rows in (1, 2, 3, 4, 5, 6, 8, 12, 20, 100):
            lines = frame(scene(), columns, rows, colour)
            assert 1 <= len(lines) <= rows
            assert max(width_of(text(line)) for line in lines) <= min(columns, WIDEST)
            assert ("\x1b" in "".join(lines)) <= colour


def test_what_matters_least_goes_first() -> None:
    def kinds(rows: int) -> str:
        return "".join(
            next(kind for kind, sign in {"e": "epoch ", "t": "total", "n": "loss", "c": "comm"}.items()
                 if text(line).startswith(sign))
            for line in frame(scene(norms={}, verdicts=()), 80, rows)
        )  # fmt: skip

    assert [kinds(rows) for rows in (1, 2, 3, 4, 9)] == ["t", "tn", "etn", "etnc", "etnc"]


def test_layers_without_room_are_counted_and_the_first_and_the_last_are_shown() -> None:
    lines = [text(line) for line in frame(scene(verdicts=()), 80, 15)]
    assert f"; {LAYERS - 10} of {LAYERS} layers are not shown" in lines[4]
    names = [line.split()[0] for line in lines[5:]]
    assert len(set(names)) == 10
    assert (names[0], names[-1]) == ("blocks.0.weight", f"blocks.{LAYERS - 1}.weight")


@pytest.mark.parametrize(
    ("values", "marks"),
    [
        ([math.nan, math.inf, -math.inf], "×××"),
        ([0.0, 0.0], "00"),
        ([1.0, math.nan, 0.0, 10.0], "▁×0█"),
        ([1e-300, 1e300], "▁█"),
        ([5e-324, 1.0], "▁█"),
        ([2.0, 2.0], "▅▅"),
        ([], ""),
    ],
)
@pytest.mark.filterwarnings("error")
def test_any_norms_make_a_sparkline(values: list[float], marks: str) -> None:
    line = text(frame(scene(norms={"w": np.array(values)}, verdicts=()), 80, 20)[-1])
    assert re.fullmatch(rf"w {marks}( \S+| not finite)?", line)
    assert line.endswith("not finite") == (bool(values) and not math.isfinite(values[-1]))


def test_what_is_not_finite_is_red() -> None:
    lines = frame(scene(norms={"w": np.array([math.nan])}, latest=StepResult(1, 0, math.nan, {}, 1, 0.1, 1.0)), 80, 20)
    assert "\x1b[31m×\x1b[0m" in "".join(lines)
    assert any(line.startswith("\x1b[31mloss nan") for line in lines)


def test_before_the_first_step_and_in_a_single_epoch() -> None:
    (line,) = [text(line) for line in frame(Scene(total=8), 80, 20)]
    assert re.fullmatch(r"epoch 1/1 +─+  0/8", line)
    assert [text(line).split()[0] for line in frame(scene(epochs=1, norms={}, verdicts=()), 80, 20)] == [
        "epoch", "loss", "communication",
    ]  # fmt: skip


def test_long_and_strange_names_keep_their_ends() -> None:
    norms = {"a" * 99 + ".weight": np.ones(3), "層\x1b[2J.重み": np.ones(3)}
    lines = [text(line) for line in frame(scene(norms=norms, verdicts=()), 60, 20)][-2:]
    assert re.fullmatch(r"a+…a+\.weight +▅▅▅ 1\.0e\+00", lines[0])
    assert re.fullmatch(r"層\?\[2J\.重み +▅▅▅ 1\.0e\+00", lines[1])
    assert lines[0].index("▅") == width_of(lines[1][: lines[1].index("▅")])
    for columns in range(1, 60):
        lines = frame(scene(norms={"重" * 40: np.ones(3)}, verdicts=("層" * 40,)), columns, 20, colour=False)
        assert max(map(width_of, lines)) <= columns


def test_the_last_verdicts_that_fit_are_shown_whole() -> None:
    verdicts = [f"number {n}: {'word ' * 20}end" for n in range(9)]
    lines = [text(line) for line in frame(scene(norms={}, verdicts=verdicts), 80, 12)][4:]
    assert [line[:10] for line in lines if line.startswith("!")] == ["! number 7", "! number 8"]
    assert sum("end" in line for line in lines) == 2
    (*_, last) = [text(line) for line in frame(scene(norms={}, verdicts=["word " * 200]), 60, 30)]
    assert last.endswith("…")


@pytest.mark.parametrize(("rows", "of_verdict"), [(2, 1), (4, 1), (5, 1), (6, 2), (7, 2), (8, 2)])
def test_the_newest_verdict_is_seen_in_the_smallest_window(rows: int, of_verdict: int) -> None:
    """A window of 10 lines leaves 6 to the view."""
    verdicts = ["an earlier one", "dead ReLUs: " + "word " * 28 + "end"]
    lines = [text(line) for line in frame(scene(verdicts=verdicts), 80, rows)]
    assert len(lines) <= rows
    assert lines[-of_verdict].startswith("! dead ReLUs: word")
    assert lines[-1].endswith("…" if of_verdict < 2 else "end")
    assert any(line.startswith("total") for line in lines)
