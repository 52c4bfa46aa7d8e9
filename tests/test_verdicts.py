"""Each verdict on a network built to have the fault, and none on healthy ones."""

import importlib.util
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import distprop as dp
from distprop import data, nn, optim
from distprop import functional as F
from distprop.diagnosis import Diagnosis
from distprop.look import Favourite, Look, ParameterHealth
from distprop.train import Trainer
from distprop.update import NonFiniteLossError
from distprop.verdicts import RULES, History, advice_about_ranks, judge


@pytest.fixture(scope="module")
def digits():
    return data.load_digits()[0]


@pytest.fixture(scope="module")
def vanishing():
    path = Path(__file__).parent.parent / "examples" / "vanishing.py"
    spec = importlib.util.spec_from_file_location("vanishing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mlp(*widths, activation=nn.ReLU, seed=0):
    dp.manual_seed(seed)
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def said(model, examples, optimizer, steps, loss=F.cross_entropy, batch_size=64, **options):
    trainer = Trainer(model, loss, optimizer, batch_size=batch_size, progress=False, **options)
    trainer.fit(examples, steps=steps)
    return {verdict.kind: verdict for verdict in trainer.verdicts}


def sgd(model, lr, momentum=0.0):
    return optim.SGD(model.parameters(), lr=lr, momentum=momentum)


# --- networks that have it


def test_vanishing_gradients_in_deep_sigmoid_layers(digits):
    model = mlp(64, *[30] * 6, 10, activation=nn.Sigmoid)
    verdict = said(model, digits, sgd(model, 0.1), 4)["vanishing"]
    assert verdict.layer == "0.weight"
    assert verdict.text.startswith("gradients vanish: `0.weight` learns ")
    assert verdict.text.endswith(" times slower than `12.weight`; try ReLU or short cuts")
    assert verdict.step == 4


def test_vanishing_gradients_in_saturated_layers_name_the_saturation(digits):
    model = mlp(64, 30, 30, 30, 10, activation=nn.Sigmoid)
    for number in (0, 2, 4):
        model[number].weight.data *= 100
    found = said(model, digits, sgd(model, 0.1), 8)
    assert "sigmoid units saturated" in found["vanishing"].text
    assert found["vanishing"].text.endswith("try ReLU or Xavier initialisation")
    assert found["saturated"].layer in ("1", "3", "5")
    assert " % of the sigmoid outputs of `" in found["saturated"].text


def test_exploding_gradients_of_a_recurrent_network():
    class Recurrent(nn.Module):
        def __init__(self):
            self.rnn, self.scores = nn.RNN(8, 8, nonlinearity="relu", batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.scores(self.rnn(x)[0][:, -1])

    dp.manual_seed(0)
    model = Recurrent()
    model.rnn.weight_hh_l0.data[:] = 1.5 * np.eye(8)  # grows by 1.5 for each step back: 10⁷ in 40
    x = np.random.default_rng(0).normal(size=(64, 40, 8)).astype(np.float32)
    examples = data.ArrayDataset(x, np.arange(64) % 2)
    verdict = said(model, examples, sgd(model, 1e-12), 1)["exploding"]
    assert verdict.layer.startswith("rnn.weight")
    assert "clip_norm=1.0" in verdict.text
    assert said(model, examples, sgd(model, 1e-12), 1, clip_norm=1.0) == {}
    trainer = Trainer(model, F.cross_entropy, sgd(model, 1e-12), batch_size=64, progress=False)
    with pytest.raises(ValueError, match="clip_norm must be more than 0, got 0"):
        trainer.clip_norm = 0
    trainer.clip_norm = 1
    trainer.fit(examples, steps=1)
    assert trainer.verdicts == []


def test_exploding_gradients_in_layers_with_large_weights(digits):
    model = mlp(64, *[64] * 8, 10)
    for number in range(0, 16, 2):
        model[number].weight.data[:] = np.linalg.qr(np.random.default_rng(number).normal(size=(64, 64)))[0] * 6
    model[16].weight.data *= 1e4
    with np.errstate(all="ignore"):
        found = said(model, digits, sgd(model, 1e-12), 2)
    assert "exploding" in found


def test_gradients_that_grow():
    """A linear model whose learning rate is 2.3 over the largest curvature: its error grows by 1.3 with each step."""
    x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    dp.manual_seed(0)
    model = nn.Linear(6, 1, bias=False)
    curvature = np.linalg.eigvalsh(2 * x.T @ x / 64)[-1]
    examples = data.ArrayDataset(x, np.zeros((64, 1), np.float32))
    found = said(model, examples, sgd(model, 2.3 / curvature), 50, loss=F.mse_loss)
    assert re.search(
        r"gradients explode: their norm is .* times the usual, most of it in `weight`", found["exploding"].text
    )


def test_dead_relus(digits):
    model = mlp(64, 32, 32, 10)
    model[2].bias.data[:20] = -50
    found = said(model, digits, sgd(model, 0.05), 8)
    assert found.keys() == {"dead"}
    assert found["dead"].layer == "3"
    assert found["dead"].text.startswith("dead ReLUs: 6")
    assert "256 examples" in found["dead"].text


def test_a_learning_rate_that_is_too_high(digits):
    model = mlp(64, 64, 10)
    found = said(model, digits, sgd(model, 20.0), 50)
    assert "try 2 instead of 20" in found["lr-high"].text


def test_a_learning_rate_that_is_too_high_for_adam(digits):
    model = mlp(64, 64, 10)
    found = said(model, digits, optim.Adam(model.parameters(), lr=1.0), 50)
    assert "try 0.1 instead of 1" in found["lr-high"].text


def test_a_learning_rate_that_is_too_low(digits):
    model = mlp(64, 64, 10)
    found = said(model, digits, sgd(model, 1e-6), 100)
    assert found.keys() == {"lr-low"}
    assert "try 0.0001 instead of 1e-06" in found["lr-low"].text


def test_a_loss_that_stands_still():
    """Labels that have nothing to do with the inputs, and a network too small to learn them by heart."""
    rng = np.random.default_rng(0)
    examples = data.ArrayDataset(rng.normal(size=(20_000, 8)).astype(np.float32), rng.integers(0, 2, 20_000))
    model = mlp(8, 4, 2)
    found = said(model, examples, sgd(model, 0.05), 600)
    assert found.keys() == {"plateau"}
    assert "the loss has stood at 0.69" in found["plateau"].text


def test_class_collapse(digits):
    """A bias that says "7" whatever comes, and gradients too small to change it."""
    model = mlp(64, 32, 10)
    model[2].bias.data[7] = 30
    found = said(model, digits, sgd(model, 1e-3), 200)
    assert "100 % of the predictions are class 7" in found["collapse"].text


def test_a_loss_that_is_not_finite(digits):
    model = mlp(64, 32, 10)
    trainer = Trainer(model, F.cross_entropy, sgd(model, 1e30), batch_size=64, progress=False)
    with np.errstate(all="ignore"), pytest.raises(NonFiniteLossError):
        trainer.fit(digits, steps=50)
    verdict = trainer.verdicts[-1]
    assert (verdict.kind, verdict.layer) == ("non-finite", "")
    assert "no gradient is finite, so `distprop replay` has to find where it began" in verdict.text
    assert "try a lower learning rate, clip_norm=1.0" in verdict.text


# --- networks that have not


HEALTHY = {
    "SGD": lambda model: sgd(model, 0.1),
    "momentum": lambda model: sgd(model, 0.05, 0.9),
    "Adam": lambda model: optim.Adam(model.parameters(), lr=1e-3),
    "AdamW": lambda model: optim.AdamW(model.parameters(), lr=3e-3),
    "LAMB": lambda model: optim.LAMB(model.parameters(), lr=1e-2),
    "cosine": lambda model: sgd(model, optim.schedule.warmup(optim.schedule.cosine(0.1, 600), 60), 0.9),
}


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
@pytest.mark.parametrize("name", HEALTHY)
def test_no_false_alarm_on_the_digits_until_long_after_they_are_learnt(digits, name, activation):
    model = mlp(64, 64, 32, 10, activation=activation)
    assert said(model, digits, HEALTHY[name](model), 600) == {}


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_no_false_alarm_with_batches_too_small_to_show_anything(digits, batch_size):
    """Of one example all predictions are one class, and of four in a row half of the units may be silent."""
    for seed in range(6):
        model = mlp(64, 64, 32, 10, seed=seed)
        assert said(model, digits, sgd(model, 0.03), 400, batch_size=batch_size) == {}


def test_a_learning_rate_is_not_too_low_for_a_network_without_gradients(digits):
    """All ReLUs are dead, or there is nothing left to learn."""
    ruined = mlp(64, 128, 10)
    assert "lr-low" not in said(ruined, digits, sgd(ruined, 0.1, 0.9), 1500, batch_size=1)
    learnt = mlp(64, 64, 10)
    said(learnt, digits, sgd(learnt, 0.1, 0.9), 1000)
    assert "lr-low" not in said(learnt, digits, sgd(learnt, 1e-3), 400)


@pytest.mark.parametrize("hidden", [(), (64,), (64, 32)], ids=str)
@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
@pytest.mark.parametrize("lr", [1e-3, 5e-4, 1e-5])
def test_weights_that_begin_at_zero_do_not_explode(digits, hidden, loss, lr):
    """Linear and softmax regression, and networks with a last layer of zeros."""
    y = np.eye(10, dtype=np.float32)[digits.y] if loss is F.mse_loss else digits.y
    for make in (lambda model: sgd(model, lr, 0.9), lambda model: optim.Adam(model.parameters(), lr=lr)):
        model = mlp(64, *hidden, 10)
        model[-1].weight.data[:] = 0
        assert "exploding" not in said(model, data.ArrayDataset(digits.x, y), make(model), 200, loss=loss)


def test_no_collapse_if_each_look_has_another_class():
    history = History()
    for step in range(0, 201, 50):
        history.add(replace(look(step), favourite=Favourite(step // 50, 1.0, 0.5)))
    assert "collapse" not in judge(history)
    for step in range(250, 401, 50):
        history.add(replace(look(step), favourite=Favourite(3, 1.0, 0.5)))
    assert "collapse" in judge(history)


def test_no_false_alarm_with_batch_norm_short_cuts_or_a_first_layer_without_bias(digits):
    dp.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    assert said(model, digits, sgd(model, 0.1, 0.9), 400) == {}


def test_the_example_is_right_about_what_vanishes_and_what_helps(vanishing):
    """The networks of examples/vanishing.py, trained: those that it shows to be sick alarm, the cured ones do not."""
    rng = np.random.default_rng(0)
    examples = data.ArrayDataset(rng.random((640, 784), np.float32), rng.integers(0, 10, 640))
    kaiming = {"activation": nn.ReLU, "init": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu")}

    def loss(scores, labels):
        return F.binary_cross_entropy_with_logits(scores, np.eye(10, dtype=np.float32)[labels]) * 10

    def kinds(hidden, **options):
        model = vanishing.network(hidden, **options)
        return set(said(model, examples, sgd(model, 0.01), 32, loss=loss))

    for hidden in (3, 4):
        assert kinds(hidden) == {"vanishing"}
    for hidden in (1, 2):
        assert kinds(hidden) == set()
    assert kinds(4, **kaiming) == set()
    assert kinds(4, residual=True) == set()
    assert kinds(4, **kaiming, normalise=True, residual=True) == set()


@pytest.mark.parametrize("lr", [0.1, 0.01, 1e-3])
def test_a_last_layer_of_zeros_makes_nothing_vanish(digits, lr):
    """What is before it has no gradient until it has grown."""
    model = mlp(64, 64, 32, 10)
    model[-1].weight.data[...] = 0
    assert "vanishing" not in said(model, digits, sgd(model, lr, 0.9), 100)


# --- what is said, and when


def look(step, loss=1.0, grad=1.0, lr=0.1):
    layers = {name: ParameterHealth(grad, 1.0, 1e-3, grad) for name in ("0.weight", "1.weight")}
    return Look(step, loss, lr, 64, layers)


def test_a_thing_is_said_once_and_again_when_it_is_ten_times_worse():
    diagnosis = Diagnosis()
    steps = [1, 2, 4, 8, 16, 32, 50, 100]
    for step in steps[:4]:
        assert diagnosis.add(look(step)) == []
    (first,) = diagnosis.add(look(16, grad=200.0))
    assert first.kind == "exploding"
    assert "200 times the usual" in first.text
    assert first.line() == {"step": 16, "verdict": {"kind": "exploding", "layer": "0.weight", "text": first.text}}
    assert diagnosis.add(look(32, grad=400.0)) == []
    (again,) = diagnosis.add(look(50, grad=4000.0))
    assert again.kind == "exploding"


def test_gradients_that_begin_after_a_while_do_not_explode():
    """As those of a term of the loss whose weight is 0 at first."""
    diagnosis = Diagnosis()
    for step in (1, 2, 4, 8):
        diagnosis.add(look(step, grad=0.0))
    assert diagnosis.add(look(16)) == []


@pytest.mark.parametrize(("losses", "kinds"), [((-5, -6, -7, -8), []), ((-5, -1, 1, 2), ["lr-high"])])
def test_a_loss_below_zero_has_risen_only_if_it_has(losses, kinds):
    """That of a density, say; its double is lower still."""
    history = History()
    for step, loss in zip((1, 2, 4, 8), losses, strict=True):
        history.add(Look(step, loss, 0.1, 64, {"0.weight": ParameterHealth(1.0, 1.0, 0.15)}), judged=step < 8)
    assert list(judge(history)) == kinds


def test_clipped_gradients_may_be_large():
    diagnosis = Diagnosis(clipped=True)
    for step in (1, 2, 4, 8):
        diagnosis.add(look(step))
    assert diagnosis.add(look(16, grad=1e6)) == []


def test_looks_at_every_step_are_judged_as_seldom_as_the_usual_ones():
    diagnosis = Diagnosis()
    for step in range(1, 201):
        diagnosis.add(look(step))
    assert [seen.step for seen in diagnosis.history.looks] == [4, 8, 16, 32, 50, 100, 150, 200]
    assert len(diagnosis.history.losses) == 200


def test_nothing_to_judge_is_no_fault():
    assert all(rule(History()) is None for kind, rule in RULES.items() if kind != "non-finite")
    history = History()
    history.add(Look(1, 1.0, 0.1, 64, {}))
    assert judge(history) == {}
    failed = History()
    failed.add(Look(1, math.nan, 0.1, 0, {}))
    assert judge(failed)["non-finite"].text.startswith("the loss is not finite; ")


@pytest.mark.parametrize(("batch", "word"), [(10, "far below"), (1000, "is near"), (100_000, "far above")])
def test_whether_more_ranks_would_help(batch, word):
    assert word in advice_about_ranks(1000, batch)


def test_what_was_seen_and_said_survives_a_checkpoint():
    diagnosis = Diagnosis()
    for step in (1, 2, 4, 8):
        diagnosis.add(look(step))
    diagnosis.add(look(16, grad=200.0))
    again = Diagnosis()
    again.restore(json.loads(json.dumps(diagnosis.state())))
    assert again.history == diagnosis.history
    assert again.add(look(32, grad=200.0)) == []
