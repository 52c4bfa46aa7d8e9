"""`distprop predict` as it is typed: what it measures, what it is told, and what it says of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from distprop.bench.cluster import Measured, measure
from distprop.bench.workload import configured, network
from distprop.cli import main
from distprop.comm import Communicator, SoloCommunicator, run_threads
from distprop.config import Config, Model
from distprop.cost import Link
from distprop.predict import Question, answer
from test_launch import needs_mpi

TOLD = ["--network", "100mbit,100us", "--step-time", "5ms"]
MEASURED = Measured(
    name="20-5",
    batch=64,
    rows=(1.0, 64.0),
    seconds=(1e-3, 2e-3),
    message_bytes=1_000_000,
    hosts=("a", "b"),
    ranks=4,
    ranks_per_host=2,
    within=Link(1e-6, 1e-10),
    between=Link(1e-5, 1e-9),
    step_seconds=3.5e-3,
)


def predict(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["predict", *arguments], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_what_is_told_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distprop.predict.measure_here", lambda *_: pytest.fail("measured"))
    text = predict(*TOLD)
    assert "step: given" in text
    assert "rows a rank for 90 %" in text
    assert "between hosts: 0.0941 Gbit/s, 100 µs (given)" in text
    assert "2 to 64 ranks would be slower than 1: " in text
    assert text.count("100.0%") == 1
    assert max(map(len, text.splitlines()[:-1])) <= 80  # all but the verdict, which the terminal wraps


def test_ranks_that_were_asked_for_are_measured_whatever_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distprop.predict.measure_here", lambda *_: MEASURED)
    assert "within a host: 2 ranks, 80 Gbit/s, 1 µs (measured)" in predict(*TOLD, "-n", "2")


def test_json_has_every_number_of_ranks_and_the_drawing_is_written(tmp_path: Path) -> None:
    found = json.loads(predict(*TOLD, "--json", "--scaling", "strong", "--svg", str(tmp_path / "speedup.svg")))
    assert [row["ranks"] for row in found["forecasts"]] == [2**power for power in range(13)]
    assert found["scaling"] == "strong"
    assert found["verdicts"] == [
        line for line in found["verdicts"] if line.startswith("More than 1 rank would be slower than 1: ")
    ]
    assert (tmp_path / "speedup.svg").read_text().startswith("<svg ")


def test_the_model_of_a_configuration_is_measured_with_its_batch(tmp_path: Path) -> None:
    config = tmp_path / "digits.toml"
    config.write_text('[data]\nname = "digits"\n[model]\nhidden = [32]\n[train]\nbatch_size = 48\n')
    found = json.loads(predict(str(config), *TOLD, "--json"))
    assert (found["name"], found["batch"], found["scaling"]) == ("64-32-10", 48, "strong")
    assert found["steps"]["message_bytes"] == 4 * (64 * 32 + 32 + 32 * 10 + 10)


def test_a_network_with_dropout_is_measured_without_a_warning() -> None:
    def step(comm: Communicator) -> None:
        configured(Config(model=Model(dropout=0.5))).step(comm, 4)()

    run_threads(2, step)  # in which a warning is an error


def test_one_rank_is_measured_without_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distprop.bench.cluster.STEP_SECONDS", 0.1)
    found = measure(SoloCommunicator(), network([20, 16, 5]), 8)
    assert found.rows == (1.0, 2.0, 8.0, 32.0)
    assert all(seconds > 0 for seconds in found.seconds)
    assert (found.ranks, found.within, found.between, found.step_seconds) == (1, None, None, None)
    assert found.message_bytes == 4 * (20 * 16 + 16 + 16 * 5 + 5)
    assert Measured.from_json(found.to_json()) == found


def test_a_real_step_is_held_against_its_prediction() -> None:
    found = answer(Question(None, (20, 5)), MEASURED)
    # 2 ms alone, 0.101 ms within, 1.01 ms between
    assert found.notes[-1] == "check: 4 ranks measured together take 3.5 ms a step, predicted 3.11 ms (-11.1%)"
    assert "within a host: 2 ranks, 80 Gbit/s, 1 µs (measured)" in found.notes
    assert "between hosts: 8 Gbit/s, 10 µs (measured)" in found.notes


def test_a_step_time_that_was_given_is_not_held_against_a_real_step() -> None:
    assert not any(
        note.startswith("check") for note in answer(Question(None, (20, 5), step_time="5ms"), MEASURED).notes
    )


@pytest.mark.parametrize(("name", "option"), [("within", "--within"), ("between", "--network")])
def test_a_rate_that_was_lost_in_the_noise_is_refused(name: str, option: str) -> None:
    lost = replace(MEASURED, **{name: Link(1e-6, 0.0)})
    with pytest.raises(ValueError, match=f"its rate is unknown: .* Measure again, or give {option} RATE,LATENCY"):
        answer(Question(None, (20, 5)), lost)
    answer(Question(None, (20, 5), within="1gbit,1us", network="1gbit,1ms"), lost)


def test_an_option_wins_over_what_was_measured_and_an_assumption_is_called_one() -> None:
    found = answer(Question(None, (20, 5), network="1gbit,1ms"), MEASURED)
    assert "between hosts: 0.941 Gbit/s, 1 ms (given)" in found.notes
    one_host = Measured(**{**MEASURED.__dict__, "hosts": ("a",), "between": None})
    notes = answer(Question(None, (20, 5)), one_host).notes
    assert any(note.endswith("(assumed: say --network RATE,LATENCY)") for note in notes)


@needs_mpi
def test_the_ranks_of_this_host_are_measured() -> None:
    path = f"{Path(__file__).parent.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    size = ["--sizes", "20,16,5", "--batch", "8", "--within", "1gbit,1us"]  # the rate may be lost where others compute
    command = [sys.executable, "-m", "distprop", "predict", "-n", "2", *size, "--json"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["measured"]
    assert found["ranks"] == found["ranks_per_host"] == 2
    assert found["within"]["latency"] > 0
    assert found["step_seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "fast"], "a link is written RATE,LATENCY as in 25gbit,10us"),
        (["--step-time", "5"], "a time is a number with ns, us, ms or s behind it"),
        (["--step-time", "0ms"], "--step-time must be more than 0"),
        (["--sizes", "20"], "two or more positive whole numbers"),
        (["missing.toml", *TOLD], "cannot read missing.toml"),
        (["missing.toml", "-n", "2"], "cannot read missing.toml"),
        (["--batch", "0"], "0 is not in the range x>=1"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["predict", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.toml"], "cannot read missing.toml"),
        (["a.toml", "--sizes", "20,5"], "--sizes and CONFIG both say which network; give one of them"),
        (["--svg", "missing/speedup.svg"], "--svg: there is no folder missing"),
    ],
)
def test_a_mistake_is_said_before_anything_is_measured(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("distprop.predict.measure_here", lambda *_: pytest.fail("measured"))
    monkeypatch.chdir(tmp_path)
    Path("a.toml").touch()
    done = CliRunner().invoke(main, ["predict", *arguments])
    assert (done.exit_code, message in done.output) == (2, True), done.output


def test_several_ranks_a_host_need_a_link_between_them() -> None:
    alone = Measured(**{**MEASURED.__dict__, "ranks": 1, "ranks_per_host": 1, "within": None})
    with pytest.raises(ValueError, match=r"how fast 4 ranks of a host exchange messages: measure with -n 4, or give"):
        answer(Question(None, (20, 5), ranks_per_host=4), alone)
