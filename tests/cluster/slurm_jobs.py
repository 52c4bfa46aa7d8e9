"""What the tests on Slurm hold on to: batch jobs in a folder of the test, with what they wrote."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parent.parent.parent
SBATCH = ROOT / "launch/slurm.sbatch"
LIMIT_SECONDS = 240.0  # for one thing to happen; other jobs may be in the queue


@dataclass(frozen=True)
class Batch:
    """Submits jobs that run in `folder` with the Python environment of `python`."""

    folder: Path
    python: Path
    submitted: list[str] = field(default_factory=list)

    def submit(self, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> Job:
        """`sbatch` with its options, a script and the script's arguments."""
        path = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        command = ["sbatch", "--parsable", "--nodes=2", *options, *arguments]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**clean_environment(), "PATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        number = done.stdout.strip()
        self.submitted.append(number)
        return Job(number, self.folder)

    def run(self, *lines: str, options: tuple[str, ...] = ()) -> str:
        """The output of a batch script of these lines, once it has ended."""
        script = self.folder / f"batch-{len(self.submitted)}.sh"
        script.write_text("\n".join(["#!/bin/bash", *lines, "echo over", ""]))
        job = self.submit(str(script), options=options)
        job.wait_for(lambda: job.output().endswith("over\n"), "the batch script's end")
        return job.output()

    def cancel(self) -> None:
        for number in self.submitted:
            subprocess.run(["scancel", number], capture_output=True, timeout=60)


@dataclass(frozen=True)
class Job:
    """A batch job by its number, or an array's task by "12_3"."""

    number: str
    folder: Path

    def output(self) -> str:
        path = self.folder / f"slurm-{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def show(self) -> str:
        done = subprocess.run(["scontrol", "show", "job", self.number], capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def says(self, name: str) -> str:
        """A field of `scontrol show job`, such as JobState."""
        found = re.search(rf"\b{name}=(\S*)", self.show())
        return found[1] if found else ""

    def wait_for(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not happened():
            if time.monotonic() > deadline:
                self.fail(f"waited {LIMIT_SECONDS:.0f} s for {what}")
            time.sleep(0.2)

    def wait_for_output(self, text: str) -> None:
        self.wait_for(lambda: text in self.output() or self._is_over(), repr(text))
        if text not in self.output():
            self.fail(f"it ended without {text!r}")

    def finish(self, state: str = "COMPLETED") -> str:
        """Its whole output, once it has ended, as it should."""
        self.wait_for(self._is_over, "its end")
        if self.says("JobState") != state:
            self.fail(f"it should have ended as {state}")
        return self.output()

    def update(self, setting: str) -> None:
        """Change what `scontrol update job` can, such as its TimeLimit, which only operators of Slurm may raise."""
        command = ["scontrol", "update", f"jobid={self.number}", setting]
        subprocess.run(command, capture_output=True, timeout=60)

    def start_again(self, *settings: str) -> None:
        """Once it is back in the queue: with these settings and now, where Slurm leaves it for two minutes."""
        self.wait_for(lambda: self.says("JobState") == "PENDING", "its return into the queue")
        time.sleep(2)  # a node refuses to start a job that it has killed in the same second

        def has_begun() -> bool:
            if self.says("JobState") == "PENDING":  # and perhaps still ending, which makes Slurm forget the time
                for setting in (*settings, "StartTime=now"):
                    self.update(setting)
            return self.says("JobState") not in ("PENDING", "COMPLETING")

        self.wait_for(has_begun, "its next start")

    def fail(self, what: str) -> NoReturn:
        pytest.fail(f"job {self.number}: {what}\n{self.show()}\n{self.output()}", pytrace=False)

    def _is_over(self) -> bool:
        return self.says("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def clean_environment() -> dict[str, str]:
    """Without what would make a job other than the tests mean it."""
    unwanted = ("SLURM_", "SBATCH_", "OMPI_", "PMI", "DISTPROP_", "OPENBLAS_NUM", "OMP_NUM", "MKL_NUM")
    return {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
