"""A run's folder: what `fit` leaves in run.json, and reading what runs of all kinds leave behind."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

import distprop as dp
from distprop import functional as F
from distprop import nn, optim
from distprop.comm import Communicator, SoloCommunicator, run_threads
from distprop.metrics import METRICS
from distprop.report import page
from distprop.rundir import RUN, RunDirError, read_run, read_sessions, session_at
from distprop.stopping import StoppedError
from test_fingerprint import dataset


def train(comm: Communicator, run_dir: Path, steps: int = 6, **options) -> None:
    dp.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    options = {"batch_size": 8, "progress": False, "run_dir": run_dir, **options}
    dp.Trainer(model, F.cross_entropy, optimizer, comm=comm, **options).fit(dataset(), steps=steps)


def write(folder: Path, *lines: object) -> None:
    (folder / METRICS).write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def step(number: int, loss: float | None = 1.0) -> dict:
    return {"step": number, "epoch": 0, "loss": loss, "lr": 0.1, "examples": 8, "seconds": 0.01}


def test_a_run_says_what_it_was_and_how_it_ended(tmp_path: Path) -> None:
    run_threads(3, lambda comm: train(comm, tmp_path, clip_norm=2.0))
    run = read_run(tmp_path)
    (session,) = run.sessions
    assert (session["ranks"], len(session["hosts"]), session["from_step"]) == (3, 3, 0)
    assert session["reduction"] == "one message"
    assert (session["batch_size"], session["clip_norm"], session["optimizer"]) == (8, 2.0, "SGD")
    assert session["parameters"] == 4 * 6 + 6 + 6 * 3 + 3
    assert session["environment"].keys() >= {"distprop", "python", "numpy", "blas", "mpi", "command"}
    assert run.state == "finished"
    assert [line["step"] for line in run.steps] == [1, 2, 3, 4, 5, 6]
    assert run.remarks == []


def test_the_seconds_of_an_epoch_are_there_for_every_rank(tmp_path: Path) -> None:
    run_threads(3, lambda comm: train(comm, tmp_path))
    run = read_run(tmp_path)
    seconds = run.epochs[-1]["seconds"]
    assert {len(values) for values in seconds.values()} == {3}
    for phase in ("forward", "backward", "reduction", "update"):
        assert min(sum(line["seconds"][phase][rank] for line in run.epochs) for rank in range(3)) > 0, phase


def test_a_resumed_run_has_an_entry_for_each_number_of_ranks(tmp_path: Path) -> None:
    options = {"deterministic": True, "checkpoint_every": 2}
    train(SoloCommunicator(), tmp_path, steps=4, **options)
    run_threads(2, lambda comm: train(comm, tmp_path, steps=8, resume=True, **options))
    sessions = read_sessions(tmp_path)
    assert [(entry["from_step"], entry["ranks"]) for entry in sessions] == [(0, 1), (4, 2)]
    assert [session_at(sessions, step) for step in (1, 4, 5, 8)] == [*sessions[:1] * 2, *sessions[1:] * 2]
    assert session_at([], 1) is None


def test_an_error_is_kept(tmp_path: Path) -> None:
    def fail(result: dp.StepResult) -> None:
        if result.step == 3:
            raise KeyError("lost")

    with pytest.raises(KeyError):
        train(SoloCommunicator(), tmp_path, callbacks=[fail])
    run = read_run(tmp_path)
    assert run.state == "failed"
    assert run.sessions[-1]["error"] == "KeyError: 'lost'"
    assert len(run.steps) == 3


def test_a_run_that_was_stopped_has_not_finished(tmp_path: Path) -> None:
    def ask(result: dp.StepResult) -> None:
        if result.step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(StoppedError):
        train(SoloCommunicator(), tmp_path, callbacks=[ask])
    assert read_run(tmp_path).state == "stopped"
    assert '<span class="state busy">stopped</span>' in page([read_run(tmp_path)])
    train(SoloCommunicator(), tmp_path)
    assert read_run(tmp_path).state == "finished"


def test_an_error_without_a_message_is_its_name(tmp_path: Path) -> None:
    def interrupt(result: dp.StepResult) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(SoloCommunicator(), tmp_path, callbacks=[interrupt])
    assert read_run(tmp_path).sessions[-1]["error"] == "KeyboardInterrupt"


def test_a_run_is_going_until_it_has_been_silent_for_long(tmp_path: Path) -> None:
    train(SoloCommunicator(), tmp_path)
    tree = json.loads((tmp_path / RUN).read_text())
    del tree["sessions"][0]["ended"]
    (tmp_path / RUN).write_text(json.dumps(tree))
    assert read_run(tmp_path).state == "going"
    long_ago = time.time() - 3600
    os.utime(tmp_path / METRICS, (long_ago, long_ago))
    assert read_run(tmp_path).state == "died"


def test_a_line_that_was_cut_off_is_passed_over_in_silence(tmp_path: Path) -> None:
    write(tmp_path, step(1), step(2), json.dumps(step(3))[:-9])
    run = read_run(tmp_path)
    assert [line["step"] for line in run.steps] == [1, 2]
    assert run.remarks == []


def test_a_damaged_line_is_passed_over_and_said(tmp_path: Path) -> None:
    write(tmp_path, step(1), "\x00\x00{\n", "[1]\n", {"loss": 1}, step(2), "\n", {"step": 2, "something": "new"})
    run = read_run(tmp_path)
    assert [line["step"] for line in run.steps] == [1, 2]
    assert run.remarks == ["3 lines of metrics.jsonl cannot be read and are left out"]


def test_health_and_verdicts_are_told_from_steps(tmp_path: Path) -> None:
    health = {"step": 2, "health": {"0.weight": {"grad_norm": 1.0}}, "units": {}, "noise_scale": 3.0}
    verdict = {"step": 2, "verdict": {"kind": "vanishing", "layer": "0.weight", "text": "gradients vanish"}}
    write(tmp_path, step(1), step(2), health, verdict)
    run = read_run(tmp_path)
    assert (len(run.steps), run.health) == (2, [health])
    assert run.verdicts == [{"step": 2, "kind": "vanishing", "layer": "0.weight", "text": "gradients vanish"}]


def test_of_several_runs_in_one_folder_the_last_is_read(tmp_path: Path) -> None:
    write(tmp_path, step(1), step(2), step(1, 5.0))
    run = read_run(tmp_path)
    assert [line["loss"] for line in run.steps] == [5.0]
    assert "an earlier run" in run.remarks[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2, "sessions": []}', "has format 2; this version of distprop reads format 1"),
        ('{"format": "x", "sessions": []}', "upgrade distprop"),
        ('{"format": 1', "is not what a run writes"),
        ("[]", "is not what a run writes"),
        ('{"format": 1, "sessions": [3]}', "is not what a run writes"),
    ],
)
def test_a_newer_or_damaged_run_is_refused(content: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, step(1))
    (tmp_path / RUN).write_text(content)
    with pytest.raises(RunDirError, match=message):
        read_run(tmp_path)


def test_a_folder_without_metrics_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunDirError, match=r"has no metrics.jsonl; it is written by .*run_dir"):
        read_run(tmp_path)


def test_a_run_of_before_run_json_is_read(tmp_path: Path) -> None:
    write(tmp_path, step(1))
    assert read_run(tmp_path).sessions == []


def test_a_configuration_is_flat(tmp_path: Path) -> None:
    write(tmp_path, step(1))
    (tmp_path / "config.toml").write_text("[optim]\nlr = 0.5\n[train]\nepochs = 3\n")
    assert read_run(tmp_path).config == {"optim.lr": 0.5, "train.epochs": 3}
    (tmp_path / "config.toml").write_text("[optim")
    assert "cannot be read" in read_run(tmp_path).remarks[0]
