"""The programs that `compare.py` starts: those that take turns, and those that run to their end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
LIMIT_SECONDS = 170  # for an answer
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
LAUNCHERS = {
    ("torch", 1): [],
    ("distprop", 1): ["-m", "distprop", "run", "-n", "1"],
    ("torch", 2): ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    ("distprop", 2): ["-m", "distprop", "run", "-n", "2"],
}


class ProgramError(RuntimeError):
    """A program failed: why, and all it said. `last_line` is the last that names an error, or else why."""

    def __init__(self, command: list[str], why: str, output: str) -> None:
        super().__init__(f"{' '.join(command)} {why}:\n{output}")
        self.last_line = next((line for line in reversed(output.splitlines()) if "Error" in line), why)


class Program:
    """Training in one of the libraries on 1 or 2 ranks: it makes its first steps, and then waits for its turns.

    Each rank connects to a socket of this process, sends what it measured at its first steps as a line of JSON, null
    but for rank 0, and waits there: a rank that waited in MPI would use its processor. To a line such as "steps 40" it
    answers with a number. Leaving the context ends the program; it can be entered once.

    Attributes:
        first: what it measured at its first steps.

    Raises:
        ProgramError: on entering or in a turn, it has ended or gave no answer in time.
    """

    def __init__(self, library: str, ranks: int, job: dict[str, Any], **environment: str) -> None:
        self._command, self._ranks, self._environment = command_of(library, ranks, job), ranks, environment
        self._resources = ExitStack()
        self._channels: list[IO[str]] = []

    def __enter__(self) -> Program:
        print(" ".join(self._command[1:]), file=sys.stderr, flush=True)
        with self._resources as resources:
            folder = Path(resources.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))  # a socket's path is short
            self._output = resources.enter_context((folder / "output").open("w+"))
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(folder / "turns"))
                listener.listen()
                listener.settimeout(0.1)
                environment = {"COMPARE_TURNS": str(folder / "turns"), **self._environment}
                self._process = resources.enter_context(started(self._command, environment, self._output))
                resources.callback(self._hang_up)
                self._connect(listener)
            answers = [self._answer(channel) for channel in self._channels]
            self.first = next(answer for answer in answers if answer)  # rank 0's
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def turn(self, what: str, count: int) -> float:
        """Let it do `count` "steps" or "products"; the median seconds of one on the slowest rank."""
        for channel in self._channels:
            try:
                channel.write(f"{what} {count}\n")
                channel.flush()
            except OSError:
                raise self._error() from None
        return max(self._answer(channel) for channel in self._channels)

    def _connect(self, listener: socket.socket) -> None:
        limit = time.monotonic() + LIMIT_SECONDS
        while len(self._channels) < self._ranks:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                if self._process.poll() is not None or time.monotonic() > limit:
                    raise self._error() from None
                continue
            with connection:
                connection.settimeout(LIMIT_SECONDS)
                self._channels.append(connection.makefile("rw"))

    def _answer(self, channel: IO[str]) -> Any:
        try:
            line = channel.readline()
        except OSError:  # no answer in time, or the rank has ended
            line = ""
        if not line.endswith("\n"):
            raise self._error()
        return json.loads(line)

    def _hang_up(self) -> None:
        """Every rank that waits for its turn ends."""
        for channel in self._channels:
            with suppress(OSError):  # what a rank that has ended did not read
                channel.close()

    def _error(self) -> ProgramError:
        """Give the program time to say why; a launcher that is ended at once says that it was."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        status = self._process.poll()
        end(self._process)
        self._output.seek(0)
        why = f"gave no answer within {LIMIT_SECONDS} s" if status is None else f"ended with status {status}"
        return ProgramError(self._command, why, self._output.read())


def command_of(library: str, ranks: int, job: dict[str, Any]) -> list[str]:
    """The command that trains in this library on so many ranks."""
    return [sys.executable, *LAUNCHERS[library, ranks], str(HERE / f"train_{library}.py"), json.dumps(job)]


def run_for_json(command: list[str]) -> Any:
    """What the command prints on its last line.

    Raises:
        ProgramError: it failed, or took longer than allowed.
    """
    print(" ".join(command[1:]), file=sys.stderr, flush=True)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        with started(command, {}, output, errors) as process, suppress(subprocess.TimeoutExpired):
            process.wait(LIMIT_SECONDS)
        for file in (output, errors):
            file.seek(0)
        lines = output.read().splitlines()
        if process.returncode or not lines:
            raise ProgramError(command, f"failed or took over {LIMIT_SECONDS} s", errors.read())
        return json.loads(lines[-1])


@contextmanager
def started(
    command: list[str], environment: dict[str, str], output: IO[str], errors: IO[str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A program that knows when it was started, until the context ends; its errors go to its output unless told."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    wanted = {**os.environ, **ONE_THREAD, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        command,
        env={**wanted, "COMPARE_BEGAN": repr(time.time())},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors or subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait 5 s for the program to end by itself, then end it; launchers take up to 30 s to end their ranks."""
    for stop, seconds in ((None, 5), (process.terminate, 40), (process.kill, None)):
        if stop:
            stop()
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return
