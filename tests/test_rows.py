"""Rows added up by number, and the indexing that needs it."""

import numpy as np
import pytest

from distprop.rows import add_rows
from distprop.tensor import Tensor


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("count", "rows"),
    [(1, 1), (1, 50), (3, 200), (10, 150), (10, 160), (10, 170), (300, 300), (5000, 40), (70_000, 500)],
)
@pytest.mark.parametrize("skewed", [False, True])
def test_rows_are_added_by_number(count, rows, skewed, dtype, rng):
    """Few numbers with many rows each, many numbers with few, more than 16 bits of them, and one that is in most."""
    numbers = rng.integers(0, count, rows)
    if skewed:
        numbers[rng.uniform(size=rows) < 0.7] = count - 1
    values = rng.normal(size=(rows, 5)).astype(dtype)
    expected = np.zeros((count, 5))
    np.add.at(expected, numbers, values.astype(np.float64))
    out = np.full((count, 5), np.nan, dtype)
    before = values.copy()
    add_rows(numbers, values, out)
    np.testing.assert_allclose(out, expected, atol=1e-13 if dtype == np.float64 else 2e-5)
    np.testing.assert_array_equal(values, before)


def test_numbers_that_agree_in_their_last_16_bits_are_kept_apart():
    out = np.empty((70_000, 1))
    add_rows(np.array([1, 65_537, 1, 65_537]), np.array([[1.0], [2.0], [4.0], [8.0]]), out)
    assert (out[1, 0], out[65_537, 0], out.sum()) == (5, 10, 15)


@pytest.mark.parametrize(
    "index",
    [
        [3, 1, 1, -5],
        [],
        [[0, 1], [1, 2]],
        np.array(2),
        np.array([4, 4], np.uint8),
        np.array([True, False] * 2 + [True]),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 0), (5, 2, 2)], ids=str)
def test_an_index_hands_the_gradient_to_the_rows_it_took(index, shape, rng):
    x = Tensor(rng.normal(size=shape), requires_grad=True)
    value = x[index]
    grad, expected = rng.normal(size=value.shape), np.zeros(shape)
    value.backward(grad)
    np.add.at(expected, np.asarray(index, np.intp) if isinstance(index, list) else index, grad)
    np.testing.assert_allclose(x.grad, expected, atol=1e-15)
