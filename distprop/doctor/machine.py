"""Checks of the machine: cores, memory that ranks share, network interfaces, and the folder for checkpoints."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from distprop.doctor.finding import Finding
from distprop.hosts import probe
from distprop.hosts.hostfile import count

ENOUGH_SHARED_MEMORY = 256_000_000  # Docker gives a container 64 MB
ENOUGH_DISK = 1_000_000_000


def cores(ranks: int, available: int) -> Finding:
    """How many cores the ranks may use, and whether they are enough."""
    quota = cpu_quota()
    value = f"{available} of {os.cpu_count()} allowed"
    if quota is not None and quota < available:
        advice = f"the container may use {quota:g} cores' time on {available} cores: give it whole cores (cpuset)"
        return Finding("cores", f"{value}, time of {quota:g}", "warn", advice)
    if ranks > available:
        return Finding(
            "cores", value, "warn", f"{ranks} ranks share {count(available, 'core')}: correct, but slow; take fewer"
        )
    return Finding("cores", value)


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """How many cores' time the control group may use; None without a limit. Versions 2 and 1."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except OSError:
        try:
            limit, period = ((root / f"cpu/cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    return None if limit in ("max", "-1") else int(limit) / int(period)


def shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    """Whether ranks of a host have room for their common memory."""
    try:
        space = os.statvfs(path)
    except OSError as error:
        return Finding("shared memory", f"{path}: {error.strerror}", "warn", f"mount a tmpfs on {path}")
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    value = f"{path}: {_bytes(free)} free of {_bytes(total)}"
    if free < ENOUGH_SHARED_MEMORY:
        return Finding("shared memory", value, "warn", "ranks may crash when it is full: docker run --shm-size 1g")
    return Finding("shared memory", value)


def interfaces() -> Finding:
    """Which network interfaces could carry messages, and whether this host's own name leads to one."""
    named = [f"{way['name']} {way['address']}{_speed(way['speed'])}" for way in _interfaces()]
    value = ", ".join(named) or "only this host itself"
    host = os.uname().nodename
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return Finding("interfaces", value, "warn", f"this host's name {host} has no address: add it to /etc/hosts")
    return Finding("interfaces", value)


def addresses() -> dict[str, str]:
    """IPv4 address by interface, of those that are up, without the loopback. Empty where the system does not tell."""
    return {way["name"]: way["address"] for way in _interfaces()}


def _interfaces() -> list[dict[str, Any]]:
    return probe.interfaces() if sys.platform == "linux" else []


def _speed(megabits: int) -> str:
    return f" {megabits / 1000:g} Gbit/s" if megabits > 0 else ""


def run_directory(path: Path) -> Finding:
    """Whether checkpoints can be written there: a folder is made, filled, made durable and renamed, and goes again."""
    existing = existing_folder(path)
    if (found := next(place for place in _upwards(path) if place.exists())) != existing:
        return Finding("run directory", f"{path}: {found} is a file", "fail", "choose another run directory")
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".distprop-doctor-") as name:
            began, folder = time.perf_counter(), Path(name)
            (folder / "part").mkdir()
            with open(folder / "part" / "file", "wb") as file:
                file.write(bytes(65536))
                file.flush()
                os.fsync(file.fileno())
            (folder / "part").rename(folder / "whole")
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            milliseconds = (time.perf_counter() - began) * 1e3
    except OSError as error:
        advice = f"checkpoints cannot be written in {existing}: choose another run directory"
        return Finding("run directory", f"{path}: {error.strerror}", "fail", advice)
    space = os.statvfs(existing)
    free = space.f_bavail * space.f_frsize
    value = f"{path}: rename and fsync work, {milliseconds:.1f} ms; {_bytes(free)} free"
    if free < ENOUGH_DISK:
        return Finding("run directory", value, "warn", f"{existing} has little room for checkpoints")
    return Finding("run directory", value)


def existing_folder(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next(place for place in _upwards(path) if place.is_dir())


def _upwards(path: Path) -> tuple[Path, ...]:
    return path.absolute(), *path.absolute().parents


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
