"""Faults in real jobs, under whichever MPI this Python has.

Whatever goes wrong on a rank, the job ends with one message that says what and where, no process is left behind, and
the last checkpoint is one to resume from.

The resumed run must end in the bits of the run without a fault, so nothing that the fault did is in the checkpoint.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import distprop as dp
from distprop import checkpoint
from distprop.comm import SoloCommunicator
from faults import job
from test_launch import Jobs, finish, finish_bare, jobs, needs_mpi, nothing_said, wait_until  # noqa: F401 - fixtures

SCRIPT = str(Path(job.__file__))
RANK, STEP, TIMEOUT_SECONDS = 1, 7, 6
DETECTION_SECONDS = 20

pytestmark = needs_mpi

# What the faulty rank is told to do; the phase and the reason that the message gives. Of the other two, the
# one that has waited longest is named: which of them that is depends on the machine.
FAULTS = {
    "raises": ("forward pass", "ValueError: boom"),
    "raises in a thread": ("forward pass", "ValueError: boom"),
    "is killed": ("forward pass", "killed by SIGKILL"),
    "is stopped": (
        "forward pass",
        "is stopped .SIGSTOP. and does not answer, while rank [02] waits in collective .*6 s",
    ),
    "hangs": (
        "forward pass",
        r"no progress for ([6-9]|\d\d) s, while rank [02] waits in collective .* the limit is 6 s",
    ),
    "exits": ("end", r"has come to the end of its script or called sys\.exit\(\), while rank [02] waits for it"),
    "runs out of memory": ("forward pass", r"(numpy\..*)?\w*MemoryError"),
    "has a NaN gradient": ("reduction", "a gradient is not finite on rank 1 on .*, parameter 0.weight first"),
    "changes a parameter": ("checkpoint", "the first difference is at step 7, layer 2.weight, rank 1"),
    "calls in another order": ("callbacks", "called allgather as collective .*, where ranks 0, 2 called barrier"),
    "evaluates alone": ("evaluation", "called allgather as collective .*, where ranks 0, 2 called "),
}


def start(jobs: Jobs, ranks: int, *arguments: str, bare: bool = False, **environment: str):  # noqa: F811
    run = ["-m", "distprop", "run", "-n", str(ranks)]
    if not bare:
        return jobs.start(*run, SCRIPT, str(jobs.folder / "run"), *arguments, **environment)
    show = [sys.executable, *run, "--dry-run", SCRIPT, str(jobs.folder / "run")]
    line = subprocess.run(show, capture_output=True, text=True, check=True, timeout=60).stdout
    words = shlex.split(line.replace(" -m distprop.rank", ""))
    starter = "import os, sys; os.execvp('env', ['env', *sys.argv[1:]])"
    return jobs.start("-c", starter, *words, *arguments, **environment)


@functools.cache
def result_without_a_fault() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        dp.manual_seed(0)
        trainer = job.make_trainer(job.Model(), Path(folder), SoloCommunicator())
        trainer.fit(job.dataset(), steps=job.STEPS)
        return b"".join(array.tobytes() for array in trainer.model.state_dict().values())


def check_ended_well(jobs: Jobs, done: subprocess.CompletedProcess[str], fault: str, seconds: float) -> None:  # noqa: F811
    """All that must be true after any fault; `seconds` are those since the fault."""
    assert done.returncode != 0, done.stderr
    limit = DETECTION_SECONDS if fault not in ("is stopped", "hangs") else TIMEOUT_SECONDS + DETECTION_SECONDS / 2
    assert seconds < limit, done.stderr
    phase, reason = FAULTS[fault]
    step = STEP + 1 if fault == "changes a parameter" else STEP  # found before the checkpoint of step 8
    reports = re.findall(r"^distprop: .*; ending the job$", done.stderr, re.M)
    assert len(reports) == 1, done.stderr
    host = re.escape(os.uname().nodename)
    assert re.search(rf"rank {RANK} of 3 on {host}, step {step}, {phase}: .*{reason}", reports[0]), done.stderr
    rings = re.findall(r"^  rank (\d), step \d+, [\w ]+: \d+ \w+ [\d,]+;", done.stderr, re.M)
    assert rings == ["0", "1", "2"], done.stderr
    assert not jobs.left()


def check_resumes(jobs: Jobs, ranks: int) -> None:  # noqa: F811
    run_dir = jobs.folder / "run"
    last = checkpoint.newest(run_dir / "checkpoints", pytest.fail)
    assert last is not None
    assert last.step in (STEP - 3, STEP - 1)  # a checkpoint is written while training goes on
    with start(jobs, ranks) as process:
        resumed = finish(process, seconds=100)
    assert resumed.returncode == 0, resumed.stderr
    final = checkpoint.newest(run_dir / "checkpoints", pytest.fail)
    assert final is not None
    assert final.step == last.step + job.STEPS or final.step == job.STEPS
    names = job.Model().state_dict()
    assert b"".join(final.tensors["model"][name].tobytes() for name in names) == result_without_a_fault()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_job_in_which_a_rank(fault: str, jobs: Jobs) -> None:  # noqa: F811
    (jobs.folder / "run").mkdir()
    with start(jobs, 3, fault, str(RANK), str(STEP), DISTPROP_TIMEOUT=str(TIMEOUT_SECONDS)) as process:
        done = finish(process, seconds=100)
    seconds = time.time() - float((jobs.folder / "run/fault").read_text())
    check_ended_well(jobs, done, fault, seconds)
    check_resumes(jobs, 2)


@pytest.mark.parametrize("fault", ["exits", "is stopped"])
def test_a_bare_mpirun_ends_when_a_rank(fault: str, jobs: Jobs) -> None:  # noqa: F811
    (jobs.folder / "run").mkdir()
    with start(jobs, 3, fault, str(RANK), str(STEP), bare=True, DISTPROP_TIMEOUT=str(TIMEOUT_SECONDS)) as process:
        done = finish_bare(process, jobs, seconds=100)
    seconds = time.time() - float((jobs.folder / "run/fault").read_text())
    assert wait_until(lambda: not jobs.left())  # its launcher does not wait until the ranks that it kills are gone
    check_ended_well(jobs, done, fault, seconds)


def test_a_slow_rank_is_reported_and_not_killed(jobs: Jobs) -> None:  # noqa: F811
    (jobs.folder / "run").mkdir()
    with start(jobs, 4, "is slow", "2", "3") as process:
        done = finish(process, seconds=100)
    assert done.returncode == 0, done.stderr
    reports = re.findall(r"distprop: rank \d on .* is slow: .*", done.stderr)
    assert len(reports) == 1, done.stderr
    assert re.match(
        r"distprop: rank 2 on \S+ is slow: \d+\.\d ms a step of its own, .*\(step \d+; said once\)", reports[0]
    )
