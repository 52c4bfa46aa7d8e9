"""Flat buffers: one array of values, one of gradients, in the order in which backpropagation finishes."""

import numpy as np
import pytest

from distprop import nn
from distprop.buffer import LANE_LENGTH, FlatBuffer, fill_missing
from distprop.tensor import Parameter


def parameters(*shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [Parameter(rng.normal(size=shape).astype(dtype)) for shape in shapes]


def test_values_move_into_one_array_last_parameter_first():
    several = parameters((2, 3), (3,), (), (0, 4), (1, 2, 1))
    before = [p.data.copy() for p in several]
    buffer = FlatBuffer(several)
    assert buffer.parameters == tuple(reversed(several))
    np.testing.assert_array_equal(buffer.data, np.concatenate([b.ravel() for b in reversed(before)]))
    for parameter, values in zip(several, before, strict=True):
        np.testing.assert_array_equal(parameter.data, values)
        start, stop = buffer.span(parameter)
        assert stop - start == parameter.data.size
        buffer.data[start:stop] = 7
        assert (parameter.data == 7).all()
        parameter.data[...] = 8
        assert (buffer.data[start:stop] == 8).all()
    assert buffer.span(several[-1]) == (0, 2)


def test_gradients_and_lane_are_one_message():
    several = parameters((2, 3), (3,))
    buffer = FlatBuffer(several)
    assert buffer.message.shape == (9 + LANE_LENGTH,)
    assert buffer.message.flags.c_contiguous
    buffer.lane[:] = 5
    (several[0] * 2).sum().backward()
    (several[1] * 3).sum().backward()
    np.testing.assert_array_equal(buffer.message, [3] * 3 + [2] * 6 + [5] * LANE_LENGTH)
    assert all(np.shares_memory(p.grad, buffer.message) for p in several)


def test_gradients_that_exist_move_along():
    with_gradient, without = parameters((2,), (2,))
    with_gradient.grad = [1, 2]
    buffer = FlatBuffer([with_gradient, without])
    np.testing.assert_array_equal(with_gradient.grad, [1, 2])
    assert without.grad is None
    assert np.shares_memory(with_gradient.grad, buffer.grad)
    (with_gradient * 1).sum().backward()
    np.testing.assert_array_equal(buffer.grad[buffer.span(with_gradient)[0] :][:2], [2, 3])


def test_moving_to_another_buffer_keeps_everything():
    several = parameters((2, 3), (3,))
    values = [p.data.copy() for p in several]
    first = FlatBuffer(several)
    several[0].grad = 4
    second = FlatBuffer(several)
    assert not first.holds(several)
    assert second.holds(several)
    first.data[:] = np.nan
    first.grad[:] = np.nan
    for parameter, value in zip(several, values, strict=True):
        np.testing.assert_array_equal(parameter.data, value)
    np.testing.assert_array_equal(several[0].grad, np.full((2, 3), 4))
    assert several[1].grad is None


def test_a_model_computes_the_same_after_its_parameters_moved():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = np.ones((2, 3), np.float32)
    before = model(x)
    FlatBuffer(list(model.parameters()))
    np.testing.assert_array_equal(model(x).data, before.data)
    before.sum().backward()  # a graph from before the move still finds the places of the gradients
    expected = [p.grad.copy() for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    model(x).sum().backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        np.testing.assert_array_equal(p.grad, e)


def test_mixed_dtypes_are_refused_before_anything_moves():
    mixed = [*parameters((2,)), *parameters((2,), dtype=np.float64)]
    with pytest.raises(TypeError, match=r"one dtype, got float32, float64; use model.to\(\)"):
        FlatBuffer(mixed)
    assert all(p.buffer is None for p in mixed)
    with pytest.raises(TypeError, match="got none"):
        FlatBuffer([])


def test_fill_missing_gives_zeros_to_those_that_train_and_have_none():
    given, missing, frozen = parameters((2,), (2,), (2,))
    given.grad, frozen.requires_grad = 3, False
    buffer = FlatBuffer([given, missing, frozen])
    buffer.grad[:4] = np.nan  # frozen's and missing's places hold rubbish
    assert [p is missing for p in fill_missing([given, missing, frozen])] == [True]
    np.testing.assert_array_equal(missing.grad, [0, 0])
    np.testing.assert_array_equal(given.grad, [3, 3])
    assert frozen.grad is None
    assert fill_missing([given, missing, frozen]) == []


def test_a_parameter_that_changes_its_dtype_leaves():
    several = parameters((2,), (3,), (4,))
    buffer = FlatBuffer(several)
    several[0].data = np.zeros(2)
    assert not buffer.holds(several)
    assert buffer.holds(several[1:])
