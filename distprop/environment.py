"""What a run ran on: versions, BLAS, MPI, host. For the run's folder, and for the heads of benchmarks."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np


def environment() -> dict[str, Any]:
    """Everything about this process's surroundings that may change a run's speed or its last bits."""
    import platform  # these two are slow to import, and a run without a folder does not need them
    from importlib import metadata

    try:
        version = metadata.version("distprop")
    except metadata.PackageNotFoundError:  # a checkout on the path
        version = "not installed"
    return {
        "distprop": version,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": blas_description(),
        "mpi": _mpi_description(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "command": " ".join([os.path.basename(sys.executable), *sys.argv]),
        "folder": os.getcwd(),
    }


def blas_description() -> str:
    """Which BLAS runs, with which kernels and how many threads."""
    import threadpoolctl

    found = [library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    return "; ".join(
        f"{blas['internal_api']} {blas.get('version')}, {blas.get('architecture', 'unknown')} kernels, "
        f"{blas['num_threads']} thread{'s' * (blas['num_threads'] > 1)}"
        for blas in found
    )


def _mpi_description() -> str:
    if "mpi4py.MPI" not in sys.modules:
        return "none: one process"
    from distprop.comm import mpi

    return mpi.library().name
