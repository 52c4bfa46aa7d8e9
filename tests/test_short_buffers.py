"""The short buffer changes no number, and is as it was afterwards."""

import numpy as np
import pytest

from distprop.functional.short_buffers import LENGTH, short_buffers


@pytest.mark.parametrize("length", [1, 7, LENGTH - 1, LENGTH, 3 * LENGTH + 5])
def test_arithmetic_with_what_is_repeated_gives_the_same_bits(length, rng):
    x, row, column = (rng.normal(size=shape).astype(np.float32) for shape in ((50, length), length, (50, 1)))
    mask = x > 0
    expected = [x * row, x + column, x / column, x * mask]
    with short_buffers():
        found = [x * row, x + column, x / column, x * mask]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_buffer_and_error_handling_hold_inside_and_are_restored():
    before = np.getbufsize(), np.geterr()

    def fail():
        with short_buffers(over="raise"):
            assert (np.getbufsize(), np.geterr()["over"]) == (LENGTH, "raise")
            return np.full(1, 1e38, np.float32) * np.float32(1e38)

    with pytest.raises(FloatingPointError):
        fail()
    assert (np.getbufsize(), np.geterr()) == before
