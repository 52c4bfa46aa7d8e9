"""Each check of `distprop doctor` is made to go wrong, and says what to do; on real ranks it measures."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from distprop import comm, doctor, launch
from distprop.comm import mpi
from distprop.doctor import Finding
from test_cli_run import NO_MPI, ROOT
from test_launch import needs_mpi

OPEN_MPI = mpi.Library("openmpi", "5.0.11", Path("/opt/mpi/lib/libmpi.so.40"))


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*launch.THREAD_VARIABLES, *doctor.KERNEL_VARIABLES, "NPY_DISABLE_CPU_FEATURES", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name in comm._LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def distprop(*arguments: str, seconds: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-m", "distprop", *arguments],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def lacks_mpi() -> mpi.Library:
    raise mpi.MPIMissingError("no library")


# ------------------------------------------------------------------------------------------------------------ Python


def test_the_packages_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [f"{name}>={version}" for name, version in doctor.PACKAGES.items()] == project["dependencies"]


def test_an_old_and_a_missing_package_fail_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.26.4" if name == "numpy" else "99.1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = doctor.packages()
    assert (found.status, found.advice) == ("fail", "pip install 'numpy>=2.0' 'rich>=13.7'")


def test_a_check_that_fails_itself_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "interfaces", lambda: 1 / 0)
    monkeypatch.setattr(doctor, "thread_level", lambda: Finding("thread level", "multiple"))
    found = {finding.name: finding for finding in doctor.check_host(tmp_path)}
    assert found["interfaces"].status == "fail"
    assert "ZeroDivisionError" in found["interfaces"].value
    assert len(found) == 13


# --------------------------------------------------------------------------------------------------------------- MPI


def test_no_mpi_is_a_warning_and_the_checks_of_it_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "library", lacks_mpi)
    found = doctor.mpi_library()
    assert (found.status, found.value) == ("warn", "none; one process works without")
    assert "pip install" in found.advice
    assert doctor.launcher().status == doctor.thread_level().status == "ok"


def test_an_unknown_mpi_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "library", lambda: mpi.Library("other", "Fujitsu MPI", Path("/x")))
    assert doctor.mpi_library().status == "warn"


def test_no_launcher_of_the_library_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "library", lambda: OPEN_MPI)
    monkeypatch.setattr(launch, "_candidates", lambda library: iter(()))
    found = doctor.launcher()
    assert found.status == "fail"
    assert "no mpirun or mpiexec belongs to Open MPI 5.0.11" in found.advice


def test_an_mpirun_on_path_of_another_mpi_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "mpirun"
    other.write_text("#!/bin/sh\nprintf 'HYDRA build details:\\n    Version:    4.3.2\\n'\n")
    other.chmod(0o755)
    monkeypatch.setattr(mpi, "library", lambda: OPEN_MPI)
    own = launch.Launcher(Path("/opt/mpi/bin/mpirun"), "openmpi", "5.0.11")
    monkeypatch.setattr(doctor, "find_launcher", lambda library: own)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = doctor.launcher()
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
    monkeypatch.setattr(doctor, "find_launcher", lambda library: launch.Launcher(path, "openmpi", "5.0.11"))
    found = doctor.thread_level()
    assert found.status == status
    assert advice in found.advice


def test_a_world_of_another_size_than_the_launchers_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise comm.LauncherMismatchError("srun started 4 ranks, but MPI sees 1")

    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setattr(doctor, "world", refuse)
    found = doctor.world_size()
    assert (found.status, found.advice) == ("fail", "srun started 4 ranks, but MPI sees 1")


def test_ranks_without_an_mpi_library_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setattr(doctor, "world", lacks_mpi)
    assert doctor.world_size().status == "fail"


# -------------------------------------------------------------------------------------------------------------- BLAS


def test_no_blas_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_blas", lambda: None)
    assert doctor.blas().status == "warn"


@pytest.mark.parametrize(("slower", "status"), [(2.0, "warn"), (1.05, "ok")])
def test_forced_kernels_are_timed_beside_the_processors_own(
    slower: float, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setattr(
        doctor, "kernel_speed", lambda e: ("Haswell", slower) if "OPENBLAS_CORETYPE" in e else ("SkylakeX", 1.0)
    )
    found = doctor.kernels()
    assert found.status == status
    assert not found.advice or found.advice == "unset OPENBLAS_CORETYPE: SkylakeX kernels are 2.0 times as fast"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Prescott's kernels are for x86-64")
def test_real_kernels_of_an_old_processor_are_found_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")  # SSE3; every processor of the last ten years has AVX2
    found = doctor.kernels()
    assert found.status == "warn", found
    assert "unset OPENBLAS_CORETYPE" in found.advice


def test_features_taken_from_numpy_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPY_DISABLE_CPU_FEATURES", "AVX2")
    assert "unset NPY_DISABLE_CPU_FEATURES" in doctor.kernels().advice


def test_more_blas_threads_than_cores_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_blas", lambda: {"num_threads": 2})
    monkeypatch.setattr(doctor, "allowed_cores", lambda: 4)
    assert doctor.blas_threads(2).status == "ok"
    found = doctor.blas_threads(4)
    assert (found.status, found.advice) == ("warn", "4 × 2 threads share 4 cores: set OPENBLAS_NUM_THREADS=1")


# ----------------------------------------------------------------------------------------------------------- machine


def test_more_ranks_than_cores_and_a_smaller_quota_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "allowed_cores", lambda: 4)
    monkeypatch.setattr(doctor, "cpu_quota", lambda: None)
    assert doctor.cores(4).status == "ok"
    assert "5 ranks share 4 cores" in doctor.cores(5).advice
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 1.5)
    assert "1.5 cores' time on 4 cores" in doctor.cores(1).advice


def test_the_quota_of_both_kinds_of_control_groups(tmp_path: Path) -> None:
    assert doctor.cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert doctor.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert doctor.cpu_quota(tmp_path) == 1.5


def test_little_or_no_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.shared_memory(tmp_path / "none").status == "warn"
    docker = os.statvfs_result((4096, 4096, 16384, 16384, 16384, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: docker)
    found = doctor.shared_memory()
    assert (found.status, found.value) == ("warn", "/dev/shm: 67 MB free of 67 MB")


def test_a_host_whose_name_has_no_address_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(host: str, port: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "add it to /etc/hosts" in doctor.interfaces().advice


def test_a_run_directory_that_works_is_left_as_it_was(tmp_path: Path) -> None:
    found = doctor.run_directory(tmp_path / "runs" / "a")
    assert found.status in ("ok", "warn"), found  # a warning where the disk is nearly full
    assert "rename and fsync work" in found.value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="root can write everywhere but to /proc")
def test_a_read_only_run_directory_fails() -> None:
    found = doctor.run_directory(Path("/proc/self/runs"))
    assert found.status == "fail"
    assert "choose another run directory" in found.advice


def test_a_tiny_and_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = os.statvfs_result((4096, 4096, 256, 256, 256, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: tiny)
    found = doctor.run_directory(tmp_path)
    assert found.status == "warn"
    assert "1 MB free" in found.value

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert doctor.run_directory(tmp_path).status == "fail"


@pytest.mark.skipif(shutil.which("unshare") is None, reason="a tmpfs of a test's own needs `unshare`")
def test_a_real_tmpfs_of_one_megabyte_is_little_shared_memory_and_little_disk(tmp_path: Path) -> None:
    question = (
        "import sys; from pathlib import Path; from distprop import doctor; p = Path(sys.argv[1]);"
        "print(doctor.shared_memory(p).status, doctor.run_directory(p).status);"
        "(p / 'full').write_bytes(bytes(1_000_000)); print(doctor.run_directory(p).status)"
    )
    shell = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, "sh", tmp_path, sys.executable]
    done = subprocess.run([*command, question], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    if "Operation not permitted" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("this system lets no user mount a tmpfs of his own")
    assert done.stdout.split() == ["warn", "warn", "fail"], done.stderr


# ------------------------------------------------------------------------------------------------------ several ranks


def test_ranks_bound_to_one_core_are_a_warning() -> None:
    assert doctor.binding("a", ["0,1", "0,1"]).value == "2 ranks on 2 cores, not bound"
    assert doctor.binding("a", ["0", "1"]).status == "ok"
    assert doctor.binding("a", ["0", "0", "1"]).status == "ok"  # more ranks than cores is another finding
    assert "--bind-to none" in doctor.binding("a", ["0", "0", "1,2"]).advice


def test_hosts_that_differ_are_named() -> None:
    findings = {
        "a": [Finding("Python", "3.11"), Finding("cores", "4")],
        "b": [Finding("Python", "3.12"), Finding("cores", "8", "warn", "fewer ranks")],
    }
    cores, different = doctor.compare_hosts(findings)
    assert (cores.name, cores.status, cores.advice) == ("cores on b", "warn", "fewer ranks")
    assert (different.status, different.advice) == ("warn", "b and a differ: install the same on all hosts")
    assert doctor.compare_hosts({"a": findings["a"]}) == []


def test_one_address_on_two_hosts_is_a_warning() -> None:
    hosts = {"a": {"eth0": "10.0.0.1", "docker0": "172.17.0.1"}, "b": {"eth0": "10.0.0.2", "docker0": "172.17.0.1"}}
    assert doctor.same_addresses(hosts).advice.endswith("OMPI_MCA_btl_tcp_if_exclude=lo,docker0")
    assert doctor.same_addresses({"a": hosts["a"]}).status == "ok"


def test_a_slow_rank_is_named_with_its_host() -> None:
    hosts = {0: "a", 1: "a", 2: "b"}
    found = doctor.slowest_rank([1.0, 1.0, 1.5], hosts)
    assert (found.status, found.value) == ("warn", "rank 2 on b, 1.50 times the median")
    assert doctor.slowest_rank([1.0, 1.0, 1.2], hosts).status == "ok"


@needs_mpi
def test_ranks_are_started_and_measured(tmp_path: Path) -> None:
    done = distprop("doctor", "-n", "2", "--json", "--run-dir", str(tmp_path))
    answer = json.loads(done.stdout)
    found = {finding["name"].split(" on ")[0]: finding for finding in answer["findings"]}
    assert done.returncode == (answer["status"] == "fail"), done.stderr
    assert found["world size"]["value"] == "2, started by distprop run"
    assert found["thread level"]["value"] in ("multiple", "serialized", "funneled", "single")
    assert found["Allreduce"]["value"].startswith("2 ranks: ")
    assert found["slowest rank"]["value"].startswith("rank ")


@needs_mpi
def test_two_names_on_one_machine_are_two_hosts(tmp_path: Path) -> None:
    script = tmp_path / "hosts.py"
    script.write_text(
        "import pathlib, sys\nfrom distprop import doctor\nfrom distprop.comm import world\n"
        "comm = world()\nfindings = doctor.check_job(comm, pathlib.Path(sys.argv[1]), 'ab'[comm.rank // 2])\n"
        "if comm.rank == 0: print(doctor.to_json(findings))\n"
    )
    done = distprop("run", "-n", "4", str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert {"Allreduce on a", "Allreduce on b", "Allreduce between hosts", "binding on b"} <= set(found)
    assert found["run directory shared"]["value"] == "by all hosts"


# ---------------------------------------------------------------------------------------------------------- the command


def test_without_mpi_it_says_so_and_nothing_fails(tmp_path: Path) -> None:
    done = distprop("doctor", "--run-dir", str(tmp_path), **NO_MPI)
    assert done.returncode == 0, done.stdout
    assert "none; one process works without" in done.stdout
    assert "MPI library: for several ranks: pip install" in done.stdout
    assert max(map(len, done.stdout.partition("\n\n")[0].splitlines())) <= 80


def test_several_ranks_without_mpi_fail(tmp_path: Path) -> None:
    done = distprop("doctor", "-n", "2", "--run-dir", str(tmp_path), **NO_MPI)
    assert done.returncode == 1
    assert "2 ranks cannot be started" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="root can write everywhere but to /proc")
def test_what_fails_is_the_exit_status() -> None:
    done = distprop("doctor", "--json", "--run-dir", "/proc/self/runs", **NO_MPI)
    assert done.returncode == 1
    assert json.loads(done.stdout)["status"] == "fail"
