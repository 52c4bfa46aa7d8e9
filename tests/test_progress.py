import json
import math
import re
import time
from pathlib import Path

import pytest

from distprop.metrics import MetricsFile, StepResult
from distprop.progress import PlainLines


def step(number=1, *, epoch=0, loss=0.5, examples=100, **metrics):
    return StepResult(number, epoch, loss, metrics, examples, lr=0.1, seconds=0.0123456789)


# PlainLines


def test_an_epoch_is_a_line(capsys):
    lines = PlainLines()
    lines.step(step())
    lines.epoch(0, 1.23456, {"accuracy": 0.98765}, {})
    lines.epoch(1, math.nan, {}, {"loss": 0.5, "accuracy": 1.0})
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"epoch 1  loss 1\.2346  accuracy 98\.77%  [\d,]+ samples/s", first)
    assert re.fullmatch(r"epoch 2  loss nan  validation loss 0\.5000  accuracy 100\.00%  [\d,]+ samples/s", second)


def test_the_rate_is_known_from_the_first_line_on(capsys):
    lines = PlainLines()
    lines.step(step(examples=10_000_000))
    lines.epoch(0, 1.0, {}, {})
    assert not capsys.readouterr().out.endswith(" 0 samples/s\n")


def test_the_rate_is_the_samples_of_all_steps_over_their_time(capsys):
    lines = PlainLines()
    for seconds, rate in ((0.5, "1,000"), (1.5, "500")):
        lines.step(StepResult(1, 0, 1.0, {}, examples=500, lr=0.1, seconds=seconds))
        lines.epoch(0, 1.0, {}, {})
        assert capsys.readouterr().out.endswith(f" {rate} samples/s\n")


def test_steps_speak_up_only_after_a_while(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    lines = PlainLines()
    now += PlainLines.EVERY_SECONDS
    lines.step(step(1))
    assert capsys.readouterr().out == ""
    now += 0.1
    lines.step(step(2, loss=0.25, accuracy=0.5))
    now += PlainLines.EVERY_SECONDS
    lines.step(step(3))
    line = capsys.readouterr().out
    assert line.startswith("step 2  loss 0.2500  accuracy 50.00%  ")
    assert line.count("\n") == 1


def test_a_verdict_is_a_line_at_once(capsys):
    PlainLines().verdict("gradients vanish; try ReLU")
    assert capsys.readouterr().out == "distprop: gradients vanish; try ReLU\n"


# MetricsFile


def read(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with MetricsFile(None) as file:
        file.write({"a": 1})
        file.write_step(step())
    assert list(tmp_path.iterdir()) == []


def test_lines_are_json_whatever_the_numbers(tmp_path):
    folder = tmp_path / "deep" / "er"
    with MetricsFile(folder) as file:
        file.write_step(step(7, epoch=2, loss=math.nan, accuracy=math.inf))
        file.write({"a": -math.inf, "b": 1, "name": "µ"})
    assert read(folder) == [
        {"step": 7, "epoch": 2, "loss": None, "accuracy": None, "lr": 0.1, "examples": 100, "seconds": 0.012346},
        {"a": None, "b": 1, "name": "µ"},
    ]


def test_a_second_run_appends(tmp_path):
    for number in range(2):
        with MetricsFile(tmp_path) as file:
            file.write({"run": number})
    assert read(tmp_path) == [{"run": 0}, {"run": 1}]


def test_lines_are_there_when_training_raises(tmp_path):
    def train():
        with MetricsFile(tmp_path) as file:
            file.write({"a": 1})
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert read(tmp_path) == [{"a": 1}]


def test_a_reader_sees_a_run_that_is_still_going(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with MetricsFile(tmp_path) as file:
        file.write({"a": 1})
        assert read(tmp_path) == []
        now += 1.5
        file.write({"a": 2})
        assert read(tmp_path) == [{"a": 1}, {"a": 2}]


def test_logs_get_the_same_lines_without_a_folder_too(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)

    class Log:
        lines, flushed = [], 0

        def log(self, line):
            self.lines.append(line)

        def flush(self):
            self.flushed += 1

    for folder in (tmp_path, None):
        log = Log()
        log.lines = []
        with MetricsFile(folder, [log]) as file:
            file.write_step(step(7))
            file.write({"step": 7, "epoch_loss": math.nan})
        assert [line["step"] for line in log.lines] == [7, 7]
        assert math.isnan(log.lines[1]["epoch_loss"])
        assert log.flushed == 1
    assert len(read(tmp_path)) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_does_not_stop_training(tmp_path, capsys, monkeypatch):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    now = time.monotonic()
    with MetricsFile(tmp_path) as file:
        file.write({"a": 1})
        monkeypatch.setattr(time, "monotonic", lambda: now + 1.5)
        file.write({"a": 2})
        file.write({"a": 3})
    assert re.fullmatch(r"distprop: no more metrics are written: .*space.*\n", capsys.readouterr().err)
    with MetricsFile(tmp_path) as file:
        file.write({"a": 1})
    assert "no more metrics" in capsys.readouterr().err
