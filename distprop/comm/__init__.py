"""Communicators: how ranks find each other and exchange numbers. `world()` is the one most programs need."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from distprop import slurm
from distprop.comm.base import CollectiveError, Communicator
from distprop.comm.solo import SoloCommunicator
from distprop.comm.threads import ThreadCommunicator, run_threads

if TYPE_CHECKING:
    from distprop.comm.mpi import Library

__all__ = [
    "CollectiveError",
    "Communicator",
    "LauncherMismatchError",
    "SoloCommunicator",
    "ThreadCommunicator",
    "play",
    "run_threads",
    "started_by",
    "world",
]

# Which variable of which launcher tells the number of ranks; the first one that is set counts, because mpirun inside a
# Slurm job starts its daemons with srun and the ranks see both. SLURM_NTASKS is not here: it is set in a batch script
# that was started once.
_LAUNCHERS = {
    "DISTPROP_SIZE": "distprop run",
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "MPICH's mpiexec",
    "SLURM_STEP_NUM_TASKS": "srun",
}


class LauncherMismatchError(RuntimeError):
    """The launcher started N processes, but MPI did not join them into one world of N."""


def world() -> Communicator:
    """All ranks of this job: MPI's world under a launcher, a world of one otherwise. The same object at every call.

    Under a launcher it also makes any uncaught exception end the whole job, starts the watchdog (docs/reliability.md),
    and gives each rank its share of the cores for matrix products.

    Raises:
        LauncherMismatchError: the launcher says N ranks while MPI says another number, as when `mpirun` belongs to
            another MPI than the one mpi4py loads, or that MPI cannot talk to `srun`. Training would run N times and
            overwrite its own results. Under srun one of the processes says so, if nobody catches it.
        MPIMissingError: started by a launcher, but no MPI library is installed.
        ValueError: DISTPROP_TIMEOUT is no number of seconds, or a launcher's variable no number of ranks.
    """
    global _world
    if (played := _played.get()) is not None:
        return played
    if _world is None:
        _world = _connect()
    return _world


@contextmanager
def play(comm: Communicator) -> Iterator[None]:
    """Inside, in this thread, `world()` is `comm`: how one process repeats what several did."""
    token = _played.set(comm)
    try:
        yield
    finally:
        _played.reset(token)


_world: Communicator | None = None
_played: ContextVar[Communicator | None] = ContextVar("played", default=None)


def _connect() -> Communicator:
    launcher, expected = started_by()
    if launcher is None or (launcher, expected) == ("distprop run", 1):
        return SoloCommunicator()
    from distprop.comm import mpi, watchdog

    timeout = watchdog.timeout_seconds()
    if launcher == "srun" and expected > 1 and mpi.library().vendor == "openmpi" and "PMIX_RANK" not in os.environ:
        _refuse_srun(expected, 1, mpi.library())  # before MPI starts, since it would complain first
    with mpi.waiting_for_all_ranks(timeout):
        comm = mpi.MPICommunicator()
    if comm.size != expected:
        if launcher == "srun":
            _refuse_srun(expected, comm.size, mpi.library())
        raise LauncherMismatchError(
            f"{launcher} started {expected} ranks, but {mpi.library().name}, which mpi4py loads, sees {comm.size}: "
            f"each process would train alone and overwrite the others' results. Start the job with "
            f"`distprop run -n {expected} ...`, which picks the launcher that belongs to the library"
        )
    if comm.size > 1:
        mpi.abort_on_exception(comm)
        mpi.watch(comm, timeout)
        _share_cores(comm)
    return comm


def started_by() -> tuple[str | None, int]:
    """Which launcher started this process, if any, and how many ranks it says there are.

    Raises:
        ValueError: it says no number.
    """
    for variable, launcher in _LAUNCHERS.items():
        if value := os.environ.get(variable):
            if not value.isdecimal():
                raise ValueError(f"{variable}={value} is no number of ranks; {launcher} sets it, and nobody else")
            by_srun = variable == "PMI_SIZE" and slurm.copies() == int(value)  # srun --mpi=pmi2 sets it too
            return "srun" if by_srun else launcher, int(value)
    return None, 1


def _refuse_srun(expected: int, size: int, library: Library) -> NoReturn:
    """Raised in every process, and said by one, which has no use for a traceback."""

    def say_once(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, LauncherMismatchError):
            sys.__excepthook__(kind, error, trace)
        elif slurm.is_spokesman():
            print(f"distprop: {error}", file=sys.stderr, flush=True)

    sys.excepthook = say_once
    with_srun = (
        "srun --mpi=pmi2" if library.vendor == "mpich" else "pip install mpich in its place, and srun --mpi=pmi2"
    )
    raise LauncherMismatchError(
        f"srun started {expected} processes, but {library.name}, which mpi4py loads, cannot join them this way: each "
        f"sees a world of {size}, would train alone and overwrite the others' results. Leave srun out: in a batch "
        f"script or an allocation, `distprop run script.py` (or mpirun) starts the ranks. Or keep it: {with_srun}"
    )


def _share_cores(comm: Communicator) -> None:
    """One BLAS thread for each core that this rank does not share; two ranks on two threads each lose half the speed.

    `distprop run` has set the variables before NumPy was loaded; this is for a bare `mpirun`.
    """
    if any(os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return
    import threadpoolctl

    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    mine = f"{os.uname().nodename}:{','.join(map(str, allowed))}"
    sharing = [message.decode() for message in comm.allgather(mine.encode())].count(mine)
    threadpoolctl.threadpool_limits(max(1, len(allowed) // sharing), user_api="blas")
