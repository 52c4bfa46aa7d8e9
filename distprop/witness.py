"""What `distprop run` can say of a rank that died without a word: which one was first, and what it was doing.

MPI launchers end all ranks when one is killed, so that in the end all are dead. Each rank keeps a connection to the
launcher; the kernel closes it as it ends the rank and tells so in the order of the deaths. The dead rank's flight
record is still there.
"""

from __future__ import annotations

import contextlib
import re
import select
import shutil
import signal
import socket
import tempfile
import threading
from pathlib import Path

from distprop.comm import recorder
from distprop.comm.recorder import FOLDER_VARIABLE, LAUNCHER, Snapshot


class Witness:
    """Watches the ranks of this host whose records are in its folder; `environment` tells them where that is.

    A process's own handle (pidfd) would tell the order too late: Hydra (MPICH 5.0) sees that its pipes to a rank are
    closed, and kills the others, before the rank counts as dead. But Linux closes the file opened last first, and a
    rank connects to here after MPI has started.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="distprop-", dir=recorder.memory_folder()))
        self.environment = {FOLDER_VARIABLE: str(self.folder)}
        self._door = socket.socket(socket.AF_UNIX)
        self._ends = select.epoll() if hasattr(select, "epoll") else None  # elsewhere nothing tells the order
        try:
            self._door.bind(str(self.folder / LAUNCHER))
            self._door.listen(4096)
        except OSError:  # a path of over 100 characters, where /dev/shm is missing and TMPDIR is long
            (self.folder / LAUNCHER).touch()
            self._ends = None
        self._ranks: dict[int, socket.socket] = {}  # the connections, by their file descriptors
        self._dead: list[int] = []  # ranks in the order of their deaths
        self._gone: set[int] = set()  # ranks without a process at the last count
        self._long_gone: set[int] = set()  # and at the one before
        self.deserters: set[int] = set()  # ranks that were, while another waited for them in the start of MPI
        self._welcoming = threading.Thread(target=self._welcome, daemon=True)
        self._welcoming.start()

    def _welcome(self) -> None:
        """Watch each rank from the moment on at which it connects: of those that nobody watched no order is told."""
        with contextlib.suppress(OSError):  # the door is closed
            while self._ends is not None:
                rank, _ = self._door.accept()
                self._ranks[rank.fileno()] = rank
                self._ends.register(rank, select.EPOLLRDHUP | select.EPOLLONESHOT)

    def look(self) -> None:
        """Take note of the ranks that have ended since."""
        if self._ends is None:
            return
        numbers = [self._ranks[connection].recv(16) for connection, _ in self._ends.poll(0)]  # they come in their order
        self._dead += [int(number) for number in numbers if number]  # none from one that died before it said its own

    def count(self) -> None:
        """Take note of the ranks whose processes are gone. Between two counts launchers do what they do about it."""
        ranks = self._records()
        gone = {number for number, rank in ranks.items() if not is_rank(rank.process)}
        self._gone, self._long_gone = gone, self._gone & gone
        if any(rank.joining for number, rank in ranks.items() if number not in gone):
            self.deserters = self._long_gone

    @property
    def all_lost(self) -> bool:
        """Whether all ranks of this host are gone, and one of them before it came to the end of its script."""
        ranks = self._records()
        return self._long_gone == set(ranks) and not all(rank.ended for rank in ranks.values())

    def report(self, status: int) -> str:
        """Why the job ended with `status`, if no rank has said it: the first death and its place."""
        self.look()
        snapshots = self._records()
        if any(snapshot.spoken for snapshot in snapshots.values()):
            return ""
        waiting = [rank for rank, snapshot in snapshots.items() if snapshot.joining]
        left = self.deserters | {rank for rank, snapshot in snapshots.items() if snapshot.ended}
        if waiting and left:
            reason = f"has ended without calling world(), in which rank {waiting[0]} waits for it"
            return recorder.report(sorted(left), reason, snapshots)
        if not self._dead:
            return ""
        first = snapshots[self._dead[0]]
        return "" if first.ended else recorder.report((first.rank,), _cause(status), snapshots)

    def _records(self) -> dict[int, Snapshot]:
        return {snapshot.rank: snapshot for snapshot in recorder.records(str(self.folder))}

    def close(self) -> None:
        """Remove the folder."""
        with contextlib.suppress(OSError):  # not listening
            self._door.shutdown(socket.SHUT_RDWR)
        self._welcoming.join(5)
        for connection in (self._door, *self._ranks.values()):
            connection.close()
        if self._ends is not None:
            self._ends.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def is_rank(pid: int) -> bool:
    """Whether the process was started as a rank (or by one), not as a part of the launcher, and goes on."""
    try:
        return re.search(rb"\0(OMPI_COMM_WORLD_RANK|PMI_RANK)=", Path(f"/proc/{pid}/environ").read_bytes()) is not None
    except OSError:
        return False


def _cause(status: int) -> str:
    try:
        number = signal.Signals(status - 128)
    except ValueError:
        return f"died without a word; the job's exit status is {status}"
    why = " (by hand, or by the kernel for want of memory, which dmesg tells)" if number is signal.SIGKILL else ""
    return f"killed by {number.name}{why}"
