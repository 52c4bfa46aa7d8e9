"""Jobs that are asked to stop write a checkpoint, leave with status 75, and go on from there to the same bits."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import distprop as dp
from distprop import checkpoint, launch, stopping
from distprop.comm import SoloCommunicator, run_threads
from distprop.comm.mpi import library
from test_launch import Jobs, await_job, await_said, finish, jobs, needs_mpi, nothing_said  # noqa: F401 - two are fixtures
from test_resume import dataset, lines, make_trainer, parameters

STEPS = 28  # of 4 epochs


def at_step(step: int, action: Callable[[], object]) -> Callable[[dp.StepResult], None]:
    return lambda result: action() if result.step == step else None


def assert_resumes_to_the_same_bits(run_dir: Path, tmp_path: Path) -> None:
    whole = make_trainer(SoloCommunicator(), tmp_path / "whole")
    whole.fit(dataset(), epochs=4, validation=dataset())
    resumed = make_trainer(SoloCommunicator(), run_dir, resume=True)
    assert 0 < resumed.step < STEPS
    resumed.fit(dataset(), epochs=4, validation=dataset())
    assert resumed.step == STEPS
    assert parameters(resumed) == parameters(whole)
    assert lines(run_dir) == lines(tmp_path / "whole")


# --------------------------------------------------------------------------------------------------- in this process


@pytest.mark.parametrize("at", [3, 7, 13, 21])  # 7 is the last step of an epoch, before it is evaluated
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_after_a_step_with_a_checkpoint(
    number: signal.Signals, at: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    ask = at_step(at - 1, lambda: signal.raise_signal(number))  # it is told with the gradients of the next step
    trainer = make_trainer(SoloCommunicator(), tmp_path / "run", checkpoint_every=1000, callbacks=[ask])
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(dataset(), epochs=4, validation=dataset())
    assert stopped.value.code == 75
    assert signal.getsignal(number) is before
    message = f"distprop: {number.name}: stopped after step {at}; its checkpoint is in {tmp_path / 'run'}; resume=True"
    assert message in capsys.readouterr().err
    assert_resumes_to_the_same_bits(tmp_path / "run", tmp_path)


def test_how_to_go_on_names_the_folder_of_a_run_of_distprop_train(tmp_path: Path) -> None:
    assert stopping.stop_message(["SIGTERM"], 3, 3, tmp_path).endswith("; resume=True goes on from there")
    (tmp_path / "config.toml").touch()
    command = f"distprop train {tmp_path / 'config.toml'} --resume"
    assert stopping.stop_message(["SIGTERM"], 3, 3, tmp_path).endswith(f"; {command} goes on from there")


@pytest.mark.parametrize("options", [{"deterministic": False}, {"shards": 4}, {"shards": 1}, {"shards": 2}], ids=str)
@pytest.mark.parametrize("asked", [0, 1, 2])
def test_one_rank_is_asked_and_all_stop_at_the_same_step(
    asked: int, options: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if it is a rank that has no shard, whose gradients' message would carry the wish."""
    steps: list[int] = []

    def train(comm: dp.comm.Communicator) -> None:
        def ask(result: dp.StepResult) -> None:
            if result.step == 4 and comm.rank == asked:
                trainer._stop_request._note(signal.SIGUSR1, None)

        trainer = make_trainer(comm, tmp_path, callbacks=[ask], **options)
        with pytest.raises(stopping.StoppedError):
            trainer.fit(dataset(), epochs=4)
        steps.append(trainer.step)

    run_threads(3, train)
    assert steps == [5, 5, 5]
    assert f"distprop: SIGUSR1 on rank {asked}: stopped after step 5" in capsys.readouterr().err
    assert checkpoint.newest(tmp_path / "checkpoints", pytest.fail).step == 5


def test_without_checkpoints_it_says_that_nothing_was_saved(capsys: pytest.CaptureFixture[str]) -> None:
    ask = at_step(2, lambda: signal.raise_signal(signal.SIGTERM))
    trainer = make_trainer(SoloCommunicator(), None, checkpoint_every=None, callbacks=[ask])
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(dataset(), epochs=1)
    assert stopped.value.code == 75
    assert "stopped after step 3; nothing was saved" in capsys.readouterr().err


def test_without_checkpoints_ctrl_c_is_pythons_own() -> None:
    interrupt = at_step(2, lambda: signal.raise_signal(signal.SIGINT))
    trainer = make_trainer(SoloCommunicator(), None, checkpoint_every=None, callbacks=[interrupt])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(dataset(), epochs=1)


def test_a_checkpoint_that_cannot_be_written_is_not_promised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = at_step(6, lambda: signal.raise_signal(signal.SIGTERM))
    trainer = make_trainer(SoloCommunicator(), tmp_path, callbacks=[ask])
    real = checkpoint._write_durably

    def full(path: Path, content: bytes) -> None:
        if "step-000000005" not in str(path):
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(checkpoint, "_write_durably", full)
    with pytest.raises(stopping.StoppedError):
        trainer.fit(dataset(), epochs=1)
    assert "its checkpoint could not be written to" in (said := capsys.readouterr().err)
    assert "the newest is that of step 5" in said


def test_a_handler_of_the_users_own_stays(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        send = at_step(2, lambda: signal.raise_signal(signal.SIGUSR1))
        trainer = make_trainer(SoloCommunicator(), tmp_path, callbacks=[send])
        trainer.fit(dataset(), epochs=1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]
    assert trainer.step == 7


def test_other_threads_leave_signals_alone(tmp_path: Path) -> None:
    found: list[object] = []
    trainer = make_trainer(
        SoloCommunicator(),
        tmp_path,
        callbacks=[at_step(2, lambda: found.append(signal.getsignal(signal.SIGTERM)))],
    )
    thread = threading.Thread(target=trainer.fit, args=(dataset(),), kwargs={"epochs": 1})
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


@pytest.mark.parametrize("at", [6, 7])  # told with the last step, or after it
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_at_the_very_end_is_obeyed_when_all_is_done(
    number: signal.Signals, at: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = at_step(at, lambda: signal.raise_signal(number))
    trainer = make_trainer(SoloCommunicator(), tmp_path, callbacks=[ask])
    with pytest.raises(stopping.StoppedError):
        trainer.fit(dataset(), steps=7, validation=dataset())
    assert f"distprop: {number.name}: stopped after step 7; its checkpoint is in {tmp_path}" in capsys.readouterr().err
    resumed = make_trainer(SoloCommunicator(), tmp_path, resume=True)
    assert resumed.fit(dataset(), steps=7, validation=dataset()) == []
    assert any("validation_loss" in line for line in lines(tmp_path))


def test_a_signal_to_one_rank_during_the_last_evaluation_stops_all(tmp_path: Path) -> None:
    def train(comm: dp.comm.Communicator) -> None:
        trainer = make_trainer(comm, tmp_path)
        evaluate = trainer.evaluate

        def asked(dataset: dp.data.Dataset) -> dict[str, float]:
            if comm.rank == 1:
                trainer._stop_request._note(signal.SIGTERM, None)
            return evaluate(dataset)

        trainer.evaluate = asked
        with pytest.raises(stopping.StoppedError) as stopped:
            trainer.fit(dataset(), epochs=1, validation=dataset())
        assert stopped.value.message.startswith("SIGTERM on rank 1: stopped after step 7")

    run_threads(2, train)


def test_a_time_that_is_over_at_the_very_end_changes_nothing(tmp_path: Path) -> None:
    ask = at_step(6, lambda: setattr(trainer._stop_request, "reason", stopping.OUT_OF_TIME))
    trainer = make_trainer(SoloCommunicator(), tmp_path, callbacks=[ask])
    assert len(trainer.fit(dataset(), steps=7)) == 1


def test_open_mpis_announcement_of_sigterm_is_a_checkpoint_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    announce = at_step(2, lambda: signal.raise_signal(signal.SIGCONT))
    trainer = make_trainer(SoloCommunicator(), tmp_path, checkpoint_every=1000, callbacks=[announce])
    trainer.fit(dataset(), epochs=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000000003", "step-000000007"]


# ------------------------------------------------------------------------------------------------------- a time limit


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45", 45), ("0.5", 0.5), ("90s", 90), ("90m", 5400), ("1h30m", 5400), ("1d2h3m4s", 93784), (" 1h ", 3600)],
)
def test_a_time_is_written_as_seconds_or_with_units(text: str, seconds: float) -> None:
    assert stopping.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "-5", "0", "0m", "1h30", "30m1h", "1h1h", "1.5.2", "5 m", "h", "inf", "1e3", "366d", "9" * 400]
)
def test_what_is_no_time_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="a time"):
        stopping.parse_duration(text)
    if text:
        monkeypatch.setenv("DISTPROP_MAX_TIME", text)
        with pytest.raises(ValueError, match="DISTPROP_MAX_TIME: a time"):
            make_trainer(SoloCommunicator(), None, checkpoint_every=None)


def test_the_time_of_the_environment_stops_training_before_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISTPROP_MAX_TIME", "2")
    began = now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(stopping, "_STARTED", began)

    def slow(result: dp.StepResult) -> None:
        nonlocal now
        now += 0.1

    trainer = make_trainer(SoloCommunicator(), tmp_path / "run", callbacks=[slow], checkpoint_every=1000)
    with pytest.raises(stopping.StoppedError):
        trainer.fit(dataset(), epochs=4, validation=dataset())
    assert now - began < 2
    assert "the time is over: stopped after step" in capsys.readouterr().err
    monkeypatch.delenv("DISTPROP_MAX_TIME")
    assert_resumes_to_the_same_bits(tmp_path / "run", tmp_path)


@pytest.mark.parametrize("options", [{"deterministic": False, "accumulate": 2}, {"shards": 4}, {"shards": 1}], ids=str)
def test_a_rank_is_asked_once_a_step(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of several shards would else count as several short ones, for which too little time is left."""
    asked: list[float] = []
    monkeypatch.setattr(stopping.StopRequest, "numbers", lambda *_: asked.append(time.time()) or (0.0, 0.0))

    def train(comm: dp.comm.Communicator) -> None:
        make_trainer(comm, None, checkpoint_every=None, **options).fit(dataset(), steps=3)

    run_threads(2, train)
    assert len(asked) == 2 * 3


def test_time_is_left_for_the_longest_step_and_the_slowest_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setenv("DISTPROP_DEADLINE", "1100")
    request = stopping.StopRequest()
    assert request.numbers(True, 10) == (0, 0)
    now = 1015.0  # this step took 15 s
    assert request.numbers(True, 10) == (0, 0)
    for second in range(1016, 1049):  # 2 x 15 s for steps, 2 x 10 s for checkpoints and 1 s are left
        now = float(second)
        assert request.numbers(True, 10) == (0, 0)
    now = 1049.0
    assert request.numbers(False, 10) == (0, 0)  # another rank's clock does not count
    assert request.numbers(True, 10) == (1, 0)


# ---------------------------------------------------------------------------------------------------------- real jobs

SCRIPT = """
sys.path.insert(0, {tests!r})
import distprop as dp
from pathlib import Path
from test_resume import dataset, make_trainer

def slow(result):
    if result.step == 3 and comm.rank == 0:
        (run_dir.parent / "ready").touch()
    time.sleep(float(os.environ.get("SLOW", 0.05)) if result.step >= 3 else 0)
    if comm.rank == comm.size - 1 and result.step in (20, 26) and "SLOW" not in os.environ:
        request = trainer._stop_request  # nobody comes to the end before it, or all that Open MPI makes of it
        while not (request.reason or (result.step == 20 and request._save_now)):
            time.sleep(0.01)

comm, run_dir = dp.world(), Path(sys.argv[1])
(run_dir.parent / f"pid-{{comm.rank}}").write_text(str(os.getpid()))
every = None if "none" in sys.argv else 1000
trainer = make_trainer(comm, run_dir, checkpoint_every=every, callbacks=[slow])
trainer.fit(dataset(), epochs=4, validation=dataset())
print("trained", comm.rank)
"""


def command(how: str, ranks: int, *program: str) -> list[str]:
    """Arguments of Python that start the job under `distprop run`, or under the library's own launcher."""
    if how == "distprop run":
        return ["-m", "distprop.cli", "run", "-n", str(ranks), *program]
    planned = [word for word in launch.plan(ranks, program).command if word not in ("-m", "distprop.rank")]
    return ["-c", "import os, sys; os.execv(sys.argv[1], sys.argv[1:])", *planned]


def script(jobs: Jobs) -> str:  # noqa: F811
    return jobs.write(SCRIPT.format(tests=str(Path(__file__).parent)))


@needs_mpi
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("how", ["distprop run", "mpirun"])
def test_a_signal_to_the_job_writes_a_checkpoint(
    how: str,
    number: signal.Signals,
    jobs: Jobs,  # noqa: F811
) -> None:
    run_dir = jobs.folder / "run"
    with jobs.start(*command(how, 3, script(jobs), str(run_dir))) as process:
        await_job(process, (jobs.folder / "ready").exists)
        process.send_signal(number)
        done = finish(process, seconds=30)
    assert "trained" not in done.stdout
    if how == "mpirun" and library().vendor == "openmpi" and number != signal.SIGUSR1:
        assert done.returncode == 1  # whatever the ranks say; and their last message may be lost
    else:
        assert done.returncode == 75, done.stderr
        assert f"its checkpoint is in {run_dir}" in done.stderr
    assert_resumes_to_the_same_bits(run_dir, jobs.folder)


@needs_mpi
def test_a_signal_to_one_rank_stops_all(jobs: Jobs) -> None:  # noqa: F811
    run_dir = jobs.folder / "run"
    with jobs.start(*command("distprop run", 2, script(jobs), str(run_dir))) as process:
        await_job(process, (jobs.folder / "ready").exists)
        os.kill(int((jobs.folder / "pid-1").read_text()), signal.SIGUSR1)
        done = finish(process, seconds=30)
    assert done.returncode == 75
    assert "SIGUSR1 on rank 1: stopped after step" in done.stderr
    assert_resumes_to_the_same_bits(run_dir, jobs.folder)


@needs_mpi
def test_ctrl_c_twice_ends_at_once(jobs: Jobs) -> None:  # noqa: F811
    with jobs.start(*command("distprop run", 2, script(jobs), str(jobs.folder / "run")), SLOW="60") as process:
        await_job(process, (jobs.folder / "ready").exists)
        process.send_signal(signal.SIGINT)
        await_said(process, "SIGINT; the ranks write a checkpoint and stop; once more ends them at once")
        assert process.poll() is None  # the step has not ended
        process.send_signal(signal.SIGINT)
        done = finish(process, seconds=20)  # the step would take 60
    assert done.returncode == 130


def test_who_is_leaving_after_the_last_checkpoint_is_not_disturbed(
    jobs: Jobs,  # noqa: F811
) -> None:
    """Played by a launcher that would die of SIGTERM and of SIGUSR1."""
    source = """
    from distprop import launch, stopping
    from distprop.launcher import Launcher
    watch = stopping.Watch(sys.argv[1])
    stopping.Report(watch._path).state(stopping.LEAVING)
    leave = "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\\ntime.sleep(0.5); sys.exit(75)"
    command = (sys.executable, "-c", f"import os, sys, time; print('ready', flush=True)\\n{leave}", sys.argv[2])
    launcher = Launcher("mpiexec", "mpich", "4.3.2")
    sys.exit(launch.run(launch.Job(2, command, {}, "", launcher=launcher), watch))
    """
    heard = jobs.folder / "heard"
    with jobs.start(jobs.write(source), str(jobs.folder), str(heard)) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        await_said(process, "SIGINT; the ranks write a checkpoint and stop")
        heard.touch()
        assert finish(process, seconds=15).returncode == 75


@needs_mpi
def test_ctrl_c_once_ends_a_job_without_checkpoints(jobs: Jobs) -> None:  # noqa: F811
    with jobs.start(*command("distprop run", 2, script(jobs), str(jobs.folder / "run"), "none")) as process:
        await_job(process, (jobs.folder / "ready").exists)
        process.send_signal(signal.SIGINT)
        done = finish(process, seconds=20)
    assert done.returncode == 130
    assert "SIGINT; ending all ranks" in done.stderr


@needs_mpi
def test_max_time_ends_a_job_with_a_checkpoint_before_the_limit(jobs: Jobs) -> None:  # noqa: F811
    run_dir = jobs.folder / "run"
    job = command("distprop run", 2, script(jobs), str(run_dir))
    with jobs.start(*job[:3], "--max-time", "12s", *job[3:], SLOW="0.5") as process:
        done = finish(process)
    assert done.returncode == 75, done.stderr
    assert "the time is over: stopped after step" in done.stderr
    assert "set by --max-time" not in done.stderr  # the ranks did it by themselves
    assert_resumes_to_the_same_bits(run_dir, jobs.folder)


@needs_mpi
def test_max_time_ends_a_job_that_does_not_train(jobs: Jobs) -> None:  # noqa: F811
    job = command("distprop run", 2, jobs.write("time.sleep(60)"))
    with jobs.start(*job[:3], "--max-time", "3", *job[3:]) as process:
        done = finish(process, seconds=20)
    assert done.returncode == 143
    assert "the time set by --max-time is over; ending all ranks" in done.stderr


def test_one_rank_without_a_launcher_stops_too(jobs: Jobs) -> None:  # noqa: F811
    run_dir = jobs.folder / "run"
    with jobs.start(*command("distprop run", 1, script(jobs), str(run_dir))) as process:
        await_job(process, (jobs.folder / "ready").exists)
        process.send_signal(signal.SIGTERM)
        done = finish(process, seconds=20)
    assert done.returncode == 75, done.stderr
    assert_resumes_to_the_same_bits(run_dir, jobs.folder)


@pytest.mark.parametrize(
    "option", [["--max-time", "soon"], ["--max-time", "0"], ["--max-restarts", "-1"], ["--max-restarts", "x"]]
)
@pytest.mark.parametrize("verb", [["run", "-n", "2"], ["train", "-n", "2"]])
def test_a_bad_value_is_refused_before_anything_starts(verb: list[str], option: list[str], jobs: Jobs) -> None:  # noqa: F811
    with jobs.start("-m", "distprop.cli", *verb, *option, __file__) as process:
        done = finish(process)
    assert done.returncode == 2
    assert f"Invalid value for '{option[0]}'" in done.stderr
    assert sys.executable not in done.stderr
