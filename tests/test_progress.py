import json
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from distprop.metrics import MetricsFile, StepResult
from distprop.progress import LiveBar, PlainLines, Progress, show_progress


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
    lines = PlainLines()
    lines.step(step(1))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(PlainLines, "EVERY_SECONDS", 0.05)
    time.sleep(0.06)
    lines.step(step(2, loss=0.25, accuracy=0.5))
    lines.step(step(3))
    line = capsys.readouterr().out
    assert line.startswith("step 2  loss 0.2500  accuracy 50.00%  ")
    assert line.count("\n") == 1


# which one


class Terminal:
    """A standard output that says it is a terminal."""

    def __init__(self, stream):
        self.stream = stream

    def isatty(self):
        return True

    def __getattr__(self, name):
        return getattr(self.stream, name)


def test_the_display_suits_standard_output(capsys, monkeypatch):
    with show_progress(False, 3) as progress:
        assert type(progress) is Progress
        progress.step(step())
        progress.epoch(0, 1.0, {}, {})
    with show_progress(True, 3) as progress:
        assert type(progress) is PlainLines
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    with show_progress(True, 3) as progress:
        assert type(progress) is LiveBar


def test_the_display_is_closed_when_training_raises(monkeypatch):
    closed = []
    monkeypatch.setattr(PlainLines, "close", lambda self: closed.append(self), raising=False)
    with pytest.raises(KeyError), show_progress(True, 3):
        raise KeyError
    assert len(closed) == 1


# LiveBar, on a real pseudo-terminal

SCRIPT = """
import numpy as np
import distprop as dp
from distprop import functional as F

model = dp.nn.Linear(4, 3)
rng = np.random.default_rng(0)
data = dp.data.ArrayDataset(rng.standard_normal((30, 4)).astype(np.float32), rng.integers(0, 3, 30))
trainer = dp.Trainer(model, F.cross_entropy, dp.optim.SGD(model.parameters(), lr=0.1), batch_size=7)
{body}
print("after")
"""


def on_terminal(body):
    """Run a script with a pseudo-terminal for its output; returns (exit status, what the terminal was sent)."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    environment.pop("NO_COLOR", None)
    program = SCRIPT.format(body=textwrap.dedent(body))
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        received = b""
        try:
            while piece := os.read(ours, 65536):
                received += piece
        except OSError:  # Linux's way to say that the other side is closed
            pass
        finally:
            os.close(ours)
        status = process.wait(30)
    return status, received.decode()


def lines_of(text):
    """What is left on the screen: without escape sequences, and without what was drawn over."""
    text = text.replace("\r\n", "\n")
    plain = [re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", line) for line in text.split("\n")]
    return [line.rsplit("\r", 1)[-1].rstrip() for line in plain if line.strip()]


def test_the_bar_shows_training_and_leaves_the_terminal_as_it_was():
    status, text = on_terminal("trainer.fit(data, epochs=3, validation=data)")
    assert status == 0
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    lines = lines_of(text)
    for number in (1, 2, 3):
        assert sum(re.match(rf"epoch {number}  loss \d\.\d{{4}}  .*validation loss .* samples/s$", line) is not None
                   for line in lines) == 1  # fmt: skip
    assert lines[-1] == "after"
    assert re.match(r"epoch 3 ━+ 15/15 loss \d\.\d{4} +accuracy \d+\.\d\d% .*samples/s", lines[-2])


def test_the_finished_bar_shows_the_last_step():
    body = """
    seen = []
    trainer.callbacks.append(seen.append)
    trainer.fit(data, steps=9)
    print(f"last {seen[-1].loss:.4f}")
    """
    status, text = on_terminal(body)
    lines = lines_of(text)
    assert status == 0
    bar, last = lines[-3], lines[-2]
    assert "9/9" in bar
    assert f"loss {last.removeprefix('last ')} " in bar


def test_the_bar_ends_before_an_error_is_shown():
    status, text = on_terminal(
        """
        def fail(result):
            if result.step == 4:
                raise KeyError("in a callback")
        trainer.callbacks.append(fail)
        trainer.fit(data, epochs=3)
        """
    )
    assert status == 1
    assert text.rindex("\x1b[?25h") < text.index("Traceback")
    assert "4/15" in text
    assert "KeyError: 'in a callback'" in text


def test_an_early_stop_and_nothing_to_do_are_no_trouble():
    status, text = on_terminal(
        """
        trainer.fit(data, epochs=0)
        trainer.callbacks.append(lambda result: result.step == 3)
        trainer.fit(data, epochs=3)
        """
    )
    assert status == 0
    assert "3/15" in text


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
    now = time.monotonic()
    with MetricsFile(tmp_path) as file:
        file.write({"a": 1})
        assert read(tmp_path) == []
        monkeypatch.setattr(time, "monotonic", lambda: now + 1.5)
        file.write({"a": 2})
        assert read(tmp_path) == [{"a": 1}, {"a": 2}]


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
