"""Freed memory is kept, so that a step does not ask the kernel for it again. Each case is a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import numpy as np
from distprop import functional as F
from distprop import nn
model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
x = np.zeros((1024, 256), np.float32)
def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        F.mse_loss(model(x), x).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps
faults(3)
print(faults(10))
"""


def page_faults(**environment: str) -> float:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", STEPS], env=own | environment, capture_output=True, text=True, check=True, timeout=60
    )
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told")
def test_a_step_takes_the_memory_of_the_step_before() -> None:
    assert page_faults() < 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told")
def test_the_users_own_settings_stay() -> None:
    """131072 is glibc's default; set by hand it no longer grows, and blocks above it come from the kernel."""
    assert page_faults(MALLOC_MMAP_THRESHOLD_="131072") > 1000
