"""All checks of one machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distprop.doctor import machine, software
from distprop.doctor.finding import Finding
from distprop.launch import allowed_cores


def check_host(run_dir: Path, ranks: int = 1, cores: int | None = None) -> list[Finding]:
    """Everything that one process can see, on a host that is to have `ranks` ranks on `cores`, by default its own."""
    available = cores or allowed_cores()
    return [
        _guarded("Python", software.python),
        _guarded("packages", software.packages),
        _guarded("MPI library", software.mpi_library),
        _guarded("launcher", software.launcher),
        _guarded("thread level", software.thread_level),
        _guarded("world size", software.world_size),
        _guarded("BLAS", software.blas),
        _guarded("kernels", software.kernels),
        _guarded("BLAS threads", lambda: software.blas_threads(ranks, available)),
        _guarded("cores", lambda: machine.cores(ranks, available)),
        _guarded("shared memory", machine.shared_memory),
        _guarded("interfaces", machine.interfaces),
        _guarded("run directory", lambda: machine.run_directory(run_dir)),
    ]


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:
        return Finding(name, f"{type(error).__name__}: {error}", "fail", "the check itself failed; please report this")
