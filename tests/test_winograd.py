"""Winograd's products beside the plain ones: blocks of every size, odd sizes, groups, borders; and through conv2d."""

import numpy as np
import pytest

from distprop import functional as F
from distprop.functional import correlate, groups, winograd
from distprop.functional.windows import Window
from distprop.testing import check_grads
from test_functional import TOLERANCE, assert_close


@pytest.fixture(params=[1, 1 << 16, 1 << 21], ids="block {}".format)
def block(request, monkeypatch):
    monkeypatch.setattr(winograd, "BLOCK_BYTES", request.param)


def window_of(height, width, padding):
    return Window((3, 3), (1, 1), (1, 1), padding, (height + 2 * padding[0] - 2, width + 2 * padding[1] - 2))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("shape", "outputs", "padding"),
    [
        ((3, 8, 6, 8), 16, (1, 1)),
        ((2, 9, 7, 8), 9, (0, 0)),
        ((2, 5, 8, 10), 8, (2, 1)),
        ((2, 4, 3, 8), 8, (0, 2)),
        ((1, 30, 12, 16), 16, (1, 1)),
        ((0, 8, 6, 8), 16, (1, 1)),
        ((2, 4, 4, 8), 8, (3, 4)),
    ],
)
def test_the_three_products_are_the_plain_ones(shape, outputs, padding, dtype, block, rng):
    n, height, width, channels = shape
    window = window_of(height, width, padding)
    x = rng.normal(size=shape).astype(dtype)
    w, b = rng.normal(size=(outputs, channels, 3, 3)).astype(dtype), rng.normal(size=outputs).astype(dtype)
    g = rng.normal(size=(n, *window.output, outputs)).astype(dtype)
    for found, expected in [
        (winograd.correlate(x, w, b, window), correlate.correlate(x, w, b, window)),
        (winograd.correlate(x, w, None, window), correlate.correlate(x, w, None, window)),
        (winograd.input_gradient(g, w, window, shape[1:3]), correlate.input_gradient(g, w, window, shape[1:3])),
        (winograd.weight_gradient(x, g, window), correlate.weight_gradient(x, g, window)),
    ]:
        assert found.dtype == dtype
        assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("several", [2, 4])
def test_groups_are_convolutions_of_their_own(several, block, monkeypatch, rng):
    window = window_of(7, 6, (1, 1))
    x, w = rng.normal(size=(3, 7, 6, 8 * several)), rng.normal(size=(16 * several, 8, 3, 3))
    b, g = rng.normal(size=len(w)), rng.normal(size=(3, 7, 6, len(w)))
    fast = [groups.correlate(x, w, b, window, several), *groups.gradients(x, g, w, window, several)]
    monkeypatch.setattr(winograd, "suits", lambda *args: False)
    plain = [groups.correlate(x, w, b, window, several), *groups.gradients(x, g, w, window, several)]
    for found, expected in zip(fast, plain, strict=True):
        assert_close(found, expected, TOLERANCE["float64"])
        assert not np.array_equal(found, expected), "the fast way was not taken"


def test_a_convolution_that_takes_this_way_agrees_with_finite_differences(rng):
    assert winograd.suits(window_of(4, 5, (1, 1)), 8, 8)
    check_grads(
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        [rng.normal(size=(1, 8, 4, 5)), rng.normal(size=(8, 8, 3, 3)), rng.normal(size=8)],
        atol=1e-7,
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("window", "channels", "several"),
    [
        (Window((3, 3), (2, 2), (1, 1), (1, 1), (4, 4)), 32, 1),
        (Window((3, 3), (1, 1), (2, 1), (1, 1), (4, 4)), 32, 1),
        (Window((3, 2), (1, 1), (1, 1), (1, 1), (4, 4)), 32, 1),
        (Window((3, 3), (1, 1), (1, 1), (1, 1), (1, 4)), 32, 1),
        (window_of(4, 4, (1, 1)), 3, 1),
        (window_of(4, 4, (1, 1)), 32, 32),
    ],
)
def test_other_windows_and_few_channels_go_the_plain_way(window, channels, several):
    assert not winograd.suits(window, channels, 32, several)
