"""Optimizers, schedules and clipping beside PyTorch's, step by step. A new optimizer is one class and one row."""

import itertools
import math
import tracemalloc
from functools import partial

import numpy as np
import pytest

import distprop
from distprop import nn, optim
from distprop.buffer import FlatBuffer
from distprop.optim import SGD, clip_grad_norm_, clip_grad_value_, schedule
from distprop.optim.optimizer import CHUNK_BYTES
from distprop.tensor import Parameter

SHAPES = [(200, 170), (7,), (), (3, 1, 2)]  # the first is longer than a chunk in float32 too
assert CHUNK_BYTES < 200 * 170 * 4

# One row an optimizer: ours, PyTorch's name, options. All go through the tests that take `row`.
ROWS = [
    *[
        ("SGD", {"lr": 0.1, "momentum": m, "dampening": d, "weight_decay": w, "nesterov": n})
        for m, d, w, n in itertools.product((0.0, 0.9), (0.0, 0.3), (0.0, 0.05), (False, True))
        if not (n and (m == 0 or d != 0))
    ],
    ("SGD", {"lr": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "maximize": True}),
]
IDS = [f"{name} {' '.join(f'{k}={v}' for k, v in options.items() if v)}" for name, options in ROWS]


def pairs(torch, dtype, shapes=SHAPES):
    """Parameters with the same values in both libraries."""
    rng = np.random.default_rng(3)
    arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    return [Parameter(a.copy()) for a in arrays], [torch.nn.Parameter(torch.tensor(a)) for a in arrays]


def give_gradients(rng, ours, theirs, torch):
    for p, q in zip(ours, theirs, strict=True):
        gradient = rng.normal(size=p.shape).astype(p.dtype)
        p.grad, q.grad = gradient, torch.tensor(gradient)


def assert_equal(ours, theirs, tolerance):
    for p, q in zip(ours, theirs, strict=True):
        expected = q.detach().numpy()
        assert p.dtype == expected.dtype
        np.testing.assert_allclose(p.data, expected, rtol=tolerance, atol=tolerance)


# float32: 20 steps, each with an addition that rounds to 6e-8 of numbers up to about 10
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-6)])
@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_twenty_steps_are_pytorchs(row, dtype, tolerance, rng, torch):
    name, options = row
    ours, theirs = pairs(torch, dtype)
    optimizer, reference = getattr(optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    for _ in range(20):
        optimizer.zero_grad()
        reference.zero_grad()
        give_gradients(rng, ours, theirs, torch)
        optimizer.step()
        reference.step()
        assert_equal(ours, theirs, tolerance)
    assert optimizer.steps == 20


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_groups_with_options_of_their_own(row, rng, torch):
    name, options = row
    ours, theirs = pairs(torch, np.float64)

    def groups(p):
        return [
            {"params": p[:1]},
            {"params": iter(p[1:3]), "lr": 0.01, "weight_decay": 0.2},
            {"params": p[3:], "lr": 0.0},
        ]

    optimizer = getattr(optim, name)(groups(ours), **options)
    reference = getattr(torch.optim, name)(groups(theirs), **options)
    assert [g["lr"] for g in optimizer.param_groups] == [options["lr"], 0.01, 0.0]
    assert len(optimizer.parameters) == 4
    for _ in range(5):
        give_gradients(rng, ours, theirs, torch)
        optimizer.step()
        reference.step()
        assert_equal(ours, theirs, 1e-12)
    optimizer.param_groups[2]["lr"] = reference.param_groups[2]["lr"] = 0.5  # options may be changed as one goes
    give_gradients(rng, ours, theirs, torch)
    optimizer.step()
    reference.step()
    assert_equal(ours, theirs, 1e-12)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_parameters_that_move_to_another_buffer_keep_their_state(row, rng, torch):
    """`DataParallel` may be made before the optimizer, after it, or after some steps, and may hold more or fewer."""
    name, options = row
    ours, theirs = pairs(torch, np.float64)
    optimizer, reference = getattr(optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    other = Parameter(np.ones(5))
    arrangements = [
        lambda: None,
        lambda: FlatBuffer([other, *ours]),
        lambda: FlatBuffer([ours[2], other, ours[0], ours[3], ours[1]]),
        lambda: (FlatBuffer(ours[:1]), FlatBuffer([other, *ours[1:]])),
        lambda: None,
    ]
    for arrange in arrangements:
        give_gradients(rng, ours, theirs, torch)
        arrange()
        other.grad = 100
        optimizer.step()
        reference.step()
        assert_equal(ours, theirs, 1e-12)
        np.testing.assert_array_equal(other.data, np.ones(5))


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_an_optimizer_of_some_parameters_of_a_buffer_leaves_the_others_alone(row, rng, torch):
    name, options = row
    ours, theirs = pairs(torch, np.float64)
    FlatBuffer(ours)
    subset, reference = [ours[3], ours[1]], [theirs[3], theirs[1]]
    optimizer, expected = getattr(optim, name)(subset, **options), getattr(torch.optim, name)(reference, **options)
    before = [ours[0].data.copy(), ours[2].data.copy()]
    for _ in range(3):
        give_gradients(rng, ours, theirs, torch)
        optimizer.step()
        expected.step()
        assert_equal(subset, reference, 1e-12)
    np.testing.assert_array_equal(ours[0].data, before[0])
    np.testing.assert_array_equal(ours[2].data, before[1])


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_frozen_parameter_is_left_alone_and_can_be_thawed(row, rng, torch):
    name, options = row
    ours, theirs = pairs(torch, np.float64)
    optimizer, reference = getattr(optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    for frozen in (None, 1, 0, 3, None):
        give_gradients(rng, ours, theirs, torch)
        for number, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.requires_grad = number != frozen
            if number == frozen:
                q.grad = None  # PyTorch leaves alone what has no gradient; ours would still have one here
        optimizer.step()
        reference.step()
        assert_equal(ours, theirs, 1e-12)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_parameter_without_a_gradient_counts_as_having_a_zero_one(row, rng, torch):
    name, options = row
    ours, theirs = pairs(torch, np.float64)
    optimizer, reference = getattr(optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    for step in range(4):
        optimizer.zero_grad()
        give_gradients(rng, ours, theirs, torch)
        if step != 1:  # in step 1 it has a gradient, so that there is a momentum to go on with
            ours[1].grad, theirs[1].grad = None, torch.zeros(theirs[1].shape, dtype=torch.float64)
        optimizer.step()
        reference.step()
        assert_equal(ours, theirs, 1e-12)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_schedule_is_asked_at_every_step(row, rng, torch):
    name, options = row
    ours, theirs = pairs(torch, np.float64)
    rates = schedule.exponential(0.2, 0.8)
    optimizer = getattr(optim, name)(ours, **{**options, "lr": rates})
    reference = getattr(torch.optim, name)(theirs, **{**options, "lr": 0.2})
    decay = torch.optim.lr_scheduler.ExponentialLR(reference, 0.8)
    for step in range(6):
        assert optimizer.lr == pytest.approx(0.2 * 0.8**step)
        give_gradients(rng, ours, theirs, torch)
        optimizer.step()
        reference.step()
        decay.step()
        assert_equal(ours, theirs, 1e-12)


def test_a_model_that_changes_its_dtype_goes_on_with_its_momentum(rng):
    p = Parameter(np.zeros(3, np.float32))
    optimizer = SGD([p], lr=1.0, momentum=0.5)
    p.grad = [1, 2, 3]
    optimizer.step()
    p.data = p.data.astype(np.float64)
    p.grad = [0, 0, 0]
    optimizer.step()
    assert p.dtype == np.float64
    np.testing.assert_array_equal(p.data, [-1.5, -3, -4.5])


def test_gradients_are_not_changed_by_a_step(rng):
    p = Parameter(rng.normal(size=5))
    p.grad = rng.normal(size=5)
    before = p.grad.copy()
    SGD([p], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True).step()
    np.testing.assert_array_equal(p.grad, before)


def test_zero_grad_forgets_without_touching_memory():
    p = Parameter(np.ones(3))
    optimizer = SGD([p], lr=0.1)
    p.grad = 5
    place = p.grad
    optimizer.zero_grad()
    assert p.grad is None
    assert (place == 5).all()


def test_the_parameters_of_a_model_are_one_run():
    """Python per parameter would cost more than the arithmetic."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.step()
    assert [len(stretches) for stretches in optimizer._plan.values()] == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "learning rate must be 0 or more, got -0.1"),
        ({"lr": float("nan")}, "learning rate must be 0 or more, got nan"),
        ({"lr": 0.1, "momentum": -1}, "momentum must be 0 or more, got -1"),
        ({"lr": 0.1, "weight_decay": -1}, "weight_decay must be 0 or more, got -1"),
        ({"lr": 0.1, "nesterov": True}, "nesterov needs momentum > 0 and dampening = 0"),
        ({"lr": 0.1, "nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov needs momentum > 0"),
    ],
)
def test_bad_options_are_refused_also_in_a_group(options, message):
    p = Parameter(np.ones(2))
    with pytest.raises(ValueError, match=message):
        SGD([p], **options)
    with pytest.raises(ValueError, match=message):
        SGD([{"params": [p], **options}], lr=0.1)


@pytest.mark.parametrize("lr", ["0.1", None, [0.1]])
def test_a_learning_rate_that_is_no_number_is_refused(lr):
    with pytest.raises(TypeError, match="learning rate must be a number or a function of the step, got"):
        SGD([Parameter(np.ones(2))], lr=lr)


def test_bad_parameters_are_refused():
    p = Parameter(np.ones((2, 2)))
    used_up = iter([p])
    list(used_up)
    for empty in ([], used_up, [{"params": []}]):
        with pytest.raises(ValueError, match=r"at least one parameter \(a generator that was used up"):
            SGD(empty, lr=0.1)
    for twice in ([p, p], [{"params": [p]}, {"params": [p]}]):
        with pytest.raises(ValueError, match=r"a parameter of shape \(2, 2\) was given twice"):
            SGD(twice, lr=0.1)
    for wrong in ([np.ones(2)], [p * 2], p, [p, {"params": []}]):
        with pytest.raises(TypeError, match="an optimizer takes parameters, got"):
            SGD(wrong, lr=0.1)
    with pytest.raises(TypeError, match="unknown option momentun; there are lr, momentum"):
        SGD([{"params": [p], "momentun": 0.9}], lr=0.1)
    with pytest.raises(ValueError, match="parameter group 1 has no 'params', only lr"):
        SGD([{"params": [p]}, {"lr": 0.1}])


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_a_group_that_is_added_later_counts_its_updates_from_there_as_in_pytorch(name, torch):
    options = {"SGD": {"momentum": 0.9, "dampening": 0.5}, "Adam": {"weight_decay": 0.1}, "RMSprop": {"centered": True}}
    results = []
    for library, make in (
        (optim, lambda values: Parameter(values.copy())),
        (torch.optim, lambda values: torch.nn.Parameter(torch.tensor(values))),
    ):
        first, second = make(np.linspace(-1, 1, 6)), make(np.linspace(2, 3, 4).reshape(2, 2))
        optimizer = getattr(library, name)([first], lr=0.1, **options[name])
        for step in range(6):
            if step == 3:
                optimizer.add_param_group({"params": second, "lr": 0.05})
            for parameter in (first, second):
                parameter.grad = parameter.data * (step + 1)
            optimizer.step()
        results.append([first.data.tolist(), second.data.tolist(), len(optimizer.param_groups)])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13)


def test_a_group_that_is_added_goes_through_the_state():
    def make(count):
        optimizer = optim.Adam([parameters[0]])
        for parameter in parameters[1:count]:
            optimizer.add_param_group({"params": [parameter], "lr": 0.5})
        return optimizer

    parameters = [Parameter(np.ones(3)), Parameter(np.ones((2, 2)))]
    before = make(1)
    parameters[0].grad = 1
    before.step()
    before.add_param_group({"params": [parameters[1]], "lr": 0.5})
    after = make(2)
    after.load_state_dict(before.state_dict())
    assert after.state_dict()["missed"] == before.state_dict()["missed"] == [0, 1]
    with pytest.raises(ValueError, match="was given twice"):
        after.add_param_group({"params": [parameters[1]]})
    with pytest.raises(ValueError, match="eps must be 0 or more"):
        after.add_param_group({"params": [Parameter(np.ones(1))], "eps": -1})
    assert len(after.param_groups) == 2
    assert len(after.parameters) == 2


@pytest.mark.parametrize("in_groups", [False, True])
def test_parameters_may_come_with_their_names_as_in_pytorch(in_groups, torch):
    def after_a_step(library):
        model = library.nn.Sequential(library.nn.Linear(2, 3), library.nn.Linear(3, 1))
        named = list(model.named_parameters())
        groups = [{"params": iter(named[:2]), "lr": 0.5}, {"params": named[2:]}]
        optimizer = library.optim.SGD(groups if in_groups else model.named_parameters(), lr=0.25)
        for value, (_, p) in enumerate(named):
            p.data[...] = 1
            p.grad = value * torch.ones(p.shape) if library is torch else value
        optimizer.step()
        shapes = [[p.shape for p in group["params"]] for group in optimizer.param_groups]
        return shapes, [p.data.tolist() for _, p in named]

    assert after_a_step(distprop) == after_a_step(torch)


def test_parameters_of_two_dtypes_are_refused_at_the_first_step():
    optimizer = SGD([Parameter(np.ones(2)), Parameter(np.ones(2, np.float32))], lr=0.1)
    with pytest.raises(TypeError, match="one dtype, got float32, float64"):
        optimizer.step()


# schedules: one row each: ours with the rate 0.3, PyTorch's class and its arguments, the steps to compare

SCHEDULES = [
    (schedule.constant(0.3), "ConstantLR", {"factor": 1.0}, 20),
    (schedule.step_decay(0.3, 4), "StepLR", {"step_size": 4}, 20),
    (schedule.step_decay(0.3, 1, gamma=0.5), "StepLR", {"step_size": 1, "gamma": 0.5}, 20),
    (schedule.multi_step(0.3, [3, 7, 7, 12], 0.5), "MultiStepLR", {"milestones": [3, 7, 7, 12], "gamma": 0.5}, 20),
    (schedule.exponential(0.3, 0.9), "ExponentialLR", {"gamma": 0.9}, 20),
    (schedule.cosine(0.3, 20), "CosineAnnealingLR", {"T_max": 20}, 21),
    (schedule.cosine(0.3, 20, 0.01), "CosineAnnealingLR", {"T_max": 20, "eta_min": 0.01}, 21),
    (schedule.polynomial(0.3, 10), "PolynomialLR", {"total_iters": 10}, 20),
    (schedule.polynomial(0.3, 10, 2.5), "PolynomialLR", {"total_iters": 10, "power": 2.5}, 20),
    (schedule.warmup(0.3, 5, start=0.1), "LinearLR", {"start_factor": 0.1, "total_iters": 5}, 20),
    *(
        (
            schedule.one_cycle(0.3, steps, rise=rise, **factors),
            "OneCycleLR",
            {"max_lr": 0.3, "total_steps": steps, "pct_start": rise, "cycle_momentum": False, **factors},
            steps,
        )
        for steps, rise, factors in (
            (20, 0.3, {}),
            (37, 0.45, {"div_factor": 10, "final_div_factor": 100}),
            (20, 0.0, {}),
            (20, 0.3, {"anneal_strategy": "linear"}),
            (30, 0.4, {"three_phase": True}),
            (31, 0.25, {"three_phase": True, "anneal_strategy": "linear", "final_div_factor": 50}),
            (20, 0.5, {"three_phase": True}),
        )
    ),
]
FROM_THE_FULL_RATE = [row for row in SCHEDULES if row[1] not in ("LinearLR", "OneCycleLR")]


def assert_same_steps(rates, scheduler, steps, rng, torch):
    """The rates, and the parameters that SGD makes of them, beside those under PyTorch's `scheduler(optimizer)`."""
    ours, theirs = pairs(torch, np.float64)
    optimizer, reference = SGD(ours, lr=rates, momentum=0.9), torch.optim.SGD(theirs, lr=0.3, momentum=0.9)
    their_rates = scheduler(reference)
    for step in range(steps):
        assert rates(step) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-12, abs=1e-16), step
        give_gradients(rng, ours, theirs, torch)
        optimizer.step()
        reference.step()
        assert_equal(ours, theirs, 1e-12)
        if step < steps - 1:
            their_rates.step()


@pytest.mark.parametrize(
    ("rates", "name", "options", "steps"), SCHEDULES, ids=[f"{row[1]} {row[2]}" for row in SCHEDULES]
)
def test_schedules_are_pytorchs(rates, name, options, steps, rng, torch):
    assert_same_steps(rates, partial(getattr(torch.optim.lr_scheduler, name), **options), steps, rng, torch)


@pytest.mark.parametrize(
    ("rates", "name", "options", "steps"), FROM_THE_FULL_RATE, ids=[f"{row[1]} {row[2]}" for row in FROM_THE_FULL_RATE]
)
def test_a_warmup_leads_into_a_schedule_as_pytorchs_does(rates, name, options, steps, rng, torch):
    schedulers = torch.optim.lr_scheduler

    def scheduler(optimizer):
        rise = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=5)
        return schedulers.SequentialLR(optimizer, [rise, getattr(schedulers, name)(optimizer, **options)], [5])

    assert_same_steps(schedule.warmup(rates, 5, start=0.1), scheduler, 5 + steps, rng, torch)


def test_schedules_stay_at_their_end():
    assert schedule.cosine(0.3, 10, 0.01)(500) == 0.01
    assert schedule.polynomial(0.3, 10)(500) == 0
    assert schedule.one_cycle(0.3, 10)(500) == pytest.approx(0.3 / 25 / 1e4)


@pytest.mark.parametrize(("steps", "rise"), [(1, 0.3), (2, 0.5), (10, 0.1), (10, 1.0), (3, 1 / 3), (1, 1.0), (4, 0.25)])
def test_one_cycle_whose_top_is_at_an_end(steps, rise):
    """The top falls on the first or the last step, where a phase has length 0."""
    rates = [schedule.one_cycle(0.3, steps, rise)(step) for step in range(steps + 3)]
    assert all(0 < rate <= 0.3 for rate in rates)
    assert rates[steps:] == pytest.approx([0.3 / 25 / 1e4] * 3)
    top = rise * steps - 1
    if top == int(top) and top >= 0:
        assert rates[int(top)] == pytest.approx(0.3)


def test_milestones_may_come_from_a_generator():
    rates = schedule.multi_step(0.4, (epoch * 2 for epoch in (1, 2)), 0.5)
    assert [rates(step) for step in range(5)] == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.1])


def test_warmup_leads_into_the_schedule():
    rates = schedule.warmup(schedule.exponential(0.4, 0.5), 4)
    assert [rates(step) for step in range(7)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.2, 0.1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedule.step_decay(0.1, 0),
        lambda: schedule.polynomial(0.1, 0),
        lambda: schedule.cosine(0.1, 0),
        lambda: schedule.warmup(0.1, 0),
        lambda: schedule.one_cycle(0.1, 0),
    ],
)
def test_schedules_need_at_least_one_step(make):
    with pytest.raises(ValueError, match=r"(steps|every) must be at least 1, got 0"):
        make()


def test_one_cycle_rises_for_a_share_of_the_steps():
    for rise in (-0.1, 1.1):
        with pytest.raises(ValueError, match="rise is a share of the steps, between 0 and 1"):
            schedule.one_cycle(0.1, 10, rise)
    with pytest.raises(ValueError, match=r"between 0 and 0\.5 with three_phase; got 0\.6"):
        schedule.one_cycle(0.1, 10, 0.6, three_phase=True)
    with pytest.raises(ValueError, match="anneal_strategy must be one of 'cos', 'linear'; got 'cosine'"):
        schedule.one_cycle(0.1, 10, anneal_strategy="cosine")


# clipping


NORMS = [2.0, 1, math.inf, "inf", 3.0, 0.5]


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("max_norm", [0.5, 10.0, 1e6])
def test_clipping_the_norm_is_pytorchs(max_norm, dtype, norm_type, rng, torch):
    long = (200, 170) if dtype == np.float64 else (4, 3)  # PyTorch's sums of so many powers in float32 are not precise
    ours, theirs = pairs(torch, dtype, [long, (5,), (), (2,)])
    give_gradients(rng, ours[:3], theirs[:3], torch)  # the last has none
    for p, q in zip(ours[:3], theirs[:3], strict=True):
        p.grad, q.grad = p.grad * 3, q.grad * 3
    norm = clip_grad_norm_(iter(ours), max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    tolerance = 1e-12 if dtype == np.float64 else 1e-6
    assert isinstance(norm, float)
    assert norm == pytest.approx(expected.item(), rel=tolerance)
    for p, q in zip(ours[:3], theirs[:3], strict=True):
        np.testing.assert_allclose(p.grad, q.grad.numpy(), rtol=tolerance)
    assert ours[3].grad is None


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_clipping_values_is_pytorchs(dtype, rng, torch):
    ours, theirs = pairs(torch, dtype, [(4, 3), (5,), (2,)])
    give_gradients(rng, ours[:2], theirs[:2], torch)
    clip_grad_value_(iter(ours), 0.5)
    torch.nn.utils.clip_grad_value_(theirs, 0.5)
    for p, q in zip(ours[:2], theirs[:2], strict=True):
        np.testing.assert_array_equal(p.grad, q.grad.numpy())
    assert abs(ours[0].grad).max() == 0.5
    assert ours[2].grad is None


def test_clipping_takes_one_parameter_as_well_as_several():
    p = Parameter(np.ones(2))
    p.grad = [3, 4]
    assert clip_grad_norm_(p, 1.0) == 5
    np.testing.assert_allclose(p.grad, [0.6, 0.8], rtol=1e-6)
    clip_grad_value_(p, 0.7)
    np.testing.assert_allclose(p.grad, [0.6, 0.7], rtol=1e-6)


def test_clipping_works_in_the_flat_buffer():
    p, q = Parameter(np.ones(2)), Parameter(np.ones(2))
    buffer = FlatBuffer([p, q])
    p.grad, q.grad = 30, 40
    clip_grad_norm_([p, q], 1.0)
    assert np.linalg.norm(buffer.grad) == pytest.approx(1, abs=1e-6)


def test_a_norm_that_float32_cannot_square_and_one_that_is_not_finite():
    p = Parameter(np.ones(2, np.float32))
    p.grad = [3e25, 4e25]
    assert clip_grad_norm_([p], 5.0) == pytest.approx(5e25, rel=1e-6)
    np.testing.assert_allclose(p.grad, [3, 4], rtol=1e-5)
    p.grad = [3e-25, 4e-25]
    assert clip_grad_norm_([p], 5.0) == pytest.approx(5e-25, rel=1e-6, abs=0)
    p.grad = [3e-23, 4e-23]  # squares that float32 has one digit of
    assert clip_grad_norm_([p], 5.0) == pytest.approx(5e-23, rel=1e-6, abs=0)
    for power in (1, 3, math.inf):
        p.grad = [3e25, -4e25]
        expected = max(3, 4) if power == math.inf else (3**power + 4**power) ** (1 / power)
        assert clip_grad_norm_([p], 5e25, power) == pytest.approx(expected * 1e25, rel=1e-6)
    for bad in (np.inf, np.nan):
        p.grad = [bad, 1]
        assert not math.isfinite(clip_grad_norm_([p], 1.0))
        assert p.grad[1] == 1


def test_limits_must_not_be_negative_and_a_norm_must_be_one():
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError, match="max_norm must be 0 or more"):
            clip_grad_norm_([], bad)
        with pytest.raises(ValueError, match="clip_value must be 0 or more"):
            clip_grad_value_([], bad)
    for bad in (0, -1, float("nan"), -math.inf):
        with pytest.raises(ValueError, match="norm_type must be more than 0"):
            clip_grad_norm_([], 1.0, bad)
    for norm_type in NORMS:
        assert clip_grad_norm_([], 1.0, norm_type) == 0


def test_limits_of_0_leave_nothing_as_in_pytorch(rng, torch):
    for clip in (lambda library, p: library.clip_grad_norm_(p, 0.0), lambda library, p: library.clip_grad_value_(p, 0)):
        ours, theirs = pairs(torch, np.float64, [(4, 3), (5,)])
        give_gradients(rng, ours, theirs, torch)
        clip(optim, ours)
        clip(torch.nn.utils, theirs)
        for p, q in zip(ours, theirs, strict=True):
            assert not p.grad.any()
            assert not q.grad.any()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("norm_type", NORMS)
def test_a_norm_that_is_not_finite_is_an_error_where_one_is_wanted(norm_type, bad):
    parameter = Parameter(np.ones(3))
    parameter.grad = [1, bad, 2]
    assert not math.isfinite(clip_grad_norm_([parameter], 1.0, norm_type))
    with pytest.raises(RuntimeError, match=r"the norm of the gradients is (nan|inf), so they cannot be clipped"):
        clip_grad_norm_([parameter], 1.0, norm_type, error_if_nonfinite=True)
    np.testing.assert_array_equal(parameter.grad, [1, bad, 2])
    parameter.grad = [1, 1, 2]
    assert math.isfinite(clip_grad_norm_([parameter], 1.0, norm_type, error_if_nonfinite=True))


@pytest.mark.parametrize("norm_type", NORMS)
def test_clipping_makes_no_temporary_of_the_gradients_size(norm_type):
    parameter = Parameter(np.ones(5_000_000, np.float32))  # 20 MB
    parameter.grad = 1
    tracemalloc.start()
    try:
        clip_grad_norm_([parameter], 1.0, norm_type)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 500_000
