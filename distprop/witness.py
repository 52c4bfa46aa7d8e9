"""What `distprop run` can say of a rank that died without a word: which one was first, and what it was doing.

MPI launchers end all ranks when one is killed, so that in the end all are dead. The kernel reports deaths in their
order, and the dead rank's flight record is still there.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import tempfile
from pathlib import Path

from distprop.comm import recorder
from distprop.comm.recorder import FOLDER_VARIABLE, OWNED


class Witness:
    """Watches the ranks of this host whose records are in its folder; `environment` tells them where that is."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="distprop-", dir=recorder.memory_folder()))
        (self.folder / OWNED).touch()
        self.environment = {FOLDER_VARIABLE: str(self.folder)}
        self._exits = select.epoll() if hasattr(select, "epoll") and hasattr(os, "pidfd_open") else None
        self._handles: dict[int, int] = {}  # of a process: its rank
        self._dead: list[int] = []  # ranks in the order of their deaths

    def look(self) -> None:
        """Take note of ranks that have started since, and of those that have ended."""
        if self._exits is None:
            return
        self._dead += [self._handles[handle] for handle, _ in self._exits.poll(0)]  # they come in their order
        known = {*self._handles.values(), *self._dead}
        missed = []
        for snapshot in recorder.records(str(self.folder)):
            if snapshot.rank not in known:
                try:
                    handle = os.pidfd_open(snapshot.process)
                except OSError:  # it has lived for less than the time between two looks
                    missed.append(snapshot)
                    continue
                self._handles[handle] = snapshot.rank
                self._exits.register(handle, select.EPOLLIN | select.EPOLLONESHOT)
        missed.sort(key=lambda snapshot: (snapshot.sequence, snapshot.inside))  # the others wait for the first one
        self._dead += [snapshot.rank for snapshot in missed]

    def report(self, status: int) -> str:
        """Why the job ended with `status`, if no rank has said it: the first death and its place."""
        self.look()
        snapshots = {snapshot.rank: snapshot for snapshot in recorder.records(str(self.folder))}
        if not self._dead or any(snapshot.spoken for snapshot in snapshots.values()):
            return ""
        first = snapshots[self._dead[0]]
        return "" if first.ended else recorder.report((first.rank,), _cause(status), snapshots)

    def close(self) -> None:
        """Remove the folder."""
        for handle in self._handles:
            os.close(handle)
        if self._exits is not None:
            self._exits.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _cause(status: int) -> str:
    try:
        number = signal.Signals(status - 128)
    except ValueError:
        return f"died without a word; the job's exit status is {status}"
    why = " (by hand, or by the kernel for want of memory, which dmesg tells)" if number is signal.SIGKILL else ""
    return f"killed by {number.name}{why}"
