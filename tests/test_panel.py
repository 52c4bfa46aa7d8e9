"""The panel on an emulated terminal: text scrolls by above it and is never lost, and nothing of it is left behind."""

import os

import pyte
import pytest

from distprop.panel import RESTORE, Panel, window_size


class Window:
    """An emulated terminal with its history, and a panel on it."""

    def __init__(self, columns: int = 30, rows: int = 12) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=1000, ratio=0.5)
        self.stream = pyte.Stream(self.screen)
        self.sent: list[str] = []
        self.panel = Panel(self.write, lambda: (self.screen.columns, self.screen.lines))

    def write(self, text: str) -> None:
        self.sent.append(text)
        self.stream.feed(text)

    def show(self, *lines: str, above: list[str] | tuple[str, ...] = ()) -> None:
        self.panel.show(lambda columns, rows: lines[:rows], above)

    def rows(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    def text(self) -> list[str]:
        """Everything ever printed that is still to be seen, history included."""
        gone = ["".join(line[x].data for x in range(self.screen.columns)).rstrip() for line in self.screen.history.top]
        return [line for line in gone + self.rows() if line]


def test_the_panel_has_the_lowest_rows_and_text_goes_on_where_it_was() -> None:
    window = Window()
    window.write("before\r\n")
    window.show("one", "two")
    window.write("after")
    assert window.rows() == ["before", "after", *[""] * 8, "one", "two"]


@pytest.mark.parametrize("printed", [3, 10, 11, 12, 40])
def test_no_text_is_lost_whoever_prints_it(printed: int) -> None:
    window = Window()
    said = [f"line {number}" for number in range(printed)]
    window.write("".join(f"{line}\r\n" for line in said))
    for number in range(30):
        window.show(*(f"panel {number} {row}" for row in range(1 + number % 5)), above=[f"mine {number}"])
        window.write(f"other {number}\r\n")
        said += [f"mine {number}", f"other {number}"]
    window.panel.close(lambda columns, rows: ["last"])
    assert window.text() == [*said, "last"]


def test_a_line_that_is_not_complete_stays_so() -> None:
    window = Window()
    window.write("\r\n" * 20 + "loading ... ")
    window.show("panel", "panel")
    window.write("done")
    assert "loading ... done" in window.rows()


def test_only_what_has_changed_is_sent() -> None:
    window = Window()
    window.show("one", "two", "three")
    window.show("one", "2", "three")
    assert "2" in window.sent[-1]
    assert "one" not in window.sent[-1]
    assert "three" not in window.sent[-1]
    count = len(window.sent)
    window.show("one", "2", "three")
    assert len(window.sent) == count


def test_the_end_leaves_a_terminal_that_scrolls_as_a_whole() -> None:
    window = Window(rows=10)
    window.show("one", "two", above=["text"])
    window.panel.close(lambda columns, rows: ["one", "two"], ["the end"])
    assert window.rows()[:5] == ["text", "the end", "one", "two", ""]
    window.write("\r\n".join(f"line {number}" for number in range(30)))
    assert window.rows() == [f"line {number}" for number in range(20, 30)]


def test_what_a_killed_rank_leaves_is_put_right_and_no_harm_is_done_where_there_is_nothing() -> None:
    window = Window(rows=10)
    window.show("one", "two", above=["text"])
    window.write(RESTORE + "report\r\n")
    assert window.rows() == ["text", "report", *[""] * 8]
    before = window.rows()
    window.write(RESTORE)
    assert window.rows() == before
    assert window.screen.cursor.y == 2


@pytest.mark.parametrize("size", [(50, 20), (20, 12), (30, 7), (5, 5), (30, 4), (30, 3), (1, 1)])
def test_a_window_that_changes_its_size_is_drawn_anew(size: tuple[int, int]) -> None:
    columns, rows = size
    window = Window()
    window.show("one", "two", above=["text 1", "text 2"])
    window.screen.resize(rows, columns)
    window.show("one", "two", above=["text 3"])
    window.show("one", "2", above=[])
    if rows >= 6:
        assert window.rows()[-2:] == ["one"[:columns], "2"]
        assert [line for line in window.rows()[:-2] if line] == ["text 1", "text 2", "text 3"][-(rows - 3) :]
    window.screen.resize(12, 30)
    window.show("one", "three")
    assert window.rows() == ["text 1", "text 2", "text 3", *[""] * 7, "one", "three"]


def test_the_size_is_that_of_the_window_that_the_launcher_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
        monkeypatch.delenv("DISTPROP_WINDOW", raising=False)
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setenv("LINES", "50")
        assert window_size(theirs)() == (77, 33)
        pipe = os.pipe()
        assert window_size(pipe[1])() == (100, 50)
        host = os.uname().nodename
        for window, size in {
            f"{host}:{os.ttyname(theirs)}": (77, 33),
            f"another-{host}:{os.ttyname(theirs)}": (100, 50),
            f"{host}:/nowhere": (100, 50),
        }.items():
            monkeypatch.setenv("DISTPROP_WINDOW", window)
            assert window_size(pipe[1])() == size
        monkeypatch.setenv("LINES", "many")
        monkeypatch.delenv("COLUMNS")
        assert window_size(pipe[1])() == (80, 24) if window.endswith("nowhere") else (77, 33)
    finally:
        for descriptor in (ours, theirs, *pipe):
            os.close(descriptor)
