"""Each check of what is installed is made to go wrong, and says what to do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tomllib
from pathlib import Path

import pytest

from distprop import comm, launch, launcher
from distprop.comm import mpi
from distprop.doctor import software
from distprop.launcher import Launcher
from test_cli_run import ROOT

OPEN_MPI = mpi.Library("openmpi", "5.0.11", Path("/opt/mpi/lib/libmpi.so.40"))


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*launch.THREAD_VARIABLES, *software.KERNEL_VARIABLES, "NPY_DISABLE_CPU_FEATURES", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name in comm._LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def lacks_mpi() -> mpi.Library:
    raise mpi.MPIMissingError("no library")


# --------------------------------------------------------------------------------------------------------------- Python


def test_the_packages_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [f"{name}>={version}" for name, version in software.PACKAGES.items()] == project["dependencies"]


def test_an_old_and_a_missing_package_fail_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.26.4" if name == "numpy" else "99.1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = software.packages()
    assert (found.status, found.advice) == ("fail", "pip install 'numpy>=2.0' 'rich>=13.7'")


# ------------------------------------------------------------------------------------------------------------------ MPI


def test_no_mpi_is_a_warning_and_the_checks_of_it_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "library", lacks_mpi)
    found = software.mpi_library()
    assert (found.status, found.value) == ("warn", "none; one process works without")
    assert "pip install" in found.advice
    assert software.launcher().status == software.thread_level().status == "ok"


def test_an_unknown_mpi_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "library", lambda: mpi.Library("other", "Fujitsu MPI", Path("/x")))
    assert software.mpi_library().status == "warn"


def test_no_launcher_of_the_library_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "library", lambda: OPEN_MPI)
    monkeypatch.setattr(launcher, "_candidates", lambda library: iter(()))
    found = software.launcher()
    assert found.status == "fail"
    assert "no mpirun or mpiexec belongs to Open MPI 5.0.11" in found.advice


def test_an_mpirun_on_path_of_another_mpi_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "mpirun"
    other.write_text("#!/bin/sh\nprintf 'HYDRA build details:\\n    Version:    4.3.2\\n'\n")
    other.chmod(0o755)
    monkeypatch.setattr(mpi, "library", lambda: OPEN_MPI)
    own = Launcher(Path("/opt/mpi/bin/mpirun"), "openmpi", "5.0.11")
    monkeypatch.setattr(software, "find_launcher", lambda library: own)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = software.launcher()
    assert found.status == "warn"
    assert found.advice == "`mpirun` on PATH belongs to MPICH 4.3.2: use `distprop run`, or /opt/mpi/bin/mpirun"


@pytest.mark.parametrize(
    ("script", "status", "advice"),
    [
        ("echo level multiple", "ok", ""),
        ("echo level funneled", "warn", "MPI_THREAD_MULTIPLE"),
        ("echo no daemon >&2; exit 1", "fail", "no daemon"),
    ],
)
def test_the_thread_level_is_that_of_a_rank(
    script: str, status: str, advice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "mpirun"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(mpi, "library", lambda: OPEN_MPI)
    monkeypatch.setattr(software, "find_launcher", lambda library: Launcher(path, "openmpi", "5.0.11"))
    found = software.thread_level()
    assert found.status == status
    assert advice in found.advice


def test_a_world_of_another_size_than_the_launchers_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise comm.LauncherMismatchError("srun started 4 ranks, but MPI sees 1")

    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setattr(software, "world", refuse)
    found = software.world_size()
    assert (found.status, found.advice) == ("fail", "srun started 4 ranks, but MPI sees 1")


def test_ranks_without_an_mpi_library_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setattr(software, "world", lacks_mpi)
    assert software.world_size().status == "fail"


# ----------------------------------------------------------------------------------------------------------------- BLAS


def test_no_blas_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "_blas", lambda: None)
    assert software.blas().status == "warn"


@pytest.mark.parametrize(("slower", "status"), [(2.0, "warn"), (1.05, "ok")])
def test_forced_kernels_are_timed_beside_the_processors_own(
    slower: float, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setattr(
        software, "kernel_speed", lambda e: ("Haswell", slower) if "OPENBLAS_CORETYPE" in e else ("SkylakeX", 1.0)
    )
    found = software.kernels()
    assert found.status == status
    assert not found.advice or found.advice == "unset OPENBLAS_CORETYPE: SkylakeX kernels are 2.0 times as fast"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Prescott's kernels are for x86-64")
def test_real_kernels_of_an_old_processor_are_found_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")  # SSE3; every processor of the last ten years has AVX2
    found = software.kernels()
    assert found.status == "warn", found
    assert "unset OPENBLAS_CORETYPE" in found.advice


def test_features_taken_from_numpy_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPY_DISABLE_CPU_FEATURES", "AVX2")
    assert "unset NPY_DISABLE_CPU_FEATURES" in software.kernels().advice


def test_more_blas_threads_than_cores_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "_blas", lambda: {"num_threads": 2})
    assert software.blas_threads(2, 4).status == "ok"
    found = software.blas_threads(4, 4)
    assert (found.status, found.advice) == ("warn", "4 × 2 threads share 4 cores: set OPENBLAS_NUM_THREADS=1")
