"""What all tests share: a fresh state of distprop's randomness, a generator of data, PyTorch to compare with.

The suites hold scenarios that several test modules run; pytest is to explain their assertions as well.
"""

import os
import signal

import numpy as np
import pytest

import distprop.random

# A shell starts what runs in the background with SIGINT ignored, nohup with SIGHUP too, and processes inherit that.
# Tests send these signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest.register_assert_rewrite("communicator_suite", "norm_suite", "parallel_suite", "split_invariance", "train_suite")


@pytest.fixture(autouse=True)
def fresh_randomness():
    """Every test starts with seed 0, whatever ran before it."""
    distprop.random.manual_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(12345)


@pytest.fixture(scope="session")
def torch():
    """PyTorch. Tests that compare with it skip where it is not installed, unless DISTPROP_REQUIRE_TORCH=1."""
    try:
        import torch
    except ImportError as error:
        if os.environ.get("DISTPROP_REQUIRE_TORCH") == "1":
            pytest.fail(f"DISTPROP_REQUIRE_TORCH=1, but PyTorch cannot be imported: {error}", pytrace=False)
        pytest.skip("PyTorch is not installed; the comparison with it needs `pip install torch`")
    torch.set_num_threads(1)
    return torch
