"""The programs that `compare.py` starts: those that take turns, and those that run to their end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
LIMIT_SECONDS = 170  # for an answer
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
LAUNCHERS = {
    ("torch", 1): [],
    ("distprop", 1): [],
    ("torch", 2): ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    ("distprop", 2): ["-m", "distprop", "run", "-n", "2"],
}


class ProgramError(RuntimeError):
    """A program failed; `last_line` is what it said last."""

    def __init__(self, command: list[str], output: str) -> None:
        lines = output.strip().splitlines()
        super().__init__(f"{' '.join(command)} failed:\n{output}")
        self.last_line = next(
            (line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output"
        )


class Program:
    """Training in one of the libraries on 1 or 2 ranks: it makes its first steps, and then waits for its turns.

    Each rank connects to a socket of this process and waits there: a rank that waited in MPI would use its processor.
    Leaving the context ends the program.

    Attributes:
        first: what it measured at its first steps.
    """

    def __init__(self, library: str, ranks: int, job: dict[str, Any], **environment: str) -> None:
        self._command, self._ranks, self._environment = command_of(library, ranks, job), ranks, environment
        self._resources = ExitStack()
        self._channels: list[IO[str]] = []

    def __enter__(self) -> Program:
        print(" ".join(self._command[1:]), file=sys.stderr, flush=True)
        with self._resources as resources:
            folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
            self._output = resources.enter_context((folder / "output").open("w+"))
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(folder / "turns"))
                listener.listen()
                listener.settimeout(0.1)
                environment = {"COMPARE_TURNS": str(folder / "turns"), **self._environment}
                self._process = start(self._command, environment, self._output)
                resources.callback(end, self._process)
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
            channel.write(f"{what} {count}\n")
            channel.flush()
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
                self._channels.append(self._resources.enter_context(connection.makefile("rw")))

    def _answer(self, channel: IO[str]) -> Any:
        try:
            line = channel.readline()
        except OSError:  # no answer in time, or the rank has ended
            line = ""
        if not line:
            raise self._error()
        return json.loads(line)

    def _error(self) -> ProgramError:
        end(self._process)
        self._output.seek(0)
        return ProgramError(self._command, self._output.read())


def command_of(library: str, ranks: int, job: dict[str, Any]) -> list[str]:
    """The command that trains in this library on so many ranks."""
    return [sys.executable, *LAUNCHERS[library, ranks], str(HERE / f"train_{library}.py"), json.dumps(job)]


def run_for_json(command: list[str]) -> Any:
    """What the command prints on its last line."""
    print(" ".join(command[1:]), file=sys.stderr, flush=True)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = start(command, {}, output, errors)
        try:
            process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise ProgramError(command, f"no answer within {LIMIT_SECONDS} s") from None
        finally:
            end(process)
        for file in (output, errors):
            file.seek(0)
        if process.returncode:
            raise ProgramError(command, errors.read())
        return json.loads(output.read().splitlines()[-1])


def start(
    command: list[str], environment: dict[str, str], output: IO[str], errors: IO[str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program that knows when it was started; its errors go to its output unless told otherwise."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    wanted = {**os.environ, **ONE_THREAD, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        command,
        env={**wanted, "COMPARE_BEGAN": repr(time.time())},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors or subprocess.STDOUT,
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a program; torchrun and distprop run end their ranks. Nothing happens if it has ended."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
