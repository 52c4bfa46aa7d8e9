"""The gradient checker must find a wrong gradient; that is all it is for."""

import numpy as np
import pytest

from distprop.tensor import Tensor, record
from distprop.testing import check_grads


def wrong(derivative):
    """x² with a derivative to be tested."""
    return lambda x: record(x.data**2, (x,), lambda grad, out: [derivative(x.data, grad)])


def test_right_gradients_pass():
    check_grads(wrong(lambda x, g: 2 * x * g), [np.array([1.0, -2.0])])
    check_grads(lambda a, b: (a * b).sum(), [np.ones((2, 3)), np.ones(3)])
    check_grads(lambda a: a * 3, 2.0)
    check_grads(lambda a: a * 3, Tensor(np.ones((2, 2), np.float32)))
    check_grads(lambda a: a * 3, np.ones((0, 2)))


@pytest.mark.parametrize(
    "derivative",
    [
        lambda x, g: 2.01 * x * g,
        lambda x, g: -2 * x * g,
        lambda x, g: 2 * x,  # forgets the gradient from above
        lambda x, g: 2 * x * g.mean(),  # right for a sum, wrong for each
        lambda x, g: (2 * x * g)[::-1],
        lambda x, g: 2 * x * g * np.array([1, 1, np.nan]),
        lambda x, g: 2 * x * g + np.array([0, 1e-2, 0]),
        lambda x, g: 0 * x,
    ],
)
def test_wrong_gradients_are_found(derivative):
    with pytest.raises(AssertionError, match=r"input 0 of shape \(3,\), element \(\d,\): backward gives"):
        check_grads(wrong(derivative), [np.array([1.0, -2.0, 0.5])])


def test_the_message_names_input_and_element():
    def half_right(a, b):
        return record(a.data * b.data, (a, b), lambda g, out: [g * b.data, g * np.array([[3.0, 9.0], [3.0, 3.0]])])

    with pytest.raises(
        AssertionError, match=r"input 1 of shape \(2, 2\), element \(0, 1\): .*; 1 of 4 elements differ"
    ):
        check_grads(half_right, [np.full((2, 2), 3.0), np.ones((2, 2))])


def test_a_gradient_of_the_wrong_shape_is_found_even_if_it_would_broadcast():
    def careless(x, bias):  # the bias was broadcast; its gradient has to be summed
        return record(x.data + bias.data, (x, bias), lambda grad, out: [grad, grad])

    with pytest.raises(AssertionError, match=r"input 1 of shape \(1, 2\) got a gradient of shape \(3, 2\)"):
        check_grads(careless, [np.ones((3, 2)), np.ones((1, 2))])


def test_an_input_without_influence_has_gradient_zero():
    check_grads(lambda a, b: a * 2, [1.0, 2.0])
    with pytest.raises(AssertionError, match="input 1"):
        check_grads(lambda a, b: a * b.detach(), [1.0, 2.0])


def test_its_inputs_are_not_changed():
    x = np.array([1.0, 2.0])
    check_grads(lambda a: a * a, [x])
    np.testing.assert_array_equal(x, [1, 2])


def test_tolerances_can_be_set():
    nearly = wrong(lambda x, g: 2 * x * g * (1 + 1e-5))
    check_grads(nearly, [np.ones(2)])
    with pytest.raises(AssertionError):
        check_grads(nearly, [np.ones(2)], atol=1e-7, rtol=1e-7)
