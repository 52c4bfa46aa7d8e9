"""While a job runs on other hosts: each of them is watched, and nothing is left there when it ends."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from distprop.hosts.hostfile import Host
from distprop.hosts.session import Session, ask_all, connect_all


class Guard:
    """While a job runs: one ssh connection to each other host, at whose end the host kills what is left of the job.

    It ends when the job does, and also when this process is killed. If it ends before, the host is named. Nothing is
    killed after a job that has ended well, which `well` says. What a rank there writes into the file `mirrored`, which
    exists on its host only, is written into the same file here.
    """

    def __init__(self, hosts: Sequence[Host], marker: str, mirrored: str = "") -> None:
        self._hosts = hosts
        self.marker = marker
        self._sessions: list[Session] = []
        self._watchers: list[threading.Thread] = []
        self.sign = f"/tmp/distprop-{marker}"
        self._mirrored = mirrored
        self._leaving = False
        self._ending = False
        self.well = False
        self.lost: list[str] = []

    def __enter__(self) -> Guard:
        """Connect to every host that is not this one."""
        self._sessions = [session for session in connect_all(self._hosts) if not session.local]
        request = {"do": "guard", "marker": self.marker, "sign": self.sign, "mirrored": self._mirrored, "content": ""}
        if os.path.exists(self._mirrored):  # by an earlier attempt
            request["content"] = Path(self._mirrored).read_text(encoding="utf-8")
        ask_all(self._sessions, request)
        for session in self._sessions:
            watcher = threading.Thread(target=self._watch, args=(session,), daemon=True)
            watcher.start()
            self._watchers.append(watcher)
        return self

    def __exit__(self, kind: object, error: object, trace: TracebackType | None) -> None:
        """Wait some seconds until each host has cleaned up."""
        self._leaving = True
        for session in self._sessions:
            if self.well:
                session.write("well")
            session.close(wait_seconds=0)
        deadline = time.monotonic() + 10
        for session, watcher in zip(self._sessions, self._watchers, strict=True):
            watcher.join(max(0.1, deadline - time.monotonic()))  # it reads the last news before the pipe is closed
            session.close(wait_seconds=max(0.1, deadline - time.monotonic()))
            watcher.join()
        with contextlib.suppress(OSError):
            os.remove(self.sign)

    def is_ending(self) -> bool:
        """Whether MPI should end the job at once: a host is lost, or a rank has asked for it, by the file `sign`."""
        return self._ending or os.path.exists(self.sign)

    def _watch(self, session: Session) -> None:
        while (news := session.listen()) is not None:
            self._ending |= "ending" in news
            if content := news.get("mirrored"):
                partial = Path(f"{self._mirrored}.partial")
                partial.write_text(content, encoding="utf-8")
                partial.replace(self._mirrored)
        status = session.wait()
        if status or not self._leaving:  # at the end of its input the guard leaves with 0
            self._ending = True
            self.lost.append(session.name)
            reason = session.complaint() or "the connection ended"
            print(f"\ndistprop: lost host {session.name}: {reason}", file=sys.stderr, flush=True)
