"""Every optimizer through the same problems. A new optimizer is one class and one row of `ROWS`."""

import json
import math
import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from distprop import functional as F
from distprop import manual_seed, nn, optim, tensor
from distprop.buffer import FlatBuffer
from distprop.comm import SoloCommunicator, run_threads
from distprop.optim import decay_groups, schedule
from distprop.optim.layout import CHUNK_BYTES
from distprop.parallel import DataParallel
from distprop.tensor import Parameter

SHAPES = [(200, 170), (7,), (3, 1, 2), (5,), (), (4, 6)]  # weights and biases in turns
assert CHUNK_BYTES < 200 * 170 * 4  # the first takes more than one chunk in float32 too


class PlainLARS:
    """arXiv:1708.03888, algorithm 1, written out for arrays."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3, eps=1e-8, adapt=True):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        defaults |= {"trust_coefficient": trust_coefficient, "eps": eps, "adapt": adapt}
        given = params if isinstance(params[0], dict) else [{"params": params}]
        self.param_groups = [{**defaults, **group} for group in given]
        self.state: dict[int, Any] = {}

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state.setdefault(id(p), {"v": np.zeros_like(p.data), "m": 0.0, "t": 0}), group)

    def update(self, p, state, o):
        g, w = p.grad, p.data
        rate = 1.0
        if o["adapt"] and np.linalg.norm(w) and np.linalg.norm(g):
            denominator = np.linalg.norm(g) + o["weight_decay"] * np.linalg.norm(w) + o["eps"]
            rate = o["trust_coefficient"] * np.linalg.norm(w) / denominator
        state["v"] = o["momentum"] * state["v"] + o["lr"] * rate * (g + o["weight_decay"] * w)
        p.data = w - state["v"]


class PlainLAMB(PlainLARS):
    """arXiv:1904.00962, algorithm 2, written out for arrays."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, adapt=True):
        super().__init__(params, lr, weight_decay=weight_decay, eps=eps, adapt=adapt)
        for group in self.param_groups:
            group["betas"] = group.get("betas", betas)

    def update(self, p, state, o):
        (b1, b2), g, w = o["betas"], p.grad, p.data
        state["t"] += 1
        state["m"] = b1 * state["m"] + (1 - b1) * g
        state["v"] = b2 * state["v"] + (1 - b2) * g**2
        m, v = state["m"] / (1 - b1 ** state["t"]), state["v"] / (1 - b2 ** state["t"])
        u = m / (np.sqrt(v) + o["eps"]) + o["weight_decay"] * w
        ratio = np.linalg.norm(w) / np.linalg.norm(u) if o["adapt"] and np.linalg.norm(w) and np.linalg.norm(u) else 1
        p.data = w - o["lr"] * ratio * u


@dataclass
class PlainParameter:
    data: np.ndarray
    grad: np.ndarray | None = None


PLAIN = {"LARS": PlainLARS, "LAMB": PlainLAMB}

# Name (PyTorch's where it has one), options, and a learning rate for the problems at the end.
ROWS = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 0.02),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}, 0.02),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True, "maximize": True}, 0.02),
    ("Adam", {}, 0.02),
    ("Adam", {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}, 0.02),
    ("Adam", {"lr": 0.02, "betas": (0.5, 0.6), "amsgrad": True}, 0.02),
    ("Adam", {"lr": 0.02, "weight_decay": 0.1, "amsgrad": True, "maximize": True}, 0.02),
    ("AdamW", {}, 0.02),
    ("AdamW", {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3, "amsgrad": True}, 0.02),
    ("AdamW", {"maximize": True}, 0.02),
    ("RMSprop", {}, 0.002),
    ("RMSprop", {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "momentum": 0.8, "weight_decay": 0.1}, 0.002),
    ("RMSprop", {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "momentum": 0.8, "centered": True}, 0.002),
    ("RMSprop", {"momentum": 0.8, "centered": True, "eps": 1e-3, "maximize": True}, 0.002),
    ("Adagrad", {}, 0.5),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-3}, 0.5),
    ("Adagrad", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, 0.5),
    ("LARS", {"lr": 0.5, "trust_coefficient": 0.02}, 1.0),
    ("LARS", {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.1, "trust_coefficient": 0.1, "eps": 0.1}, 1.0),
    ("LAMB", {}, 0.01),
    ("LAMB", {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}, 0.01),
]
IDS = [f"{name} {' '.join(f'{k}={v}' for k, v in options.items())}".strip() for name, options, _ in ROWS]
every = pytest.mark.parametrize("row", ROWS, ids=IDS)


class Pair:
    """The same parameters in an optimizer of ours and in PyTorch's, or in a plain one where PyTorch has none.

    `groups` makes parameter groups out of a list of parameters.
    """

    def __init__(self, row, torch, dtype=np.float64, groups=list, **options):
        name, own_options, _ = row
        rng = np.random.default_rng(3)
        arrays = [0.3 * rng.normal(size=shape).astype(dtype) for shape in SHAPES]
        self.rng, self.torch = rng, None if name in PLAIN else torch
        self.ours = [Parameter(array) for array in arrays]
        self.optimizer = getattr(optim, name)(groups(self.ours), **(own_options | options))
        if self.torch is None:
            self.theirs = [PlainParameter(array.copy()) for array in arrays]
        else:
            self.theirs = [torch.nn.Parameter(torch.tensor(array)) for array in arrays]
        plain_options = {k: v(0) if callable(v) else v for k, v in (own_options | options).items()}
        self.reference = (PLAIN.get(name) or getattr(torch.optim, name))(groups(self.theirs), **plain_options)

    def give_gradients(self, without_theirs=()):
        for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            gradient = self.rng.normal(size=p.shape).astype(p.dtype)
            p.grad = gradient
            q.grad = None if i in without_theirs else self.torch.tensor(gradient) if self.torch else gradient

    def step(self, without_theirs=()):
        self.give_gradients(without_theirs)
        self.optimizer.step()
        self.reference.step()

    def compare(self, tolerance=1e-12):
        for p, q in zip(self.ours, self.theirs, strict=True):
            expected = q.detach().numpy() if self.torch else q.data
            assert p.dtype == expected.dtype
            np.testing.assert_allclose(p.data, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-6)])
@every
def test_twenty_steps_are_the_references(row, dtype, tolerance, torch):
    pair = Pair(row, torch, dtype)
    for _ in range(20):
        pair.step()
        pair.compare(tolerance)


@every
def test_groups_with_options_of_their_own(row, torch):
    def groups(p):
        return [
            {"params": p[0::2], "weight_decay": 0.2},
            {"params": p[1::4], "weight_decay": 0.0},
            {"params": p[3:4], "lr": 0.03},
        ]

    pair = Pair(row, torch, groups=groups)
    FlatBuffer(pair.ours)  # in the order of the model, so that the groups' members lie in turns
    for _ in range(5):
        pair.step()
        pair.compare()
    for optimizer in (pair.optimizer, pair.reference):  # options may be changed as one goes
        optimizer.param_groups[1]["weight_decay"] = 0.4
        optimizer.param_groups[0]["lr"] = 0.001
    pair.step()
    pair.compare()


@every
def test_a_schedule_sets_the_rate_of_each_step(row, torch):
    rates = schedule.warmup(schedule.cosine(0.1, 8), 3)
    pair = Pair(row, torch, lr=rates)
    for step in range(12):
        for group in pair.reference.param_groups:
            group["lr"] = rates(step)
        pair.step()
        pair.compare()


@every
def test_a_frozen_parameter_is_left_alone_and_does_not_count_as_updated(row, torch):
    """PyTorch counts the updates of each parameter by itself, which matters to Adam's corrections."""
    pair = Pair(row, torch)
    for frozen in ((0, 3), (0, 3), (), (3,), (1,), ()):
        for i, p in enumerate(pair.ours):
            p.requires_grad = i not in frozen
        before = [p.data.copy() for p in pair.ours]
        pair.step(without_theirs=frozen)
        pair.compare()
        for i in frozen:
            np.testing.assert_array_equal(pair.ours[i].data, before[i])


@every
def test_a_parameter_without_a_gradient_counts_as_having_a_zero_one(row, torch):
    pair = Pair(row, torch)
    for _ in range(3):
        pair.give_gradients()
        pair.ours[0].grad = None
        q = pair.theirs[0]
        q.grad = torch.zeros_like(q) if pair.torch else np.zeros_like(q.data)
        pair.optimizer.step()
        pair.reference.step()
        pair.compare()


@every
def test_parameters_that_move_to_another_buffer_keep_their_state(row, torch):
    pair = Pair(row, torch)
    p, other = pair.ours, Parameter(np.ones(5))
    for arrange in (
        lambda: None,
        lambda: FlatBuffer([other, *p]),
        lambda: FlatBuffer([p[2], other, p[0], p[3], p[4], p[1], p[5]]),
        lambda: (FlatBuffer(p[:1]), FlatBuffer([other, *p[1:]])),
        lambda: None,
    ):
        arrange()
        other.grad = 100
        pair.step()
        pair.compare()
        np.testing.assert_array_equal(other.data, np.ones(5))


@every
def test_gradients_are_not_changed_by_a_step(row, torch):
    pair = Pair(row, torch)
    pair.give_gradients()
    before = [p.grad.copy() for p in pair.ours]
    pair.optimizer.step()
    for p, gradient in zip(pair.ours, before, strict=True):
        np.testing.assert_array_equal(p.grad, gradient)


def run(row, groups, steps=6, buffered=True):
    name, options, _ = row
    rng = np.random.default_rng(0)
    parameters = [Parameter(0.3 * rng.normal(size=shape)) for shape in SHAPES]
    if buffered:
        FlatBuffer(parameters)
    optimizer = getattr(optim, name)(groups(parameters), **options)
    continue_run(optimizer, parameters, rng, steps)
    return parameters, optimizer, rng


def continue_run(optimizer, parameters, rng, steps):
    for _ in range(steps):
        for p in parameters:
            p.grad = rng.normal(size=p.shape)
        optimizer.step()


def assert_identical(ones, others):
    for p, q in zip(ones, others, strict=True):
        np.testing.assert_array_equal(p.data, q.data)


@pytest.mark.parametrize("buffered", [True, False])
@every
def test_split_into_groups_is_the_same_to_the_last_bit(row, buffered):
    whole, _, _ = run(row, list)
    parts, _, _ = run(row, lambda p: [{"params": p[0::2]}, {"params": p[1::2]}], buffered=buffered)
    other_lr = 0.1  # groups that are walked apart
    apart, _, _ = run(row, lambda p: [{"params": p[0::2]}, {"params": p[1::2], "lr": other_lr}])
    assert_identical(whole, parts)
    assert_identical(whole[0::2], apart[0::2])


@every
def test_a_loaded_state_goes_on_to_the_last_bit_in_another_layout(row):
    """The arrays go through bytes, everything else through JSON, as a checkpoint does it."""

    def groups(p):
        return [{"params": p[0::2]}, {"params": p[1::2], "weight_decay": 0.02, "lr": schedule.exponential(0.1, 0.9)}]

    parameters, optimizer, rng = run(row, groups, steps=2)
    parameters[2].requires_grad = False
    continue_run(optimizer, parameters, rng, 2)
    parameters[2].requires_grad = True
    saved = optimizer.state_dict()
    arrays = {name: array.copy() for name, array in saved.pop("arrays").items()}
    text = json.dumps(saved)

    others = [Parameter(p.data.copy()) for p in parameters]
    FlatBuffer(others[::-1])
    other = type(optimizer)(groups(others), **row[1] | {"lr": 0.7})
    continue_run(other, others, rng, 1)
    for p, q in zip(others, parameters, strict=True):
        p.data = q.data
    other.load_state_dict({**json.loads(text), "arrays": arrays})
    assert other.steps == 4
    options = [[v for k, v in group.items() if k not in ("params", "lr")] for group in optimizer.param_groups]
    assert [[v for k, v in g.items() if k not in ("params", "lr")] for g in other.param_groups] == options
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    continue_run(optimizer, parameters, np.random.default_rng(5), 5)
    continue_run(other, others, np.random.default_rng(5), 5)
    assert_identical(parameters, others)


@every
def test_a_state_from_before_the_first_step_can_be_loaded(row):
    _, optimizer, _ = run(row, list, steps=0)
    assert optimizer.state_dict()["arrays"] == {}
    parameters, other, _ = run(row, list, steps=2)
    other.load_state_dict(optimizer.state_dict())
    assert other.steps == 0
    continue_run(other, parameters, np.random.default_rng(5), 1)


def test_the_state_has_pytorchs_names_and_the_parameters_shapes():
    expected = {
        "SGD": {"momentum_buffer"},
        "AdamW": {"exp_avg", "exp_avg_sq"},
        "RMSprop": {"square_avg"},
        "Adagrad": {"sum"},
    }
    for name, names in expected.items():
        options = {"momentum": 0.9} if name == "SGD" else {}
        parameters, optimizer, _ = run((name, options, None), list, steps=1)
        arrays = optimizer.state_dict()["arrays"]
        assert {key: array.shape for key, array in arrays.items()} == {
            f"{i}.{state}": p.shape for i, p in enumerate(parameters) for state in names
        }


def test_a_state_that_does_not_fit_is_refused_with_every_reason_and_changes_nothing():
    def groups(p):
        return [{"params": p[:3]}, {"params": p[3:], "lr": schedule.constant(0.1)}]

    _, optimizer, _ = run(("Adam", {}, None), groups, steps=3)
    state = optimizer.state_dict()
    before = json.dumps({k: v for k, v in state.items() if k != "arrays"})
    first, second = state["param_groups"]
    arrays = dict(state["arrays"])
    wrong = {k: v for k, v in arrays.items() if k not in ("0.exp_avg", "1.exp_avg_sq")}
    wrong |= {"1.exp_avg_sq": np.ones(8), "3.sum": np.ones(5), "9.exp_avg": np.ones(3), "3.exp_avg": np.ones(5, int)}
    cases = [
        ("1 groups, expected 2$", {"param_groups": [first]}),
        ("0.exp_avg: missing; .*3.sum: unexpected; 9.exp_avg: unexpected", {"arrays": wrong}),
        (r"1.exp_avg_sq: float64 \(8,\), expected float64 \(7,\)", {"arrays": wrong}),
        (r"3.exp_avg: int64 \(5,\), expected float64 \(5,\)", {"arrays": wrong}),
        ("arrays is not a mapping", {"arrays": [1]}),
        ("unexpected 'surprise'", {"surprise": 1}),
        ("steps is -1, expected 0 or more", {"steps": -1}),
        (r"missed is \[0, 0\], expected 6 numbers up to 3", {"missed": [0, 0]}),
        ("missed is None", {"missed": None}),
        ("steps is -1, expected 0 or more; 0.exp_avg: mis.*9.exp_avg: unexpected", {"steps": -1, "arrays": wrong}),
        (r"missed is \[4,", {"missed": [4, 0, 0, 0, 0, 0]}),
        ("group 0: eps must be 0 or more, got -1", {"param_groups": [first | {"eps": -1}, second]}),
        ("group 1: .*got nan.*0.exp_avg: mis", {"param_groups": [first, second | {"eps": math.nan}], "arrays": wrong}),
        (r"group 0: parameters \[0, 1\], expected", {"param_groups": [first | {"params": [0, 1]}, second]}),
        ("group 0: no eps", {"param_groups": [{k: v for k, v in first.items() if k != "eps"}, second]}),
        ("group 0: unexpected momentum", {"param_groups": [first | {"momentum": 0.9}, second]}),
        ("group 0: the learning rate must be a number .*'high'", {"param_groups": [first | {"lr": "high"}, second]}),
        ("param_groups is not a list", {"param_groups": 3}),
    ]
    for message, changes in cases:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict({**state, **changes})
    with pytest.raises(ValueError, match="there is no 'missed'; there is no 'arrays'"):
        optimizer.load_state_dict({"steps": 3, "param_groups": [first, second]})
    after = optimizer.state_dict()
    assert json.dumps({k: v for k, v in after.items() if k != "arrays"}) == before
    for key, array in after["arrays"].items():
        np.testing.assert_array_equal(array, arrays[key])
    optimizer.load_state_dict(state)


def test_a_state_from_before_there_was_an_option_fits_where_it_is_off():
    def without(state, name):
        return {**state, "param_groups": [{k: v for k, v in g.items() if k != name} for g in state["param_groups"]]}

    parameters, optimizer, _ = run(("Adam", {"lr": 0.02, "betas": (0.8, 0.95)}, None), list, steps=3)
    old = without(optimizer.state_dict(), "maximize")
    others = [Parameter(p.data.copy()) for p in parameters]
    other = optim.Adam(others, lr=0.5)
    other.load_state_dict(old)
    assert other.param_groups[0]["maximize"] is False
    continue_run(optimizer, parameters, np.random.default_rng(5), 3)
    continue_run(other, others, np.random.default_rng(5), 3)
    assert_identical(parameters, others)
    with pytest.raises(ValueError, match=r"group 0: no maximize$"):
        optim.Adam(others, maximize=True).load_state_dict(old)
    with pytest.raises(ValueError, match=r"group 0: no weight_decay$"):  # 0 is a number, not off
        other.load_state_dict(without(old, "weight_decay"))


def test_a_parameter_that_changes_its_size_under_an_optimizer_is_refused():
    parameters, optimizer, _ = run(("Adam", {}, None), list, steps=1)
    parameters[1].data = np.ones(8)
    with pytest.raises(ValueError, match=r"parameter 1 has shape \(8,\) now, but exp_avg for 7 values"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *[
            (name, {"lr": -1}, "learning rate must be 0 or more, got -1")
            for name in ("Adam", "RMSprop", "LARS", "LAMB")
        ],
        *[(name, {"weight_decay": -1}, "weight_decay must be 0 or more") for name in ("AdamW", "Adagrad", "LAMB")],
        *[(name, {"eps": -1}, "eps must be 0 or more") for name in ("Adam", "RMSprop", "Adagrad", "LARS")],
        *[(name, {"betas": (1.0, 0.9)}, "beta1 must be .* less than 1, got 1.0") for name in ("Adam", "LAMB")],
        ("AdamW", {"betas": (0.9, -0.1)}, "beta2 must be at least 0"),
        ("Adam", {"betas": (0.9,)}, "betas must be two numbers"),
        ("Adam", {"betas": 0.9}, "betas must be two numbers, got 0.9"),
        ("RMSprop", {"alpha": 1.0}, "alpha must be .* less than 1, got 1.0"),
        ("RMSprop", {"momentum": -1}, "momentum must be 0 or more"),
        ("Adagrad", {"lr_decay": -1}, "lr_decay must be 0 or more"),
        ("Adagrad", {"initial_accumulator_value": -1}, "initial_accumulator_value must be 0 or more"),
        ("LARS", {"trust_coefficient": -1}, "trust_coefficient must be 0 or more"),
    ],
)
def test_bad_options_are_refused_also_in_a_group(name, options, message):
    p = Parameter(np.ones(2))
    with pytest.raises(ValueError, match=message):
        getattr(optim, name)([p], **{"lr": 0.1, **options})
    with pytest.raises(ValueError, match=message):
        getattr(optim, name)([{"params": [p], **options}], lr=0.1)


# groups


def test_decay_groups_are_matrices_and_the_rest():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for given in (model, model.parameters(), DataParallel(model, SoloCommunicator())):
        decaying, rest = decay_groups(given, 0.1, adapt=False)
        assert [p.shape for p in decaying.pop("params")] == [(4, 3), (2, 4)]
        assert [p.shape for p in rest.pop("params")] == [(4,), (2,)]
        assert (decaying, rest) == ({"weight_decay": 0.1}, {"weight_decay": 0.0, "adapt": False})
    assert [len(group["params"]) for group in decay_groups([Parameter(np.ones(3))], 0.1)] == [1]


def test_no_bias_decays_however_many_axes_it_has():
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    decaying, _ = decay_groups(attention, 0.1)
    assert decaying["params"] == [attention.in_proj_weight, attention.out_proj.weight]


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm((2, 3)), nn.RMSNorm((2, 3)), nn.GroupNorm(3, 6), nn.BatchNorm1d(6)], ids=repr
)
def test_no_parameter_of_a_norm_decays(norm):
    model = nn.Sequential(nn.Linear(6, 6), norm)
    for given in (model, DataParallel(model, SoloCommunicator())):
        decaying, _ = decay_groups(given, 0.1)
        assert decaying["params"] == [model[0].weight]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_groups_that_differ_in_weight_decay_are_walked_as_one_stretch(name):
    """Python per parameter would cost more than the arithmetic: 0.8 ms for 200 parameters instead of 0.1."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))
    FlatBuffer(list(model.parameters()))
    optimizer = getattr(optim, name)(decay_groups(model, 0.1), lr=0.1)
    for p in model.parameters():
        p.grad = 1
    optimizer.step()
    (chunks,) = (chunks for of_a_kind in optimizer._plan.values() for chunks in of_a_kind)
    assert [len(chunk.segments) for chunk in chunks] == [20]


def test_layers_left_out_by_lars_and_lamb_take_plain_steps():
    w, b = Parameter(np.full((2, 2), 3.0)), Parameter(np.full(2, 3.0))
    w.grad, b.grad = 1, 1
    optim.LARS(decay_groups([w, b], 0.5, adapt=False), lr=0.1, trust_coefficient=0.5).step()
    np.testing.assert_allclose(b.data, 3 - 0.1)
    np.testing.assert_allclose(w.data, 3 - 0.1 * (0.5 * 6 / (2 + 0.5 * 6)) * (1 + 0.5 * 3))

    ours, theirs = (Parameter(np.array([1.0, -2.0])) for _ in range(2))
    lamb, adamw = optim.LAMB([ours], adapt=False), optim.AdamW([theirs], eps=1e-6)
    for step in range(5):
        ours.grad = theirs.grad = [step, 1 - step]
        lamb.step()
        adamw.step()
        np.testing.assert_allclose(ours.data, theirs.data, rtol=1e-5)


@pytest.mark.parametrize("name", ["LARS", "LAMB"])
def test_a_layer_that_starts_at_zero_can_leave_it(name):
    p = Parameter(np.zeros(3))
    p.grad = 1
    getattr(optim, name)([p], lr=0.1).step()
    np.testing.assert_allclose(p.data, -0.1, rtol=1e-5)


def test_a_variance_that_rounds_below_zero_does_not_make_centered_rmsprop_nan():
    p = Parameter(np.ones(50, np.float32))
    optimizer = optim.RMSprop([p], lr=1e-9, alpha=0.5, centered=True)
    for _ in range(100):
        p.grad = np.linspace(0.1, 1, 50)
        optimizer.step()
    assert np.isfinite(p.data).all()


# memory


def a_large_model():
    """40 MB of parameters, with gradients."""
    parameters = [Parameter(np.ones(shape, np.float32)) for shape in ((5_000_000,), (2000, 2499), (2000,))]
    FlatBuffer(parameters)
    for p in parameters:
        p.grad = 1
    return parameters


@every
def test_a_step_makes_no_temporary_of_the_models_size(row):
    name, options, _ = row
    parameters = a_large_model()
    optimizer = getattr(optim, name)(parameters, **options)
    tracemalloc.start()
    try:
        optimizer.step()
        _, first_peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        optimizer.step()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    state = sum(array.nbytes for array in optimizer.state_dict()["arrays"].values())
    assert first_peak - state < 2_000_000
    assert peak - before < 200_000


def clip_the_norm(parameters, average):
    assert optim.clip_grad_norm_(parameters, 1.0) > 3000


def clip_the_values(parameters, average):
    optim.clip_grad_value_(parameters, 0.5)


def average_the_weights(parameters, average):
    average.update()


def take_the_averaged_weights(parameters, average):
    with average.averaged():
        pass


@pytest.mark.parametrize(
    "call", [clip_the_norm, clip_the_values, average_the_weights, take_the_averaged_weights], ids=lambda c: c.__name__
)
def test_clipping_and_averaging_make_none_either(call):
    parameters = a_large_model()
    average = optim.ExponentialMovingAverage(parameters)
    average.update()  # makes the averages
    tracemalloc.start()
    try:
        call(parameters, average)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000


# problems


def ill_conditioned_quadratic():
    w = Parameter(np.array([1.0, -1.0]))
    return [w], lambda: (w * w * np.array([1.0, 20.0])).sum()


def regression():
    manual_seed(1)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(32, 3))
    y = np.sin(x @ np.array([[1.0], [-2.0], [0.5]]))
    model = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 1)).double()
    return list(model.parameters()), lambda: F.mse_loss(model(tensor(x)), tensor(y))


@pytest.mark.parametrize("problem", [ill_conditioned_quadratic, regression])
@every
def test_the_loss_falls_to_a_hundredth(row, problem):
    name, options, lr = row
    parameters, loss = problem()
    plain = {k: v for k, v in options.items() if k not in ("lr", "weight_decay", "eps", "lr_decay")}
    steps = 1500
    optimizer = getattr(optim, name)(parameters, lr=schedule.cosine(lr, steps), weight_decay=0.0, **plain)
    first = loss().item()
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        (-value if options.get("maximize") else value).backward()
        optimizer.step()
    assert loss().item() < first / 100


# ranks


def train(row, comm):
    name, options, _ = row
    manual_seed(7)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    optimizer = getattr(optim, name)(decay_groups(model, 0.05), **{k: v for k, v in options.items() if k != "params"})
    parallel = DataParallel(model, comm)  # moves the parameters after the optimizer was made
    rng = np.random.default_rng(2)
    for step in range(8):
        x, y = rng.normal(size=(7, 4)), rng.normal(size=(7, 2))
        mine = slice(None) if comm.size == 1 else (slice(0, step % 7), slice(step % 7, 7))[comm.rank]
        loss = F.mse_loss(parallel(tensor(x[mine])), tensor(y[mine]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.data.copy() for p in model.parameters()]


@every
def test_two_ranks_with_uneven_shares_are_one(row):
    alone = train(row, SoloCommunicator())
    one, other = run_threads(2, lambda comm: train(row, comm))
    for p, q, expected in zip(one, other, alone, strict=True):
        np.testing.assert_array_equal(p, q)
        np.testing.assert_allclose(p, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [optim.LARS, optim.LAMB])
def test_layers_adapt_one_by_one_from_the_step_on_at_which_they_are_told_to(kind, rng):
    values = [rng.normal(size=3), rng.normal(size=(4, 2))]
    gradients = [rng.normal(size=(2, 3)), rng.normal(size=(2, 4, 2))]
    found = []
    for apart in (False, True):
        parameters = [Parameter(value.copy()) for value in values]
        optimizers = (
            [kind([p], lr=0.1, adapt=False) for p in parameters] if apart else [kind(parameters, 0.1, adapt=False)]
        )
        for step in range(2):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient[step]
            for optimizer in optimizers:
                optimizer.param_groups[0]["adapt"] = step == 1
                optimizer.step()
        found.append([p.data for p in parameters])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-14)


def test_a_schedule_state_for_a_schedule_without_one_changes_nothing():
    parameter = Parameter(np.ones(2))
    saved = optim.SGD([parameter], optim.ReduceOnPlateau(0.1), momentum=0.9).state_dict()
    optimizer = optim.SGD([parameter], lambda step: 0.1, momentum=0.5)
    with pytest.raises(
        ValueError, match="a schedule's state, lr, best, bad, resting, for one that has no load_state_dict"
    ):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["momentum"] == 0.5


def test_a_schedule_that_refuses_its_state_leaves_the_options_as_they_are():
    class Picky:
        def __call__(self, step):
            return 0.1

        def state_dict(self):
            return {"place": 1}

        def load_state_dict(self, state):
            raise ValueError("not this place")

    parameter = Parameter(np.ones(2))
    saved = optim.SGD([parameter], Picky(), momentum=0.9).state_dict()
    optimizer = optim.SGD([parameter], Picky(), momentum=0.5)
    with pytest.raises(ValueError, match="not this place"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["momentum"] == 0.5


@pytest.mark.parametrize("model", [nn.Linear(2, 1), nn.Sequential(nn.Linear(2, 1))])
@pytest.mark.parametrize("what", ["the model itself", "its layers"])
def test_a_model_in_place_of_its_parameters_is_refused_with_the_remedy(model, what):
    given = model if what == "the model itself" else [model]
    for take in (
        lambda: optim.SGD(given, lr=0.1),
        lambda: optim.ExponentialMovingAverage(given),
        lambda: optim.clip_grad_norm_(given, 1.0),
        lambda: optim.clip_grad_value_(given, 1.0),
    ):
        with pytest.raises(TypeError, match=rf"got a {type(model).__name__}; pass model\.parameters\(\)"):
            take()
