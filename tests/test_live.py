"""The live view on real pseudo-terminals: what is seen while training goes on, and what is left behind."""

import contextlib
import fcntl
import math
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Callable

import numpy as np
import pyte
import pytest

from distprop.live import LiveView, Plan, show_progress
from distprop.metrics import StepResult
from distprop.progress import PlainLines, Progress
from distprop.timeline import Timeline

LIMIT_SECONDS = 60
REGION_WHOLE = "\x1b[r"


class Terminal:
    """A pseudo-terminal and an emulation of what it shows; `feed` takes what has come, until something is seen."""

    def __init__(self, columns: int = 100, rows: int = 30) -> None:
        self.ours, self.theirs = os.openpty()
        self.screen = pyte.HistoryScreen(columns, rows, history=1000, ratio=0.5)
        self.stream = pyte.ByteStream(self.screen)
        self.received = b""
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    def feed(self, until: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> bool:
        deadline = time.monotonic() + seconds
        while not until() and time.monotonic() < deadline:
            if select.select([self.ours], [], [], 0.02)[0]:
                try:
                    data = os.read(self.ours, 65536)
                except OSError:  # Linux's way to say that the other side is closed
                    break
                self.received += data
                self.stream.feed(data)
        return until()

    def drain(self) -> None:
        """Take all that has been written so far; a window title, which comes last, marks its end."""
        mark = b"\x1b]0;end %d\x07" % len(self.received)
        self.feed(lambda: not select.select([self.ours], [], [], 0)[0])  # or there may be no room for the mark
        os.write(self.theirs, mark)
        assert self.feed(lambda: mark in self.received)

    def rows(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    def text(self) -> list[str]:
        """All lines to be seen, history included."""
        gone = ["".join(line[x].data for x in range(self.screen.columns)).rstrip() for line in self.screen.history.top]
        return [line for line in gone + self.rows() if line]

    def shows(self, part: str) -> bool:
        return any(part in line for line in self.text())

    def close(self) -> None:
        os.close(self.ours)
        with contextlib.suppress(OSError):
            os.close(self.theirs)


@pytest.fixture
def terminal():
    opened = Terminal()
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _outside_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISTPROP_TERMINAL", "DISTPROP_WINDOW", "OMPI_COMM_WORLD_SIZE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def result(number: int, loss: float = 0.5, epoch: int = 0) -> StepResult:
    return StepResult(number, epoch, loss, {"accuracy": 0.25}, examples=64, lr=0.1, seconds=0.01)


# --- in this process


def test_what_training_says_is_seen(terminal: Terminal) -> None:
    timeline = Timeline()
    view = LiveView(Plan(total=20, batches=10, epoch=3), timeline, terminal.theirs)
    for number in range(1, 13):
        timeline.add("reduction", 0, 2_500_000)  # of the 10 ms of a step
        view.step(result(number))
    view.epoch(3, 0.75, {}, {"loss": math.nan})
    for norm in (1.0, None, math.inf, 0.1):
        view.health(
            {
                "health": {"0.weight": {"grad_norm": norm}, "0.bias": {"grad_norm": 1.0}, "odd": 3},
                "seconds": {"compute": [0.01, 0.01, 0.04]},
            }
        )
    view.verdict("gradients vanish")
    view.verdict("something else")
    view.verdict("gradients vanish")
    view.close()
    assert terminal.feed(lambda: not view._thread.is_alive())
    terminal.drain()
    text = "\n".join(terminal.text())
    for part in (
        *("epoch 5/5 ", " 2/10", "total ", " 12/20", " left", "loss 0.5000  accuracy 25.00%  6,400 samples/s  lr 0.1"),
        *("communication 25.0% of step time", "slowest rank 2, 100.0% above the mean", "epoch 4  loss 0.7500"),
        *("0.weight █××▁ 1.0e-01", "! something else\n! gradients vanish"),
    ):
        assert part in text, part
    assert text.index("epoch 4  loss") < text.index("epoch 5/5")
    assert "0.bias" not in text
    assert terminal.received.decode().count("! gradients vanish") <= 2  # not again in every frame


def test_a_terminal_that_takes_nothing_holds_up_nobody(terminal: Terminal) -> None:
    """As after Ctrl-S; what it can take is used up."""
    os.set_blocking(terminal.theirs, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(terminal.theirs, b"x" * 4096)
    os.set_blocking(terminal.theirs, True)
    view = LiveView(Plan(total=1000, batches=1000), Timeline(), terminal.theirs)
    time.sleep(0.3)  # it is drawing, and cannot
    began = time.thread_time()
    for number in range(1, 1001):
        view.step(result(number))
        view.epoch(number, 1.0, {}, {})
        view.health({"health": {"w": {"grad_norm": 1.0}}})
    view.close()
    assert time.thread_time() - began < 1
    assert view._thread.is_alive()
    assert terminal.feed(lambda: not view._thread.is_alive())


def test_a_process_that_is_stopped_at_the_end_restores_its_terminal(terminal: Terminal) -> None:
    view = LiveView(Plan(total=3, batches=3), Timeline(), terminal.theirs)
    assert terminal.feed(lambda: b"\x1b[1;" in terminal.received)
    close, join, joins, going_on = view._panel.close, view._thread.join, [], threading.Event()
    view._panel.close = lambda *picture: going_on.wait(LIMIT_SECONDS) and close(*picture)

    def join_of_a_stopped_process(seconds: float) -> None:
        """The first time is over when the process goes on, and the other thread has done nothing."""
        joins.append(seconds)
        if len(joins) > 1:
            going_on.set()
            join(LIMIT_SECONDS)

    view._thread.join = join_of_a_stopped_process
    view.close()
    restored = not view._thread.is_alive()
    going_on.set()
    assert restored
    terminal.drain()
    assert_restored(terminal)


def test_a_terminal_that_goes_away_does_not_end_training(terminal: Terminal, capsys: pytest.CaptureFixture) -> None:
    view = LiveView(Plan(total=3, batches=3), Timeline(), terminal.theirs)
    os.close(terminal.theirs)
    os.close(terminal.ours)
    terminal.ours, terminal.theirs = os.openpty()
    view.step(result(1))
    view.close()
    view._thread.join(LIMIT_SECONDS)
    assert not view._thread.is_alive()
    assert capsys.readouterr().err == ""


def test_a_mistake_in_the_view_does_not_end_training(terminal: Terminal, capsys, monkeypatch) -> None:
    monkeypatch.setattr("distprop.live.frame", lambda *arguments: 1 / 0)
    view = LiveView(Plan(total=3, batches=3), Timeline(), terminal.theirs)
    view._thread.join(LIMIT_SECONDS)
    view.step(result(1))
    view.close()
    assert "distprop: the live view has ended: ZeroDivisionError" in capsys.readouterr().err
    assert terminal.feed(lambda: REGION_WHOLE.encode() in terminal.received)


def test_a_fast_loop_gets_five_frames_a_second_at_most(terminal: Terminal) -> None:
    view = LiveView(Plan(total=10**9, batches=10**9), Timeline(), terminal.theirs)
    frames = []
    draw = view._panel.show
    view._panel.show = lambda *arguments: (frames.append(time.monotonic()), draw(*arguments))
    reader = threading.Thread(target=terminal.feed, args=(lambda: not view._thread.is_alive(),))
    reader.start()
    deadline, number = time.monotonic() + LIMIT_SECONDS, 0
    while len(frames) < 6 and time.monotonic() < deadline:
        number += 1
        view.step(result(number))
    view.close()
    reader.join()
    assert len(frames) >= 6
    assert min(np.diff(frames)) >= 0.2


class Output:
    """A standard output on a given descriptor."""

    encoding = "utf-8"

    def __init__(self, descriptor: int) -> None:
        self.fileno = lambda: descriptor
        self.write, self.flush = (lambda text: len(text)), (lambda: None)


def chosen(monkeypatch: pytest.MonkeyPatch, output: object, wanted: bool = True) -> type:
    monkeypatch.setattr(sys, "stdout", output)
    with show_progress(wanted, Plan(3, 3), Timeline()) as progress:
        return type(progress)


def test_the_display_suits_standard_output(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(terminal.theirs)
    assert chosen(monkeypatch, output, wanted=False) is Progress
    assert chosen(monkeypatch, output) is LiveView
    for columns, rows in ((39, 30), (100, 9), (1, 1)):
        terminal.resize(columns, rows)
        assert chosen(monkeypatch, output) is PlainLines
    terminal.resize(40, 10)
    assert chosen(monkeypatch, output) is LiveView
    for name, value in {"TERM": "dumb", "DISTPROP_TERMINAL": "0", "OMPI_COMM_WORLD_SIZE": "2"}.items():
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert chosen(changed, output) is PlainLines
    output.encoding = "iso8859-1"
    assert chosen(monkeypatch, output) is PlainLines
    pipe = os.pipe()
    try:
        assert chosen(monkeypatch, Output(pipe[1])) is PlainLines
        monkeypatch.setenv("DISTPROP_TERMINAL", "1")
        assert chosen(monkeypatch, Output(pipe[1])) is LiveView
        assert chosen(monkeypatch, object()) is PlainLines  # something without a descriptor
    finally:
        for descriptor in pipe:
            os.close(descriptor)


def test_the_display_is_closed_when_training_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(PlainLines, "close", lambda self: closed.append(self), raising=False)
    monkeypatch.setattr("distprop.live._terminal", lambda: None)
    with pytest.raises(KeyError), show_progress(True, Plan(3, 3), Timeline()):
        raise KeyError
    assert len(closed) == 1


# --- training in processes of its own

SCRIPT = """
import sys, time
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


def run(terminal: Terminal, body: str, *launcher: str, act: Callable[[subprocess.Popen], None] | None = None) -> int:
    """Run a script with the terminal as its output; returns its exit status."""
    program = SCRIPT.format(body=textwrap.dedent(body))
    script = ["-c", program]
    if launcher:
        path = f"/tmp/distprop-live-{os.getpid()}.py"
        with open(path, "w") as file:
            file.write(program)
        script = [path]
    command = [sys.executable, *launcher, *script]
    terminal.screen.reset()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=terminal.theirs, stderr=terminal.theirs) as process:
        try:
            if act is not None:
                act(process)
            assert terminal.feed(lambda: process.poll() is not None)
            terminal.drain()
            return process.wait(1)
        finally:
            process.kill()
            if launcher:
                os.remove(path)


def assert_restored(terminal: Terminal) -> None:
    """The last word about margins is that there are none, and the cursor was never hidden."""
    text = terminal.received.decode()
    assert text.rindex(REGION_WHOLE) > text.rindex("\x1b[1;")
    assert "\x1b[?25l" not in text


def test_training_is_shown_and_the_terminal_is_left_as_it_was(terminal: Terminal) -> None:
    assert run(terminal, "trainer.fit(data, epochs=3, validation=data)") == 0
    lines = terminal.text()
    for number, line in enumerate(lines[:3], 1):
        assert line.startswith(f"epoch {number}  loss ")
        assert "  validation loss " in line
        assert line.endswith(" samples/s")
    assert lines[3].startswith("epoch 3/3 ")
    assert lines[3].endswith("━  5/5")
    assert lines[4].endswith("15/15  0:00 left")
    assert lines[-1] == "after"
    assert_restored(terminal)


def test_an_error_is_shown_below_the_last_picture(terminal: Terminal) -> None:
    body = """
    def fail(result):
        if result.step == 4:
            raise KeyError("in a callback")
    trainer.callbacks.append(fail)
    trainer.fit(data, epochs=3)
    """
    assert run(terminal, body) == 1
    lines = terminal.text()
    assert any("4/15" in line for line in lines)
    assert lines[-1] == "KeyError: 'in a callback'"
    assert_restored(terminal)


def test_an_early_stop_and_nothing_to_do_are_no_trouble(terminal: Terminal) -> None:
    body = """
    trainer.fit(data, epochs=0)
    trainer.callbacks.append(lambda result: result.step == 3)
    trainer.fit(data, epochs=3)
    """
    assert run(terminal, body) == 0
    assert terminal.shows("3/15")


LONG = """
def pause(result):
    time.sleep(0.02)
    if trainer.comm.rank == trainer.comm.size - 1 and result.step % 10 == 0:
        print("last rank at", result.step, flush=True)
trainer.callbacks.append(pause)
trainer.fit(data, epochs=1000)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_and_a_change_of_size_leave_a_terminal_that_can_be_used(ranks: int, terminal: Terminal) -> None:
    def act(process: subprocess.Popen) -> None:
        assert terminal.feed(lambda: terminal.shows("last rank at 20"))
        assert terminal.feed(lambda: any(row.startswith("total ") for row in terminal.rows()))
        said = [line for line in terminal.text() if line.startswith("last rank")]
        assert said[:2] == ["last rank at 10", "last rank at 20"]
        terminal.resize(60, 16)
        assert terminal.feed(lambda: any(row.startswith("total ") for row in terminal.rows()))
        process.send_signal(signal.SIGINT)

    launcher = () if ranks == 1 else ("-m", "distprop", "run", "-n", "2")
    status = run(terminal, LONG, *launcher, act=act)
    assert status == (130 if ranks == 2 else -signal.SIGINT)
    assert_restored(terminal)
    before = terminal.text()
    terminal.stream.feed(b"".join(b"prompt %d\r\n" % number for number in range(40)))
    assert terminal.rows()[0].startswith("prompt")  # the whole screen scrolls
    assert any("SIGINT" in line or "KeyboardInterrupt" in line for line in before)


def test_what_a_failing_rank_says_is_not_drawn_over(terminal: Terminal) -> None:
    body = """
    def fail(result):
        time.sleep(0.02)
        if trainer.comm.rank == 1 and result.step == 30:
            raise KeyError("on rank one")
    trainer.callbacks.append(fail)
    trainer.fit(data, epochs=1000)
    """
    assert run(terminal, body, "-m", "distprop", "run", "-n", "2") == 1
    assert terminal.shows("KeyError: 'on rank one'")
    assert terminal.shows("Traceback")
    assert_restored(terminal)
