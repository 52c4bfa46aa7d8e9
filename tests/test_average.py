import numpy as np
import pytest

from distprop import nn, optim
from distprop.buffer import FlatBuffer
from distprop.optim import ExponentialMovingAverage
from distprop.optim.layout import CHUNK_BYTES
from distprop.tensor import Parameter

SHAPES = [(200, 170), (7,), (), (3, 1, 2)]
assert CHUNK_BYTES < 200 * 170 * 4  # the first takes more than one chunk in float32 too


def parameters(dtype=np.float64):
    rng = np.random.default_rng(3)
    return [Parameter(rng.normal(size=shape).astype(dtype)) for shape in SHAPES]


def change(ps, rng):
    for p in ps:
        p.data = p.data + rng.normal(size=p.shape).astype(p.dtype)


def values(ps):
    return [p.data.copy() for p in ps]


def averages(average, ps):
    with average.averaged():
        return values(ps)


def assert_equal(arrays, others, tolerance=0.0):
    for array, other in zip(arrays, others, strict=True):
        np.testing.assert_allclose(array, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-6)])
@pytest.mark.parametrize("decay", [0.9, 0.0, 1.0])
def test_it_is_pytorchs_averaged_model(decay, dtype, tolerance, rng, torch):
    ours = parameters(dtype)
    theirs = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(p.data)) for p in ours])
    average = ExponentialMovingAverage(ours, decay)
    reference = torch.optim.swa_utils.AveragedModel(
        theirs, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    )
    for _ in range(20):
        change(ours, rng)
        for p, q in zip(ours, theirs, strict=True):
            q.data = torch.tensor(p.data)
        average.update()
        reference.update_parameters(theirs)
        assert_equal(averages(average, ours), [q.detach().numpy() for q in reference.module], tolerance)


def test_inside_the_context_the_model_is_averaged_and_afterwards_itself_also_after_an_error(rng):
    model = nn.Linear(3, 2).double()
    x = rng.normal(size=(4, 3))
    average = ExponentialMovingAverage(model.parameters(), decay=0.5)
    average.update()
    first = model(x).data
    change(list(model.parameters()), rng)
    average.update()
    second = model(x).data

    def fail_inside():
        with average.averaged():
            np.testing.assert_allclose(model(x).data, (first + second) / 2)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    np.testing.assert_array_equal(model(x).data, second)


def test_before_and_after_the_first_update_the_average_is_the_weights(rng):
    ps = parameters()
    before, average = values(ps), ExponentialMovingAverage(ps)
    assert_equal(averages(average, ps), before)
    change(ps, rng)
    average.update()
    assert_equal(averages(average, ps), values(ps))


def test_parameters_that_move_keep_their_average_also_within_the_context(rng):
    ps, fixed = parameters(), parameters()
    average, expected = ExponentialMovingAverage(ps, 0.8), ExponentialMovingAverage(fixed, 0.8)
    other = Parameter(np.ones(5))
    for move in (
        lambda: FlatBuffer([other, *ps]),
        lambda: FlatBuffer([ps[2], other, ps[0], ps[3], ps[1]]),
        lambda: (FlatBuffer(ps[:1]), FlatBuffer([other, *ps[1:]])),
    ):
        change(ps, np.random.default_rng(1))
        change(fixed, np.random.default_rng(1))
        average.update()
        expected.update()
        move()
        assert_equal(averages(average, ps), averages(expected, fixed))
        with average.averaged():
            FlatBuffer([*ps, other])
        assert_equal(values(ps), values(fixed))
        np.testing.assert_array_equal(other.data, np.ones(5))


def test_it_follows_an_optimizer_that_shares_the_buffer(rng):
    ps = parameters()
    optimizer, average = optim.Adam(ps, lr=0.1), ExponentialMovingAverage(ps, 0.5)
    expected = None
    for _ in range(4):
        for p in ps:
            p.grad = rng.normal(size=p.shape)
        optimizer.step()
        average.update()
        pairs = zip(expected or values(ps), ps, strict=True)
        expected = [0.5 * a + 0.5 * p.data for a, p in pairs]
    assert_equal(averages(average, ps), expected, 1e-12)


def test_a_loaded_average_goes_on_to_the_last_bit():
    ps, rng = parameters(), np.random.default_rng(0)
    average = ExponentialMovingAverage(ps, 0.9)
    for _ in range(3):
        change(ps, rng)
        average.update()
    state = average.state_dict()
    others = [Parameter(p.data) for p in ps]
    FlatBuffer(others[::-1])
    other = ExponentialMovingAverage(others, 0.9)
    other.load_state_dict({"updates": state["updates"], "arrays": {k: a.copy() for k, a in state["arrays"].items()}})
    for these, this in ((ps, average), (others, other)):
        change(these, np.random.default_rng(5))
        this.update()
    assert_equal(averages(average, ps), averages(other, others))
    assert {key: a.shape for key, a in state["arrays"].items()} == {str(i): s for i, s in enumerate(SHAPES)}


def test_a_loaded_average_is_a_copy_of_the_parameters_dtype():
    ps = parameters(np.float32)
    average = ExponentialMovingAverage(ps)
    arrays = {str(i): np.full(shape, 0.1) for i, shape in enumerate(SHAPES)}
    average.load_state_dict({"updates": 1, "arrays": arrays})
    assert {array.dtype for array in average.state_dict()["arrays"].values()} == {np.dtype(np.float32)}
    average.load_state_dict({"updates": 1, "arrays": arrays})
    for array in arrays.values():
        array[...] = 7
    assert_equal(averages(average, ps), [np.full(shape, np.float32(0.1)) for shape in SHAPES])


def test_a_gradient_across_the_borders_of_the_context_is_refused(rng):
    """It would be of weights that are no longer there."""
    model = nn.Linear(3, 2).double()
    x = rng.normal(size=(4, 3))
    average = ExponentialMovingAverage(model.parameters(), decay=0.5)
    average.update()
    outside = model(x).sum()
    with average.averaged():
        with pytest.raises(RuntimeError, match="was changed between the forward and the backward pass"):
            outside.backward()
        inside = model(x).sum()
    with pytest.raises(RuntimeError, match="was changed between the forward and the backward pass"):
        inside.backward()


def test_a_state_that_does_not_fit_is_refused_with_every_reason(rng):
    ps = parameters()
    average = ExponentialMovingAverage(ps)
    average.update()
    before = averages(average, ps)
    arrays = {k: v for k, v in average.state_dict()["arrays"].items() if k != "0"} | {"1": np.ones(8), "x": np.ones(1)}
    with pytest.raises(ValueError, match=r"updates is None.*; 0: missing; x: unexpected; 1: shape \(8,\), exp"):
        average.load_state_dict({"arrays": arrays})
    assert_equal(averages(average, ps), before)
    assert average.updates == 1


def test_what_needs_the_weights_is_refused_inside_the_context():
    average = ExponentialMovingAverage(parameters())
    calls = [average.update, average.state_dict, lambda: average.load_state_dict({}), average.averaged().__enter__]
    with average.averaged():
        for call in calls:
            with pytest.raises(RuntimeError, match=r"inside averaged\(\): the parameters hold the averages now"):
                call()
    average.update()


def test_bad_arguments_are_refused():
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="decay must be between 0 and 1"):
            ExponentialMovingAverage(parameters(), decay)
    with pytest.raises(ValueError, match="at least one parameter"):
        ExponentialMovingAverage(iter([]))
