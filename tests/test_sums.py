"""Sums of many rows: as exact as PyTorch's, in every layout, and for few rows NumPy's to the bit."""

import numpy as np
import pytest

import distprop as dp
from distprop.sums import sum_over

LAYOUTS = {
    "rows": lambda x: x,
    "columns": np.asfortranarray,
    "a part": lambda x: np.concatenate([x, x], -1)[..., : x.shape[-1]],
    "backwards": lambda x: x[::-1].copy()[::-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((1_000_003, 3), (0,)),
        ((4095, 2), (0,)),
        ((2047, 2), (0,)),
        ((2, 70_001, 3), (1,)),
        ((3000, 2, 5), (0, 2)),
        ((5000, 3), (0, 1)),
        ((3, 4), ()),
        ((0, 3), (0,)),
    ],
)
def test_sums_lose_no_digits_along_any_axis(shape, axes, layout, rng):
    x = LAYOUTS[layout](rng.random(shape, np.float32))
    for keepdims in (False, True):
        expected = x.sum(axis=axes, dtype=np.float64, keepdims=keepdims)
        out = np.empty(expected.shape, np.float32)
        assert sum_over(x, axes, keepdims, out) is out
        np.testing.assert_allclose(out, expected, rtol=3e-6)
        np.testing.assert_allclose(sum_over(x, axes, keepdims), expected, rtol=3e-6)


@pytest.mark.parametrize("shape", [(2047, 3), (128, 512), (8, 2047, 4)])
def test_few_rows_are_summed_as_numpy_does(shape, rng):
    x = rng.random(shape, np.float32)
    for axis in range(len(shape) - 1):
        np.testing.assert_array_equal(sum_over(x, (axis,)), x.sum(axis=axis))


def test_other_dtypes_are_summed_as_numpy_sums_them(rng):
    for x in (rng.integers(-9, 9, (5001, 3)).astype(np.int8), rng.random((5001, 3)) < 0.5):
        np.testing.assert_array_equal(sum_over(x, (0,)), x.sum(axis=0), strict=True)
    half = sum_over(np.ones((30_000, 2), np.float16), (0,))
    np.testing.assert_allclose(half, np.full(2, 30_000, np.float16), rtol=3e-3, strict=True)


def test_seventeen_million_ones_have_the_mean_one():
    ones = dp.tensor(np.broadcast_to(np.float32(1), (17_000_000, 2)))
    np.testing.assert_array_equal(ones.mean(0).data, 1)
    np.testing.assert_array_equal(ones.sum(0).data, 17_000_000)
    np.testing.assert_array_equal(ones.var(0).data, 0)


def test_tall_reductions_and_the_gradient_of_a_bias_are_as_exact_as_pytorchs(torch, rng):
    values = (5 + rng.random((1_000_000, 3))).astype(np.float32)
    results = []
    for tensor in (dp.tensor, torch.tensor):
        x, bias = tensor(values), tensor([0.0, 0.0, 0.0], requires_grad=True)
        ((x + bias) * x).sum().backward()
        results.append([np.asarray(r) for r in (x.sum(0), x.mean(0), x.var(0), bias.grad)])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
