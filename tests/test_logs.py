"""CSV out of metrics.jsonl: every number of every line, under the name that is promised."""

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import distprop as dp
from distprop.cli import main
from distprop.comm import run_threads
from distprop.logs import lines_of, scalars, write_csv
from distprop.metrics import METRICS
from distprop.rundir import RUN, read_run
from test_cli_run import ROOT
from test_rundir import step, train, write

HEALTH = {
    "step": 2,
    "health": {
        "0.weight": {"grad_norm": 0.5, "weight_norm": 2.0, "update_ratio": 1e-3, "bad": 0},
        "2.weight": {"grad_norm": None, "weight_norm": 3.0, "update_ratio": None, "bad": 7},
    },
    "units": {"1": {"kind": "relu", "dead": 0.25, "saturated": 0.0}},
    "noise_scale": 40.5,
    "seconds": {"compute": [0.001, None], "step": 0.003},
}
VERDICT = {"step": 2, "verdict": {"kind": "vanishing", "layer": "0.weight", "text": 'gradients "vanish", a lot'}}
EPOCH = {
    **{"epoch": 0, "step": 2, "epoch_loss": 1.5, "accuracy": 0.5, "validation_loss": None, "validation_accuracy": 0.25},
    "seconds": {"forward": [0.1, 0.2]},
}


def table(run_dir: Path) -> list[dict[str, str]]:
    text = io.StringIO()
    write_csv(read_run(run_dir), text)
    return list(csv.DictReader(text.getvalue().splitlines()))


def test_each_kind_of_line_has_its_names() -> None:
    assert scalars(EPOCH) == pytest.approx(
        {
            **{"epoch_loss": 1.5, "epoch_accuracy": 0.5, "validation_loss": math.nan, "validation_accuracy": 0.25},
            **{"epoch_seconds/forward/rank 0": 0.1, "epoch_seconds/forward/rank 1": 0.2},
        },
        nan_ok=True,
    )
    assert scalars(HEALTH) == pytest.approx(
        {
            **{"grad_norm/0.weight": 0.5, "weight_norm/0.weight": 2, "update_ratio/0.weight": 1e-3, "bad/0.weight": 0},
            **{"grad_norm/2.weight": math.nan, "weight_norm/2.weight": 3, "update_ratio/2.weight": math.nan},
            **{"bad/2.weight": 7, "dead/1": 0.25, "saturated/1": 0, "noise_scale": 40.5},
            **{"step_seconds/compute/rank 0": 0.001, "step_seconds/compute/rank 1": math.nan},
            "step_seconds/step": 0.003,
        },
        nan_ok=True,
    )
    assert scalars({**step(2), "accuracy": 0.5}) == {
        "loss": 1.0, "lr": 0.1, "examples": 8, "seconds": 0.01, "accuracy": 0.5,
    }  # fmt: skip
    assert scalars(VERDICT) == {}


def test_a_row_has_everything_that_was_said_of_its_step(tmp_path: Path) -> None:
    write(tmp_path, step(1), step(2, None), EPOCH, HEALTH, VERDICT, step(3))
    rows = table(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [row["loss"] for row in rows] == ["1.0", "nan", "1.0"]
    assert [row["epoch_loss"] for row in rows] == ["", "1.5", ""]
    assert [row["grad_norm/2.weight"] for row in rows] == ["", "nan", ""]
    assert [row["verdict"] for row in rows] == ["", 'gradients "vanish", a lot', ""]
    for line in lines_of(read_run(tmp_path)):
        row = rows[line["step"] - 1]
        for name, value in scalars(line).items():
            assert float(row[name]) == value or (math.isnan(value) and row[name] == "nan")


def test_a_run_is_a_table(tmp_path: Path) -> None:
    run_threads(2, lambda comm: train(comm, tmp_path, steps=6))
    answer = CliRunner().invoke(main, ["export", str(tmp_path), "--csv", str(tmp_path / "all.csv")])
    assert (answer.exit_code, answer.stdout) == (0, f"{tmp_path / 'all.csv'}: 6 rows\n")
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [float(row["loss"]) for row in rows] == [line["loss"] for line in steps]
    assert [row["epoch"] for row in rows] == [str(line["epoch"]) for line in steps]
    assert (
        CliRunner().invoke(main, ["export", str(tmp_path), "--csv", "-"]).stdout == (tmp_path / "all.csv").read_text()
    )


BAD = {
    "no folder": (None, None, "there is no folder"),
    "no metrics": ([], None, "has no metrics.jsonl; it is written by distprop train and by Trainer(run_dir=...)"),
    "a newer version": ([step(1)], {"format": 2, "sessions": []}, "upgrade distprop to read it"),
}


@pytest.mark.parametrize(("lines", "about", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize(
    "command", [["export", "--csv", "OUT"], ["export", "--tensorboard", "OUT"], ["report", "-o", "OUT"]]
)
def test_a_folder_that_cannot_be_read_is_refused(command, lines, about, message, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if lines is not None:
        folder.mkdir()
        if lines:
            write(folder, *lines)
        if about:
            (folder / RUN).write_text(json.dumps(about))
    arguments = [str(tmp_path / "out") if word == "OUT" else word for word in command]
    answer = CliRunner().invoke(main, [arguments[0], str(folder), *arguments[1:]])
    assert answer.exit_code == 2
    assert answer.stderr.startswith("Error: ")
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_line_that_was_cut_off_is_left_out_and_a_damaged_one_is_said(tmp_path: Path) -> None:
    write(tmp_path, step(1), "{}\n", step(2), json.dumps(step(3))[:-9])
    answer = CliRunner().invoke(main, ["export", str(tmp_path), "--csv", str(tmp_path / "all.csv")])
    assert answer.exit_code == 0
    assert answer.stdout.endswith(": 2 rows\n")
    assert answer.stderr == "distprop: 1 line of metrics.jsonl cannot be read and is left out\n"


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    write(tmp_path, *map(step, range(1, 5000)))
    shell = f"{sys.executable} -m distprop export {tmp_path} --csv - | head -1"
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("step,epoch,loss,lr,examples,seconds,verdict\n", "")


def test_nothing_to_write_is_a_mistake(tmp_path: Path) -> None:
    answer = CliRunner().invoke(main, ["export", str(tmp_path)])
    assert answer.exit_code == 2
    assert "--csv FILE, --tensorboard DIR" in answer.stderr


def test_a_callback_with_a_log_gets_every_line_on_rank_0(tmp_path: Path) -> None:
    class Keep:
        def __init__(self) -> None:
            self.results: list[dp.StepResult] = []
            self.lines: list[dict] = []

        def __call__(self, result: dp.StepResult) -> bool:
            self.results.append(result)
            return len(self.results) == 4 and len(self.lines) > 0  # on rank 0 alone; and all stop

        def log(self, line: dict) -> None:
            self.lines.append(line)

        def flush(self) -> None:
            self.lines.append({"flushed": True})

    def body(comm) -> Keep:
        keep = Keep()
        train(comm, tmp_path, steps=6, callbacks=[keep])
        return keep

    first, second = run_threads(2, body)
    assert [r.step for r in first.results] == [r.step for r in second.results] == [1, 2, 3, 4]
    assert second.lines == []
    assert first.lines[-1] == {"flushed": True}
    written = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert first.lines[:-1] == written


def test_the_line_of_an_epoch_has_its_seconds_without_a_folder_too() -> None:
    class Keep:
        def __init__(self) -> None:
            self.epochs: list[dict] = []

        def __call__(self, result: dp.StepResult) -> None:
            pass

        def log(self, line: dict) -> None:
            self.epochs += [line] if "epoch_loss" in line else []

        def flush(self) -> None:
            pass

    def body(comm) -> Keep:
        keep = Keep()
        train(comm, None, callbacks=[keep])
        return keep

    first, _ = run_threads(2, body)
    assert first.epochs
    assert all(len(line["seconds"]["forward"]) == 2 for line in first.epochs)
