"""The numbers of gradient health, on one process; health_suite has what several ranks make of them."""

import json
import math

import numpy as np
import pytest

import distprop as dp
import health_suite
from distprop import data, nn, optim
from distprop import functional as F
from distprop.comm import SoloCommunicator
from distprop.health import Health, is_looked_at, learning_speeds, noise_estimates, norm
from distprop.parallel import NonFiniteGradientError
from distprop.train import Trainer
from scenario import run


@pytest.mark.parametrize(("scenario", "size"), health_suite.suite.in_threads((1, 2, 3, 4)))
def test_health(scenario, size):
    run(scenario, size)


def test_norms_beyond_the_range_of_squares():
    assert norm(np.full(4, 1e30, np.float32)) == pytest.approx(2e30)
    assert norm(np.full(4, 1e-30, np.float32)) == pytest.approx(2e-30)
    assert norm(np.zeros(3, np.float32)) == 0
    assert norm(np.zeros(0, np.float32)) == 0
    assert norm(np.array([1, np.inf], np.float32)) == math.inf
    assert math.isnan(norm(np.array([1, np.nan], np.float32)))


def test_steps_that_are_looked_at():
    assert [step for step in range(1, 45) if is_looked_at(step, 20)] == [1, 2, 4, 8, 16, 20, 40]
    assert all(is_looked_at(step, 1) for step in range(1, 9))
    assert not any(is_looked_at(step, 0) for step in range(1, 9))


def test_the_noise_scale_of_known_noise():
    """Per-example gradients N(g, σ²) in 400 dimensions: tr(Σ) = 400 σ², whatever the two batch sizes."""
    rng = np.random.default_rng(0)
    true, sigma = rng.normal(size=400), 3.0
    gradients = true + sigma * rng.normal(size=(4000, 64, 400))
    small = (gradients[:, :8].mean(axis=1) ** 2).sum(axis=1).mean()
    big = (gradients.mean(axis=1) ** 2).sum(axis=1).mean()
    variance, square = noise_estimates(small, 8, big, 64)
    assert variance == pytest.approx(400 * sigma**2, rel=0.02)
    assert square == pytest.approx((true**2).sum(), rel=0.02)
    assert noise_estimates(small, 64, big, 64) is None


def look_at(model, x, y, *, lr=0.1, loss=F.cross_entropy, steps=1, **options):
    trainer = Trainer(
        model, loss, optim.SGD(model.parameters(), lr=lr), batch_size=len(x), progress=False, **{"health": 1, **options}
    )
    trainer.fit(data.ArrayDataset(x, y), steps=steps)
    return trainer._diagnosis.history.looks[-1]


def examples(rows=16, features=6, classes=3):
    rng = np.random.default_rng(1)
    return rng.normal(size=(rows, features)).astype(np.float32), rng.integers(0, classes, rows)


def test_the_numbers_of_a_layer():
    dp.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = examples()
    weights = {name: parameter.data.copy() for name, parameter in model.named_parameters()}
    F.cross_entropy(model(x), y).backward()
    grads = {name: parameter.grad.copy() for name, parameter in model.named_parameters()}
    speeds = learning_speeds(model)
    assert speeds == {"0": norm(grads["0.bias"]), "2": norm(grads["2.bias"])}
    look = look_at(model, x, y, lr=0.1, clip_norm=1e-3)  # the norm is that before clipping
    for name, found in look.parameters.items():
        assert found.grad_norm == pytest.approx(np.linalg.norm(grads[name]), rel=1e-5)
        assert found.weight_norm == pytest.approx(np.linalg.norm(weights[name]), rel=1e-5)
    clipped = 1e-3 / math.sqrt(sum(norm(grad) ** 2 for grad in grads.values()))
    expected = 0.1 * clipped * norm(grads["0.weight"]) / norm(weights["0.weight"])
    assert look.parameters["0.weight"].update_ratio == pytest.approx(expected, rel=1e-2)
    assert look.parameters["0.weight"].learning_speed == pytest.approx(speeds["0"], rel=1e-5)
    assert not look.parameters["0.bias"].is_matrix


def test_silent_and_saturated_units_and_the_favourite_class():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3))
    model[0].bias.data[:] = [-100, 0, 0, -100, 0]
    model[2].weight.data[:] = 0
    model[2].bias.data[:] = [20, 0, 0, 0]
    model[4].weight.data[:] = 0
    model[4].bias.data[:] = [0, 0, 9]
    x, y = examples()
    look = look_at(model, x, y)
    assert look.units["1"].silent == (True, False, False, True, False)
    assert look.line()["units"] == {"1": {"dead": 0.4}, "3": {"saturated": 0.25}}
    assert (look.favourite.number, look.favourite.predicted) == (2, 1.0)
    assert look.favourite.true == pytest.approx((y == 2).mean(), abs=1e-4)


def test_an_activation_that_is_the_output_may_be_extreme():
    model = nn.Sequential(nn.Linear(6, 1), nn.Sigmoid())
    model[0].bias.data[:] = 20
    x, _ = examples()
    look = look_at(model, x, np.ones((16, 1), np.float32), loss=F.mse_loss)
    assert look.units == {}
    assert look.favourite is None


def test_units_of_images_are_channels_and_pieces_of_a_batch_count_together():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    model[0].weight.data[:] = 0
    model[0].weight.data[1] = 1
    model[0].bias.data[:] = [-1, -8.5, 1]
    x = np.zeros((4, 1, 4, 4), np.float32)
    x[0] = 1  # alive in the first piece only
    look = look_at(model, x, np.zeros(4, np.int64), accumulate=2)
    assert look.units["1"].silent == (True, False, False)
    assert look.noise is not None  # of the first piece against both


def test_of_a_batch_in_pieces_the_noise_is_that_of_the_first_against_all():
    def make():
        dp.manual_seed(0)
        return nn.Linear(6, 3)

    def square_of(rows):
        model = make()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        return sum(norm(parameter.grad) ** 2 for parameter in model.parameters())

    dataset = data.ArrayDataset(*examples())
    ((x, y),) = data.Loader(dataset, batch_size=16, seed=0)
    look = look_at(make(), *dataset.arrays, accumulate=2)
    assert look.noise == pytest.approx(noise_estimates(square_of(slice(8)), 8, square_of(slice(16)), 16), rel=1e-4)


def test_of_a_wide_layer_some_units_are_looked_at():
    model = nn.Sequential(nn.Linear(6, 1000), nn.ReLU(), nn.Linear(1000, 3))
    model[0].weight.data[500:] = 0
    model[0].bias.data[500:] = -1
    look = look_at(model, *examples())
    assert len(look.units["1"].silent) == 250
    assert look.units["1"].dead == pytest.approx(0.5, abs=0.05)


def test_a_gradient_that_is_not_finite_is_named_in_the_metrics(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.second(x) + (self.first(x) ** 2).sum(axis=1, keepdims=True) ** 0.5  # no derivative at 0

    model = Odd()
    model.first.weight.data[:] = model.first.bias.data[:] = 0
    x, y = examples()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, F.cross_entropy, optimizer, batch_size=16, run_dir=tmp_path, progress=False)
    with np.errstate(all="ignore"), pytest.raises(NonFiniteGradientError):
        trainer.fit(data.ArrayDataset(x, y), steps=1)
    health, verdict = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert health["health"]["first.weight"] == {
        "grad_norm": None, "weight_norm": 0.0, "learning_speed": None, "bad": True,
    }  # fmt: skip
    assert health["health"]["second.weight"]["grad_norm"] > 0
    assert (verdict["verdict"]["kind"], verdict["verdict"]["layer"]) == ("non-finite", "first.weight")
    assert [said.kind for said in trainer.verdicts] == ["non-finite"]


def test_nothing_is_written_without_it(tmp_path):
    x, y = examples()
    model = nn.Linear(6, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, F.cross_entropy, optimizer, batch_size=16, run_dir=tmp_path, health=0, progress=False)
    trainer.fit(data.ArrayDataset(x, y), steps=2)
    assert "health" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(("every", "steps"), [(3, [1, 2, 3, 6]), (True, [1, 2, 4]), (False, [])])
def test_a_trainer_looks_every_so_many_steps(every, steps, tmp_path):
    model = nn.Linear(6, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    options = {"batch_size": 16, "run_dir": tmp_path, "progress": False}
    Trainer(model, F.cross_entropy, optimizer, health=every, **options).fit(data.ArrayDataset(*examples()), steps=7)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "health" in line] == steps


def test_a_number_below_0_is_refused():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="health must be 0 or more, got -1"):
        Trainer(model, F.mse_loss, optim.SGD(model.parameters(), lr=0.1), batch_size=1, health=-1)


def test_a_model_goes_back_to_what_it_was_when_a_step_raises():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    health = Health(model, SoloCommunicator(), 1)
    with pytest.raises(KeyError), health.looking(1):
        raise KeyError
    assert "forward" not in vars(model[1])
