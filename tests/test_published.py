"""Figures of the literature that take seconds, on the real MNIST, where it is at hand ($DISTPROP_DATA/mnist)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MNIST = Path(os.environ.get("DISTPROP_DATA", "nowhere"), "mnist")

pytestmark = pytest.mark.skipif(not MNIST.is_dir(), reason="$DISTPROP_DATA/mnist is not there")

# Nielsen, chapter 5: the learning speed of each hidden layer of 30. He names no seed, so a factor of 2 either way.
LEARNING_SPEEDS = {2: [0.066, 0.309], 3: [0.012, 0.060, 0.283], 4: [0.003, 0.017, 0.070, 0.285]}


@pytest.fixture(scope="module", params=[1, 2])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What examples/vanishing.py prints on 1 and on 2 ranks; it must have drawn its figure too."""
    folder = tmp_path_factory.mktemp("vanishing")
    start = [sys.executable, *(["-m", "distprop", "run", "-n", "2"] if request.param == 2 else [])]
    answer = subprocess.run(
        [*start, str(ROOT / "examples" / "vanishing.py")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    pytest.importorskip("matplotlib")
    assert (folder / "vanishing.svg").stat().st_size > 10_000
    return answer.stdout


def speeds(table: str, name: str) -> list[float]:
    line = next(line for line in table.splitlines() if line.startswith(name))
    return [float(number) for number in re.findall(r"\d+\.\d+", line.removeprefix(name))]


@pytest.mark.parametrize("hidden", LEARNING_SPEEDS)
def test_learning_speeds_are_those_of_chapter_5(table: str, hidden: int) -> None:
    for found, published in zip(speeds(table, f"{hidden} hidden, sigmoid"), LEARNING_SPEEDS[hidden], strict=True):
        assert published / 2 < found < published * 2


def test_a_single_hidden_layer_learns_as_the_last_of_several_does(table: str) -> None:
    (found,) = speeds(table, "1 hidden, sigmoid")  # Nielsen has none; the last layers, just before the output, have 0.3
    published = [layers[-1] for layers in LEARNING_SPEEDS.values()]
    assert min(published) / 2 < found < max(published) * 2


REMEDIES = ["4, ReLU ", "4, ReLU, Kaiming ", "4, sigmoid, short cuts", "4, ReLU, Kaiming, layer norm, short cuts"]


@pytest.mark.parametrize("remedy", REMEDIES)
def test_the_remedies_bring_the_first_layer_near_the_last(table: str, remedy: str) -> None:
    without, with_it = speeds(table, "4 hidden, sigmoid"), speeds(table, remedy)
    assert without[0] < without[-1] / 30
    assert with_it[0] > with_it[-1] / 3


def test_kaiming_gives_back_what_relu_takes(table: str) -> None:
    """The weights are √2 times LeCun's, so from the last to the first layer the gradient gains √2 at each of 3."""
    without, with_it = (speeds(table, f"4, ReLU, {name} ") for name in ("LeCun", "Kaiming"))
    assert with_it[0] / with_it[-1] == pytest.approx(2**1.5 * without[0] / without[-1], rel=0.2)


@pytest.mark.parametrize("alone", ["4, sigmoid, Xavier", "4, sigmoid, layer norm"])
def test_a_sigmoid_shrinks_gradients_whatever_the_weights_and_the_scale_of_its_input(table: str, alone: str) -> None:
    found = speeds(table, alone)
    assert found[0] < found[-1] / 30


def test_clipping_makes_all_layers_slower_alike(table: str) -> None:
    whole, clipped = speeds(table, "4 hidden, sigmoid"), speeds(table, "4, sigmoid, clipped to norm 0.1 ")
    factors = [b / a for a, b in zip(whole[1:], clipped[1:], strict=True)]  # the first has one digit
    assert max(factors) < 0.05
    assert factors == pytest.approx([factors[-1]] * 3, rel=0.2)  # three digits are printed


def norms(table: str, name: str) -> list[float]:
    line = next(line for line in table.splitlines() if line.startswith(f"{name}  "))
    return [float(number) for number in line.removeprefix(name).split()]


def test_gradients_explode_through_time_and_clipping_bounds_them(table: str) -> None:
    for name in ("0.8", "1.0", "1.5"):
        found = norms(table, name)
        growth = found[-1] / found[0]  # 39 further steps, each scales by the name
        assert growth == pytest.approx(float(name) ** 39, rel=0.05)
    assert norms(table, "1.5, clipped to norm 1") == [1] * 5  # all were longer


def test_an_lstm_keeps_the_gradient_where_an_rnn_loses_it(table: str) -> None:
    growth = {name: norms(table, name)[-1] / norms(table, name)[0] for name in ("0.8", "0.8, LSTM")}
    assert growth["0.8"] < 1e-3
    assert 0.3 < growth["0.8, LSTM"] < 3


def test_layer_norm_takes_the_scale_of_recurrent_weights_away(table: str) -> None:
    small, large = norms(table, "0.8, layer norm"), norms(table, "1.5, layer norm")
    assert small == pytest.approx(large, rel=0.01)
    assert 1 < small[-1] / small[0] < 100  # where 1.5 alone has 7 million


def test_random_weights_keep_the_gradient_through_time_less_well_than_orthogonal_ones(table: str) -> None:
    xavier, kaiming = norms(table, "Xavier instead"), norms(table, "Kaiming instead, ReLU")
    assert 2 < xavier[-1] / xavier[0] < 100  # some directions grow at every step
    assert kaiming[-1] / kaiming[0] > 300  # one matrix at all steps chooses which units are active, and they grow
