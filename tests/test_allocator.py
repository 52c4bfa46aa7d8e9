"""Freed memory is kept, so that a step does not ask the kernel for it again; arrays that begin at a cache line.

What is kept is a setting of the process, so each case has one of its own.
"""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from distprop.allocator import CACHE_LINE, aligned_empty, aligned_like, is_all_of
from distprop.tensor import Tensor, record

STEPS = """
import resource
import numpy as np
from distprop import functional as F
from distprop import nn
from distprop.tensor import Tensor
model = {model}
x = np.zeros({shape}, np.float32)
def output():
    y = model(x)
    return y if isinstance(y, Tensor) else y[0]
target = np.zeros(output().shape, np.float32)
def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        F.mse_loss(output(), target).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps
faults(3)
print(faults(10))
"""
MODELS = {
    "linear": ("nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))", (1024, 256)),
    "convolutional": (
        "nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), "
        "nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AvgPool2d(2))",
        (32, 3, 32, 32),
    ),
    "lstm": ("nn.LSTM(64, 128, num_layers=2)", (32, 64, 64)),
    "transformer": ("nn.TransformerEncoderLayer(128, 4, 512)", (64, 16, 128)),
}


def page_faults(name: str, **environment: str) -> float:
    model, shape = MODELS[name]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", STEPS.format(model=model, shape=shape)],
        env=own | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told")
@pytest.mark.parametrize("name", MODELS)
def test_a_step_takes_the_memory_of_the_step_before(name: str) -> None:
    assert page_faults(name) < 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told")
@pytest.mark.parametrize("name", MODELS)
def test_the_users_own_settings_stay(name: str) -> None:
    """131072 is glibc's default; set by hand it no longer grows, and blocks above it come from the kernel."""
    assert page_faults(name, MALLOC_MMAP_THRESHOLD_="131072") > 1000


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (300, 257), (7, 64, 33, 2)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_large_arrays_begin_at_a_cache_line(shape: tuple[int, ...], dtype: str) -> None:
    for array in (aligned_empty(shape, dtype), aligned_like(np.empty(shape, dtype))):
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.nbytes < 16384 or address(array) % CACHE_LINE == 0
        array[...] = 1


def test_the_memory_order_is_the_models() -> None:
    images = np.empty((4, 20, 30, 16), np.float32).transpose(0, 3, 1, 2)
    assert aligned_like(images).strides == images.strides
    assert aligned_like(images.T).strides == images.T.strides


def test_a_leaf_takes_a_gradient_that_begins_at_a_cache_line_without_a_copy() -> None:
    made = []

    def vjp(grad: np.ndarray, out: object) -> list[np.ndarray]:
        gradient = aligned_like(grad)
        gradient[...] = grad
        made.append(address(gradient))
        return [gradient]

    x = Tensor(np.zeros((100, 100), np.float32), requires_grad=True)
    record(x.data, (x,), vjp).backward(np.ones((100, 100)))
    assert x.grad is not None
    assert address(x.grad) == made[0]


def test_what_is_broadcast_or_a_part_is_not_all_of_the_memory() -> None:
    whole = aligned_empty((100, 100), np.float32)
    assert is_all_of(whole, whole.base)
    assert is_all_of(whole.reshape(100, 5, 20), whole.base)
    assert not is_all_of(whole[:-1], whole.base)
    row = np.empty(100, np.float32)
    assert is_all_of(row.reshape(10, 10), row)
    assert not is_all_of(np.broadcast_to(row, (3, 100)), row)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
