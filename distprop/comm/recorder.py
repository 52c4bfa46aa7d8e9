"""The flight recorder: where this rank is and what it called last, kept where it survives the rank.

Step, phase and a ring of the last collectives are a few hundred bytes in a file in memory, which the other ranks of the
host and `distprop run` read as well. So what a rank was doing can be told after it was killed, and while it is stopped.
Writing is two or three stores into mapped memory, without a lock; a reader may see a number one collective old.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from distprop.comm.base import CollectiveError, Communicator

# The phases of a program.
START = b"start"
JOINING = b"start of MPI"
DATA = b"data"
FORWARD = b"forward pass"
BACKWARD = b"backward pass"
REDUCTION = b"reduction"
UPDATE = b"update"
CALLBACKS = b"callbacks"
EVALUATION = b"evaluation"
CHECKPOINT = b"checkpoint"
AFTER_FIT = b"after fit"
END = b"end"

RING = 16  # collectives that are kept
SHOWN = 6  # of them in a report
FOLDER_VARIABLE = "DISTPROP_RECORDS"  # where `distprop run` wants the files of its host
LAUNCHER = "launcher"  # its socket there, to which a rank stays connected until it ends; it will remove the folder
_ROOM_BYTES = 32 * 2**20  # below that Open MPI (5.0) does not start two ranks, which wait for each other for ever

_HEADER = struct.Struct("<8sqqq64s")  # magic, rank, size, process, host
_SPOKEN = struct.Struct("<q")
_PLACE = struct.Struct("<q16s")  # step, phase
_CALL = struct.Struct("<qq")  # number of the last collective, whether the rank is in it
_ENTRY = struct.Struct("<q16sq24s")  # number, operation, bytes, dtype (of a broadcast with the root, if it is not 0)
_MAGIC = b"distprop"
_SPOKEN_AT = _HEADER.size
_PLACE_AT = _SPOKEN_AT + _SPOKEN.size
_CALL_AT = _PLACE_AT + _PLACE.size
_RING_AT = _CALL_AT + _CALL.size
LENGTH = _RING_AT + RING * _ENTRY.size

SAME_CALLS = "all ranks must call the same collectives in the same order"

Call: TypeAlias = tuple[str, int, str]  # operation, bytes, dtype
Method = TypeVar("Method", bound=Callable[..., Any])


class Record:
    """This process's record; `here` is the one of every program. `waited` counts the seconds spent in collectives.

    `phases` counts the phases begun: two that come in turn look like one to who looks twice a second.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.hosts: list[str] = []  # by rank, once the ranks are connected
        self.peers: dict[int, Any] = {}  # the memory of other ranks' records, of those on this host
        self.neighbour: int | None = None  # one of them; every rank of this host is the neighbour of another
        self.memory: Any = bytearray(LENGTH)
        self._path = ""  # of the file that it is in
        self.step, self.phase, self.phases = 0, START, 0
        self.sequence, self.inside, self.waited = 0, False, 0.0
        self.failed = False  # the last collective raised
        self._began = 0.0

    def at(self, phase: bytes, step: int | None = None) -> None:
        """This rank is now in `phase` of `step`, which counts from 1; 0 is before the first."""
        if step is not None:
            self.step = step
        self.phase = phase
        self.phases += 1
        _PLACE.pack_into(self.memory, _PLACE_AT, self.step, phase)

    def enter(self, operation: bytes, size: int, dtype: bytes = b"") -> None:
        """A collective begins that moves `size` bytes, of an array of `dtype`."""
        self.sequence = number = self.sequence + 1
        self.inside, self.failed = True, False
        _ENTRY.pack_into(self.memory, _RING_AT + number % RING * _ENTRY.size, number, operation, size, dtype)
        _CALL.pack_into(self.memory, _CALL_AT, number, 1)
        self._began = time.perf_counter()

    def compare(self) -> None:
        """Raise CollectiveError if the neighbour made another call in place of the last one.

        MPI may have completed both, with numbers of another dtype or without the last ones. What the neighbour has not
        begun yet, or what is no longer in its ring, is passed over.
        """
        if self.neighbour is None:
            return
        at = _RING_AT + self.sequence % RING * _ENTRY.size
        memories = self.memory, self.peers[self.neighbour]
        for _ in range(2):  # the neighbour may just have been writing
            own, other = (memory[at : at + _ENTRY.size] for memory in memories)
            if own == other or own[:8] != other[:8]:  # the number
                return
            (_, own_call), (_, other_call) = (_entry(memory, self.sequence) for memory in memories)
            if comparable(own_call) == comparable(other_call):
                return
            time.sleep(0.001)
        raise CollectiveError(
            f"{self.name(self.rank)} called {described(own_call)} as collective {self.sequence}, where "
            f"{self.name(self.neighbour)} called {described(other_call)}; {SAME_CALLS}",
            sorted((self.rank, self.neighbour)),
        )

    def leave(self) -> None:
        """It is complete."""
        self.waited += time.perf_counter() - self._began
        self.inside = False
        _CALL.pack_into(self.memory, _CALL_AT, self.sequence, 0)

    def fail(self) -> None:
        """It raised; for those who look this rank stays in it."""
        self.inside, self.failed = False, True

    def speak(self) -> bool:
        """Claim the job's one report; False if another rank of this host has made it."""
        if any(read(memory).spoken for memory in self.peers.values()):
            return False
        _SPOKEN.pack_into(self.memory, _SPOKEN_AT, 1)
        return True

    def name(self, rank: int) -> str:
        """A rank with its host, "rank 1 on node7"; only "rank 1" where the ranks are no processes."""
        return f"rank {rank} on {self.hosts[rank]}" if rank < len(self.hosts) else f"rank {rank}"

    def seen(self) -> dict[int, Snapshot]:
        """This rank and those of this host as they are now."""
        records = {rank: read(memory) for rank, memory in {**self.peers, self.rank: self.memory}.items()}
        return dict(sorted(records.items()))

    def connect(self, comm: Communicator) -> None:
        """Tell the ranks of this host where the records are, and map theirs. Collective."""
        host = os.uname().nodename
        self.rank, self.size = comm.rank, comm.size
        messages = [
            message.decode().split("\n") for message in comm.allgather(f"{host}\n{os.urandom(8).hex()}".encode())
        ]
        self.hosts = [name for name, _ in messages]
        given = os.environ.get(FOLDER_VARIABLE, "")
        owned = bool(given) and os.path.exists(os.path.join(given, LAUNCHER))
        folder = given if owned else os.path.join(memory_folder(), f"distprop-{messages[0][1]}")
        with contextlib.suppress(OSError):  # then the record stays with this process, and only its own report has it
            os.makedirs(folder, exist_ok=True)
            self.keep(folder, comm.rank, comm.size)
            if owned:
                self._stay_connected(os.path.join(folder, LAUNCHER))
        comm.barrier()
        for rank in range(comm.size):
            if self.hosts[rank] == host and rank != comm.rank:
                with contextlib.suppress(OSError, ValueError):  # two hosts of one name
                    self.peers[rank] = _map(os.path.join(folder, f"rank-{rank}"))
        self.neighbour = min(self.peers, key=lambda rank: (rank < self.rank, rank), default=None)
        comm.barrier()
        if not owned:  # what is mapped needs no name, and nobody would remove it
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, f"rank-{comm.rank}"))
                os.rmdir(folder)

    def keep(self, folder: str, rank: int, size: int) -> None:
        """From now on the record is in a file of `folder`, if it is not already.

        A second mapping would free a file number below those of MPI, and `_stay_connected` would get it.
        """
        path = os.path.join(folder, f"rank-{rank}")
        if path == self._path:
            return
        _HEADER.pack_into(self.memory, 0, _MAGIC, rank, size, os.getpid(), os.uname().nodename.encode()[:64])
        with open(path, "wb") as file:
            file.write(self.memory)
        self.memory, self._path = _map(path), path

    def _stay_connected(self, launcher: str) -> None:
        import socket  # not on every import of the package

        connection = socket.socket(socket.AF_UNIX)
        connection.connect(launcher)
        connection.send(str(self.rank).encode())
        handle = connection.detach()  # the kernel closes it with this process
        os.register_at_fork(after_in_child=functools.partial(os.close, handle))  # a child may outlive its rank


here = Record()


@dataclass(frozen=True)
class Snapshot:
    """What a record says."""

    rank: int
    size: int
    process: int
    host: str
    spoken: bool
    step: int
    phase: str
    sequence: int
    inside: bool
    ring: Mapping[int, Call] = field(default_factory=dict)  # by number, oldest first

    @property
    def joining(self) -> bool:
        """Whether it waits for the others in the start of MPI."""
        return self.phase == JOINING.decode()

    @property
    def ended(self) -> bool:
        """Whether its script has come to its end."""
        return self.phase == END.decode()

    @property
    def place(self) -> str:
        """For people: "step 12, backward pass"."""
        return f"step {self.step}, {self.phase}" if self.step else self.phase

    @property
    def collective(self) -> str:
        """The last collective: "collective 57, allreduce of 1,024 bytes"."""
        operation, size, _ = self.ring.get(self.sequence, ("none", 0, ""))
        return f"collective {self.sequence}, {operation} of {size:,} bytes"

    def line(self) -> str:
        """The rank with its last collectives."""
        calls = [f"{number} {operation} {size:,}" for number, (operation, size, _) in self.ring.items()][-SHOWN:]
        now = " (in it)" if self.inside else ""
        return f"  rank {self.rank}, {self.place}: {'; '.join(calls) or 'no collective yet'}{now}"


def read(memory: Any) -> Snapshot:
    """The snapshot in `memory`.

    Raises:
        ValueError: it is no record.
    """
    content = bytes(memory)
    if len(content) != LENGTH:
        raise ValueError(f"a record has {LENGTH} bytes, not {len(content)}")
    _, rank, size, process, host = _HEADER.unpack_from(content)
    step, phase = _PLACE.unpack_from(content, _PLACE_AT)
    sequence, inside = _CALL.unpack_from(content, _CALL_AT)
    ring = {number: call for number, call in sorted(_entry(content, slot) for slot in range(RING)) if number}
    spoken = bool(_SPOKEN.unpack_from(content, _SPOKEN_AT)[0])
    return Snapshot(
        rank, size, process, _text(host), spoken, step, _text(phase) or "start", sequence, bool(inside), ring
    )


def comparable(call: Call) -> Call:
    """What all ranks must agree in; of these two the bytes may differ."""
    operation, size, dtype = call
    return operation, -1 if operation in ("allgather", "alltoall") else size, dtype


def described(call: Call) -> str:
    """For people: "allreduce of 1,024 bytes of float32"."""
    operation, size, dtype = call
    return operation + (f" of {size:,} bytes" if size > 0 else "") + (f" of {dtype}" if dtype else "")


def report(culprits: Sequence[int], reason: str, snapshots: Mapping[int, Snapshot], trace: str = "") -> str:
    """The one message of a job that ends: rank, host, step, phase, reason; the last collectives; a traceback."""
    of_whom = [snapshots[rank] for rank in culprits if rank in snapshots]
    known = of_whom or list(snapshots.values())
    size = known[0].size if known else here.size
    hosts = {rank: snapshot.host for rank, snapshot in snapshots.items()} | dict(enumerate(here.hosts))
    who = (
        ", ".join(f"rank {rank} of {size} on {hosts.get(rank, 'another host')}" for rank in culprits[:8]) or "all ranks"
    )
    place = (of_whom[0].place if of_whom else f"{known[0].place} on rank {known[0].rank}") if known else "unknown step"
    lines = [snapshot.line() for snapshot in list(snapshots.values())[:16]]
    return (
        f"\ndistprop: {who}, {place}: {reason}; ending the job\n"
        f" last collectives (number, operation, bytes):\n" + "\n".join(lines) + f"\n{trace}"
    )


def recorded(method: Method) -> Method:
    """Decorates a collective of a communicator of processes; one that it calls itself is a part of it.

    Where `self.counted` is False it is not recorded: ranks compare the numbers of their collectives.
    """
    operation = method.__name__.lstrip("_").encode()

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if here.inside or not getattr(self, "counted", True):
            return method(self, *args, **kwargs)
        size, dtype = _moves(args)
        if operation == b"broadcast" and args[1]:
            dtype += b" from rank %d" % args[1]
        here.enter(operation, size, dtype)
        try:
            result = method(self, *args, **kwargs)
            here.compare()
        except BaseException:
            here.fail()
            raise
        here.leave()
        return result

    return call  # type: ignore[return-value]


def memory_folder(folder: str = "/dev/shm") -> str:
    """Where files are memory, if there is such a place, with room for the records and what Open MPI shares."""
    with contextlib.suppress(OSError):
        space = os.statvfs(folder)
        if os.access(folder, os.W_OK | os.X_OK) and space.f_bavail * space.f_frsize >= _ROOM_BYTES:
            return folder
    import tempfile

    return tempfile.gettempdir()


def records(folder: str) -> Iterable[Snapshot]:
    """The records in a folder."""
    for name in sorted(os.listdir(folder)):
        with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, name), "rb") as file:
            yield read(file.read())


def _map(path: str) -> Any:
    import mmap

    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), LENGTH)


def _entry(memory: Any, number: int) -> tuple[int, Call]:
    """What the ring has in the place of collective `number`, and the number that it is of."""
    found, operation, size, dtype = _ENTRY.unpack_from(memory, _RING_AT + number % RING * _ENTRY.size)
    return found, (_text(operation), size, _text(dtype))


def _moves(args: tuple[Any, ...]) -> tuple[int, bytes]:
    """Bytes and dtype of a collective's first argument."""
    first = args[0] if args else b""
    if isinstance(first, bytes):
        return len(first), b""
    return int(getattr(first, "nbytes", 0)), _name(getattr(first, "dtype", None))  # the collective refuses others


@functools.cache
def _name(dtype: object) -> bytes:
    return b"" if dtype is None else str(dtype).encode()[:16]


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode(errors="replace")
