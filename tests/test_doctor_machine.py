"""Each check of the machine is made to go wrong, and says what to do."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distprop.doctor import machine
from test_cli_run import ROOT


def test_more_ranks_than_cores_and_a_smaller_quota_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    assert machine.cores(4, 4).status == "ok"
    assert "5 ranks share 4 cores" in machine.cores(5, 4).advice
    monkeypatch.setattr(machine, "cpu_quota", lambda: 1.5)
    assert "1.5 cores' time on 4 cores" in machine.cores(1, 4).advice


def test_the_quota_of_both_kinds_of_control_groups(tmp_path: Path) -> None:
    assert machine.cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert machine.cpu_quota(tmp_path) == 1.5


def test_little_or_no_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine.shared_memory(tmp_path / "none").status == "warn"
    docker = os.statvfs_result((4096, 4096, 16384, 16384, 16384, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: docker)
    found = machine.shared_memory()
    assert (found.status, found.value) == ("warn", "/dev/shm: 67 MB free of 67 MB")


def test_a_host_whose_name_has_no_address_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(host: str, port: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "add it to /etc/hosts" in machine.interfaces().advice


def test_a_run_directory_that_works_is_left_as_it_was(tmp_path: Path) -> None:
    found = machine.run_directory(tmp_path / "runs" / "a")
    assert found.status in ("ok", "warn"), found  # a warning where the disk is nearly full
    assert "rename and fsync work" in found.value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="root can write everywhere but to /proc")
def test_a_read_only_run_directory_fails() -> None:
    found = machine.run_directory(Path("/proc/self/runs"))
    assert found.status == "fail"
    assert "choose another run directory" in found.advice


@pytest.mark.parametrize("name", ["file", "file/runs"])
def test_a_file_is_no_run_directory(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = machine.run_directory(tmp_path / name)
    assert (found.status, found.value) == ("fail", f"{tmp_path / name}: {tmp_path / 'file'} is a file")


def test_a_tiny_and_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = os.statvfs_result((4096, 4096, 256, 256, 256, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: tiny)
    found = machine.run_directory(tmp_path)
    assert found.status == "warn"
    assert "1 MB free" in found.value

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert machine.run_directory(tmp_path).status == "fail"


@pytest.mark.skipif(shutil.which("unshare") is None, reason="a tmpfs of a test's own needs `unshare`")
def test_a_real_tmpfs_of_one_megabyte_is_little_shared_memory_and_little_disk(tmp_path: Path) -> None:
    question = (
        "import sys; from pathlib import Path; from distprop.doctor import machine; p = Path(sys.argv[1]);"
        "print(machine.shared_memory(p).status, machine.run_directory(p).status);"
        "(p / 'full').write_bytes(bytes(1_000_000)); print(machine.run_directory(p).status)"
    )
    shell = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, "sh", tmp_path, sys.executable]
    done = subprocess.run([*command, question], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    if "Operation not permitted" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("this system lets no user mount a tmpfs of his own")
    assert done.stdout.split() == ["warn", "warn", "fail"], done.stderr
