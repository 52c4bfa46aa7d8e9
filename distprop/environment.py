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


def program() -> dict[str, Any] | None:
    """What this process runs, so that it can be run again: a script or a module, its arguments, and its text's hash.

    None at a prompt and for `python -c`.
    """
    main = sys.modules.get("__main__")
    path, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    if path is None:
        return None
    return {
        "script": os.path.abspath(path),
        "module": spec.name if spec is not None else None,
        "arguments": sys.argv[1:],
        "sha256": file_hash(path),
    }


def file_hash(path: str) -> str | None:
    """The SHA-256 of a file, None if it cannot be read."""
    import hashlib  # loads OpenSSL, which a run without a folder does not need

    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


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
