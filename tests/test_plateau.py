import json
import math

import numpy as np
import pytest

from distprop import Trainer, data, nn
from distprop import functional as F
from distprop.comm import run_threads
from distprop.optim import SGD, ReduceOnPlateau, schedule
from distprop.tensor import Parameter

RNG = np.random.default_rng(4)
METRICS = {
    "falling, then flat": [3, 2, 1, *[1] * 30],
    "noise": list(RNG.normal(size=40)),
    "just better": [1, *(1 - 1e-3 * i for i in range(40))],
    "just not better": [1, *(1 - 1e-5 * i for i in range(40))],
    "not finite": [math.nan, 1, math.inf, math.nan, 0.5, math.nan, math.nan, -math.inf, 2, 2, 2, math.nan, 2, 2],
    "infinite at first": [math.inf, math.inf, 1, math.inf, *[1] * 12],
    "minus infinity at first": [-math.inf, -math.inf, 1, -math.inf, *[1] * 12],
    "negative": [-1, -2, *[-2.0001] * 10, *[-3] * 10],
    "rising": list(range(30)),
}
OPTIONS = [
    {},
    {"patience": 0},
    {"patience": 2, "factor": 0.5, "min_lr": 0.02},
    {"patience": 2, "cooldown": 3},
    {"patience": 1, "threshold": 0.1, "threshold_mode": "abs"},
    {"patience": 1, "threshold": 0.1, "cooldown": 1, "eps": 1e-3},
]


@pytest.mark.parametrize("metrics", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_it_is_pytorchs(mode, options, metrics, torch):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode, **options)
    ours = ReduceOnPlateau(0.1, mode, **options)
    for step, metric in enumerate(metrics):
        ours.observe(metric)
        reference.step(metric)
        assert ours(step) == optimizer.param_groups[0]["lr"]


def test_an_optimizer_follows_it_also_after_a_warmup():
    p = Parameter(np.zeros(1))
    plateau = ReduceOnPlateau(0.4, patience=0, factor=0.5)
    optimizer = SGD([p], lr=schedule.warmup(plateau, 2))
    rates = []
    for metric in (1, 1, 1, 0.5, 0.5):
        rates.append(optimizer.lr)
        p.grad = 1
        optimizer.step()
        plateau.observe(metric)
    assert rates == pytest.approx([0.0, 0.2, 0.2, 0.1, 0.1])
    assert plateau.lr == pytest.approx(0.05)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_loaded_one_goes_on_the_same(options):
    metrics = METRICS["noise"]
    whole = ReduceOnPlateau(0.1, **options)
    for metric in metrics[:20]:
        whole.observe(metric)
    rest = ReduceOnPlateau(0.7, **options)
    rest.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for metric in metrics[20:]:
        assert rest(0) == whole(0)
        whole.observe(metric)
        rest.observe(metric)
    assert rest.state_dict() == whole.state_dict()
    assert json.loads(json.dumps(ReduceOnPlateau(0.1).state_dict())) == ReduceOnPlateau(0.1).state_dict()


def test_an_optimizers_state_includes_it():
    ps = [Parameter(np.zeros(2)) for _ in range(2)]
    first, second = (ReduceOnPlateau(0.4, patience=0), ReduceOnPlateau(0.4, patience=0))
    saved = SGD(ps, lr=first)
    for metric in (1, 2, 3):
        first.observe(metric)
    state = json.loads(json.dumps(saved.state_dict()))
    other = SGD(ps, lr=second)
    with pytest.raises(ValueError, match="group 0: the schedule has lr, best, bad, resting; got lr"):
        other.load_state_dict({**state, "param_groups": [state["param_groups"][0] | {"lr": {"lr": 1}}]})
    assert second.lr == 0.4
    other.load_state_dict(state)
    assert other.lr == pytest.approx(0.004)
    assert second.state_dict() == first.state_dict()
    number = SGD(ps, lr=0.3)
    number.load_state_dict(state)
    assert number.lr == 0.3
    other.load_state_dict(number.state_dict())
    assert other.param_groups[0]["lr"] is second


def test_all_ranks_take_the_same_decision():
    x = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    y = np.random.default_rng(1).normal(size=(30, 1)).astype(np.float32)

    def train(comm):
        model = nn.Linear(3, 1)
        plateau = ReduceOnPlateau(0.05, patience=1, factor=0.5)
        optimizer = SGD(model.parameters(), lr=plateau)
        rates = []
        trainer = Trainer(
            model,
            F.mse_loss,
            optimizer,
            comm=comm,
            batch_size=7,
            progress=False,
            callbacks=[lambda result: (plateau.observe(result.loss), rates.append(result.lr))],
        )
        trainer.fit(data.ArrayDataset(x, y), epochs=6)
        return rates

    one, other = run_threads(2, train)
    assert one == other
    assert one[-1] < one[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "least"}, "mode is min or max and threshold_mode rel or abs, got 'least'"),
        ({"threshold_mode": "relative"}, "got 'min' and 'relative'"),
        ({"factor": 1.0}, "factor must be at least 0 and less than 1, got 1.0"),
        ({"factor": -0.1}, "factor must be"),
        *[({n: -1}, f"{n} must be 0 or more, got -1") for n in ("lr", "patience", "threshold", "cooldown", "min_lr")],
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReduceOnPlateau(**{"lr": 0.1, **options})
    with pytest.raises(ValueError, match="expected lr, best, bad, resting; got best"):
        ReduceOnPlateau(0.1).load_state_dict({"best": 1})
