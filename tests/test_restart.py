"""Jobs that fail are started again from their last checkpoint, while that gets them further."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from distprop import checkpoint, launch, restart
from distprop.comm import SoloCommunicator
from distprop.hosts import HostsError
from distprop.launcher import Launcher, LaunchError
from distprop.restart import Attempt, hosts_left, run_restarting
from distprop.stopping import REPORT, Report, Watch
from test_launch import Jobs, await_job, finish, jobs, needs_mpi, nothing_said  # noqa: F401 - two are fixtures
from test_resume import dataset, lines, make_trainer

# ------------------------------------------------------------------------------ the policy, on jobs played by Python

FAKE = """
import os, signal, sys
from pathlib import Path
from distprop.stopping import REPORT, Report
report, notes = Report(os.environ[REPORT]), Path(sys.argv[1], "notes")
before = notes.read_text().splitlines() if notes.exists() else []
notes.write_text("\\n".join([*before, os.environ.get("DISTPROP_RESUME", "-")]))
what, _, step = sys.argv[2:][len(before)].partition(" ")
if step:
    report.began(Path("run"), 0)
    report.reached(Path("run"), int(step))
os.kill(os.getpid(), signal.SIGKILL) if what == "killed" else sys.exit(int(what))
"""


class Player:
    """Jobs that do what a list says, one entry an attempt: the exit status, and the step of a checkpoint."""

    def __init__(self, folder: Path, *attempts: str) -> None:
        self.folder, self.attempts = folder, attempts
        self.planned: list[Attempt] = []

    def job(self, ranks: int) -> launch.Job:
        command = (sys.executable, "-c", FAKE, str(self.folder), *self.attempts)
        return launch.Job(ranks, command, {}, "", launcher=Launcher(Path("mpiexec"), "mpich", "4"))

    def plan(self, attempt: Attempt) -> launch.Job:
        self.planned.append(attempt)
        return self.job(attempt.ranks)

    def play(self, max_restarts: int, **options) -> int:
        return run_restarting(self.job(4), self.plan, max_restarts=max_restarts, **options)

    def resumed(self) -> list[str]:
        return (self.folder / "notes").read_text().splitlines()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "_LONGEST_PAUSE", 0.01)


def test_each_restart_that_gets_further_may_be_followed_by_another(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    player = Player(tmp_path, "killed 10", "1 20", "1 20", "1 30", "0 40")
    assert player.play(9) == 0
    assert player.resumed() == ["-", "1", "1", "1", "1"]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 4
    run = Path("run").resolve()
    assert said[0] == (
        f"distprop: a rank was ended by SIGKILL after its checkpoint of step 10 in {run}; restart 1 of 9 in 0 s"
    )
    assert said[1].startswith("distprop: the job failed with status 1 after its checkpoint of step 20 in ")


@pytest.mark.parametrize("attempts", [("1", "1", "0"), ("1 10", "1 10", "1", "0"), ("1 10", "1 5", "1 10", "0")])
def test_two_attempts_in_a_row_without_a_newer_checkpoint_are_the_last(
    attempts: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    player = Player(tmp_path, *attempts)
    assert player.play(9) == 1
    assert len(player.resumed()) == len(attempts) - 1
    assert "giving up: two attempts in a row ended without a newer checkpoint" in capfd.readouterr().err


def test_the_number_of_restarts_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    player = Player(tmp_path, "1 10", "1 20", "3 30", "0")
    assert player.play(2) == 3
    assert "status 3 after its checkpoint of step 30 in" in (said := capfd.readouterr().err)
    assert "giving up: that was the last of 2 restarts" in said


@pytest.mark.parametrize("status", [0, 2, 75])
def test_what_is_no_failure_is_not_restarted(status: int, tmp_path: Path) -> None:
    player = Player(tmp_path, f"{status} 10", "1")
    assert player.play(3) == status
    assert player.planned == []


def test_an_attempt_before_training_is_repeated_as_it_was(tmp_path: Path) -> None:
    """Or a restart would resume another run, into whose folder the first attempt was refused to write."""
    player = Player(tmp_path, "1", "0 10")
    assert player.play(1) == 0
    assert player.resumed() == ["-", "-"]


def test_no_restart_after_the_time_is_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    player = Player(tmp_path, "1 10", "0")
    restart._LONGEST_PAUSE = 1.0
    assert player.play(3, max_time=1.0) in (1, 143)  # 143 if it has not even failed yet
    assert "--max-time is over" in capfd.readouterr().err


def test_a_host_that_is_gone_takes_its_ranks_with_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    player = Player(tmp_path, "1 10", "1 20", "0 30")
    answers = iter([True, False, True, True])  # b is back for the second restart
    status = player.play(3, hosts={"a": 2, "b": 2}, answers=lambda host: next(answers))
    assert status == 0
    assert [(attempt.ranks, dict(attempt.hosts)) for attempt in player.planned] == [
        (2, {"a": 2}),
        (4, {"a": 2, "b": 2}),
    ]
    assert "restart 1 of 3 in 0 s on 2 ranks, those of a" in capfd.readouterr().err


def test_without_any_host_it_gives_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    player = Player(tmp_path, "1 10", "0")
    assert player.play(3, hosts={"a": 2, "b": 2}, answers=lambda host: False) == 1
    assert "giving up: none of a, b answers" in capfd.readouterr().err


def test_the_pauses_of_a_job_that_goes_on_for_months_can_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(range(1, 1200))

    def run(job: launch.Job, watch: Watch, supervise: bool) -> int:
        report, run_dir, step = Report(watch.environment()[REPORT]), Path("run"), next(steps)
        (report.reached if step > 1 else report.began)(run_dir, step)
        return int(step < 1100)

    monkeypatch.setattr(restart, "run", run)
    monkeypatch.setattr(restart, "_LONGEST_PAUSE", 0.0)
    job = launch.Job(4, (), {}, "")
    assert run_restarting(job, lambda attempt: job, max_restarts=10_000) == 0
    assert next(steps) == 1101


def test_slurms_signal_before_a_restart_has_the_job_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pause = SimpleNamespace(time=time.time, sleep=lambda seconds: os.kill(os.getpid(), signal.SIGUSR1))
    monkeypatch.setattr(restart, "time", pause)
    before, told = signal.getsignal(signal.SIGUSR1), []
    player = Player(tmp_path, "1 10", "0")
    assert player.play(2, stopped=told.append) == 75
    assert (told, len(player.resumed())) == ([True], 1)
    assert "SIGUSR1: there is no time for a restart" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("error", [LaunchError("90 MiB of memory are free"), HostsError("b has another Python")])
def test_an_attempt_that_cannot_be_started_is_the_last(
    error: Exception, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def plan(attempt: Attempt) -> launch.Job:
        raise error

    status = run_restarting(Player(tmp_path, "3 10").job(4), plan, max_restarts=2)
    assert (status, capfd.readouterr().err.splitlines()[-1]) == (3, f"distprop: giving up: {error}")


def test_hosts_with_more_slots_than_ranks_keep_the_ranks() -> None:
    assert hosts_left({"a": 4, "b": 2}, 4, lambda host: host == "a") == ({"a": 4}, 4)
    assert hosts_left({}, 4, lambda host: False) == ({}, 4)


# ---------------------------------------------------------------------------------------------------------- real jobs

SCRIPT = """
sys.path.insert(0, {tests!r})
import distprop as dp
from pathlib import Path
from test_resume import dataset, make_trainer

comm, run_dir = dp.world(), Path(sys.argv[1])
def die(result):
    if comm.rank == comm.size - 1 and result.step in map(int, sys.argv[2:]):
        mark = run_dir.parent / f"died-at-{{result.step}}"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
trainer = make_trainer(comm, run_dir, callbacks=[die])  # resume is False
print("from step", trainer.step)
trainer.fit(dataset(), epochs=4, validation=dataset())
"""


def start(jobs: Jobs, ranks: int, *arguments: str):  # noqa: F811
    script = jobs.write(SCRIPT.format(tests=str(Path(__file__).parent)))
    options = ["--max-restarts", "2", "-n", str(ranks)]
    return jobs.start("-m", "distprop.cli", "run", *options, script, str(jobs.folder / "run"), *arguments)


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=needs_mpi)])
def test_a_killed_rank_costs_nothing_but_time(ranks: int, jobs: Jobs) -> None:  # noqa: F811
    with start(jobs, ranks, "12", "24") as process:
        done = finish(process, seconds=90)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"ended by SIGKILL after its checkpoint of .*; restart \d of 2 in \d s", done.stderr)) == 2
    resumed = sorted(map(int, re.findall(r"from step (\d+)", done.stdout)))  # MPICH says more there
    assert resumed[:ranks] == [0] * ranks
    assert 5 <= resumed[ranks] <= 11
    assert 15 <= resumed[-1] <= 23

    whole = make_trainer(SoloCommunicator(), jobs.folder / "whole")
    whole.fit(dataset(), epochs=4, validation=dataset())
    found = checkpoint.newest(jobs.folder / "run" / "checkpoints", pytest.fail)
    assert found.step == 28
    for name, array in whole.model.state_dict().items():
        assert array.tobytes() == found.tensors["model"][name].tobytes()
    assert lines(jobs.folder / "run") == lines(jobs.folder / "whole")


@needs_mpi
def test_a_failure_before_the_first_checkpoint_is_tried_once_more(jobs: Jobs) -> None:  # noqa: F811
    with start(jobs, 2, "1", "2") as process:
        done = finish(process, seconds=60)
    assert done.returncode == 137, done.stderr
    assert "restart 1 of 2" in done.stderr
    assert "before its first checkpoint; giving up: two attempts in a row" in done.stderr


@needs_mpi
def test_a_job_that_the_user_ends_is_not_restarted(jobs: Jobs) -> None:  # noqa: F811
    ready = jobs.folder / "ready"
    script = jobs.write("open(sys.argv[1], 'w').close(); time.sleep(60)")
    with jobs.start("-m", "distprop.cli", "run", "--max-restarts", "3", "-n", "2", script, str(ready)) as process:
        await_job(process, ready.exists)
        process.send_signal(signal.SIGTERM)
        done = finish(process, seconds=20)
    assert done.returncode == 143
    assert "restart" not in done.stderr


CONFIG = """
[data]
name = "digits"
[train]
epochs = 6
batch_size = 32
deterministic = true
checkpoint_every = 20
"""


# Python runs it before anything else: it ends rank 1 at the first checkpoint, before the job can come to its end.
SITECUSTOMIZE = """
import glob, os, signal, threading, time
def die():
    while not glob.glob("runs/job-2/checkpoints/step-*"):
        time.sleep(0.001)
    open("died", "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
if (os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK")) == "1" and not os.path.exists("died"):
    threading.Thread(target=die, daemon=True).start()
"""


@needs_mpi
def test_distprop_train_goes_on_in_the_same_folder(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(jobs.folder)
    Path("job.toml").write_text(CONFIG)
    arguments = ["-m", "distprop.cli", "train", "-n", "2", "--max-restarts", "1", "job.toml"]
    Path("runs/job").mkdir(parents=True)  # taken, so the run goes to runs/job-2
    Path("sitecustomize.py").write_text(SITECUSTOMIZE)
    path = f"{jobs.folder}{os.pathsep}{os.environ['PYTHONPATH']}"
    with jobs.start(*arguments, PYTHONPATH=path) as process:
        done = finish(process, seconds=60)
    assert done.returncode == 0, done.stderr
    assert "restart 1 of 1" in done.stderr
    assert sorted(path.name for path in Path("runs").iterdir()) == ["job", "job-2"]
    steps = [line["step"] for line in lines(Path("runs/job-2")) if "lr" in line]
    assert steps == list(range(1, 6 * 45 + 1))


def test_restarts_are_the_launchers_business(tmp_path: Path, jobs: Jobs) -> None:  # noqa: F811
    config = tmp_path / "job.toml"
    config.write_text(CONFIG)
    with jobs.start("-m", "distprop.cli", "train", "--max-restarts", "1", str(config)) as process:
        done = finish(process)
    assert done.returncode == 2
    assert "give -n N too" in done.stderr
