import numpy as np
import pytest

import distprop as dp
from distprop import functional as F
from distprop.comm.wire import decode, encode
from scenario import run
from wire_suite import suite


@pytest.mark.parametrize(("scenario", "size"), suite.in_threads([1, 2, 3, 4]))
def test_wire(scenario, size):
    run(scenario, size)


def test_bf16_rounds_to_the_nearest_and_halfway_to_even():
    ulp = 2.0**-7  # of numbers from 1 to 2
    values = np.array([1 + 0.49 * ulp, 1 + 0.5 * ulp, 1 + 1.5 * ulp, 1 + 0.51 * ulp, -1 - 0.51 * ulp], np.float32)
    expected = np.array([1, 1, 1 + 2 * ulp, 1 + ulp, -1 - ulp], np.float32)
    np.testing.assert_array_equal(decode("bf16", encode("bf16", values)), expected)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e38, 1e-38], np.float32)
    found = decode("bf16", encode("bf16", special))
    np.testing.assert_allclose(found, special, rtol=2**-8)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(special))


def test_fp16_keeps_large_numbers_finite():
    assert decode("fp16", encode("fp16", np.array([1e6, -1e6], np.float32))).tolist() == [65504, -65504]


def test_the_trainer_hands_it_on_and_refuses_it_in_deterministic_mode():
    model = dp.nn.Linear(2, 1)
    optimizer = dp.optim.SGD(model.parameters(), lr=0.1)
    assert dp.Trainer(model, F.mse_loss, optimizer, batch_size=4, wire="fp16").parallel.wire == "fp16"
    with pytest.raises(ValueError, match="deterministic"):
        dp.Trainer(model, F.mse_loss, optimizer, batch_size=4, deterministic=True, wire="fp16")
