"""A conversation with a host over ssh: the probe runs there, and answers a line with a line.

A name that leads to this machine needs no ssh, neither here nor for mpirun.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distprop.hosts import probe
from distprop.hosts.hostfile import Host, HostsError

SSH = ("ssh", "-T", "-x", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")
ANSWER_SECONDS = 60.0  # for a host that accepts the connection; a cold import over a network file system takes 20
_WORDS_SECONDS = 5.0  # for the last words of an ssh that has ended; a connection it shares may hold their pipe open
_NEEDED_TO_IMPORT = ("PYTHON", "MPI4PY_", "LD_LIBRARY_PATH")


class Session:
    """The probe, running on a host (None: here) and answering a line with a line."""

    def __init__(self, host: Host | None) -> None:
        self.name = host.name if host else "this host"
        self.local = host is None or _is_here(host.name)
        environment = {name: value for name, value in os.environ.items() if name.startswith(_NEEDED_TO_IMPORT)}
        if path := environment.get("PYTHONPATH"):  # a login begins in another directory
            environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
        python = [sys.executable, "-c", "import json, sys; exec(json.loads(sys.stdin.readline()))"]
        command = ["exec", "env", *(f"{name}={value}" for name, value in environment.items()), *python]
        if not self.local and not shutil.which("ssh"):
            raise HostsError("there is no ssh on PATH, by which ranks are started on other hosts")
        self._complaints: list[str] = []
        self._process = subprocess.Popen(
            python if self.local else [*SSH, "--", self.name, shlex.join(command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that the terminal's Ctrl-C leaves it to us
        )
        self._reader = threading.Thread(target=self._read_complaints, daemon=True)
        self._reader.start()
        self.write(Path(probe.__file__).read_text(encoding="utf-8"))

    def ask(self, request: Mapping[str, Any]) -> Any:
        """The answer, or as a string why there is none."""
        begin = time.time()
        patience = threading.Timer(ANSWER_SECONDS, self._kill)
        patience.start()
        try:
            self.write(request)
            answer = self.listen()
            if isinstance(answer, dict):
                answer["asked"], answer["answered"] = begin, time.time()
            return self._why() if answer is None else answer
        finally:
            patience.cancel()

    def listen(self) -> Any:
        """The next answer; None when there will be none. A login shell's own lines are passed over."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(probe.MARK):
                return json.loads(line.removeprefix(probe.MARK))
        return None

    def wait(self) -> int:
        """Until it ends."""
        return self._process.wait()

    def close(self, wait_seconds: float = 2) -> None:
        """Let it end, which it does at the end of its input."""
        with contextlib.suppress(OSError):
            assert self._process.stdin
            self._process.stdin.close()
        if wait_seconds:
            try:
                self._process.wait(wait_seconds)
            except subprocess.TimeoutExpired:
                self._kill()
                self._process.wait()
            self._reader.join(1)
            for pipe in (self._process.stdout, self._process.stderr):
                if pipe:
                    pipe.close()

    def complaint(self) -> str:
        """The last line of standard error, once the conversation has ended."""
        self._reader.join(_WORDS_SECONDS)
        return next(reversed(self._complaints), "")

    def _kill(self) -> None:
        """With what ssh has started, such as a ProxyCommand, which would hold its pipes open."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def write(self, value: object) -> None:
        """Send a line."""
        with contextlib.suppress(OSError):  # it has ended; why, the answer says
            assert self._process.stdin
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def _read_complaints(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            if line.strip():
                self._complaints.append(line.strip())

    def _why(self) -> str:
        """In words: no connection (ssh says 255), no such Python there (127), or what was last heard."""
        status = self._process.wait()
        heard = self.complaint()
        if status < 0:
            return f"no answer within {ANSWER_SECONDS:.0f} s"
        if status == 255 and not self.local:
            return _refusal(heard, self.name)
        if status in (126, 127):
            return (
                f"there is no {sys.executable}; install the same Python environment under the same path on every host"
            )
        return f"{heard or 'no answer'} (status {status} of {'python' if self.local else 'ssh'})"


def _refusal(heard: str, name: str) -> str:
    """What ssh said, and what to do."""
    for pattern, advice in {
        "resolve": "is the name spelled right, and known here or in ~/.ssh/config?",
        "Permission denied": f"`ssh {name} true` must work without a password: ssh-copy-id {name}",
        "Host key verification": f"run `ssh {name}` once and accept its key, if it is the right one",
        "refused": "does an ssh server run there, and on the port of ~/.ssh/config?",
        "timed out": "is it switched on, and not behind a firewall?",
    }.items():
        if pattern in heard:
            return f"{heard}; {advice}"
    return heard or "ssh does not connect"


def connect_all(hosts: Sequence[Host | None]) -> list[Session]:
    """A session with each, all begun at once."""
    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return list(pool.map(Session, hosts))


def ask_all(sessions: Sequence[Session], request: Mapping[str, Any]) -> list[Any]:
    """Ask all the same, at once."""
    with ThreadPoolExecutor(max(1, len(sessions))) as pool:
        return list(pool.map(lambda session: session.ask(request), sessions))


def _is_here(name: str) -> bool:
    """Whether the name leads to an address of this machine; only such an address can be listened on."""
    try:
        addresses = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, address in addresses:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as attempt:
            attempt.bind(address)
            return True
    return False
