"""The lowest rows of a terminal, kept for a panel while everything else scrolls by above.

The panel is left out of what the terminal scrolls (by the margins of DEC's VT100), and the cursor is always where text
goes. So what this rank prints, or any other, or the launcher, stands whole above the panel and is never drawn over.
Only rows that have changed are sent. The window may change its size at any time: then everything is drawn anew.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

Picture: TypeAlias = Callable[[int, int], Sequence[str]]  # at most so many columns and rows -> a line for each row
RESTORE = "\x1b7\x1b[r\x1b8\x1b[J"  # the whole terminal scrolls again; whatever a panel has left there is erased
ROWS_ABOVE = 4  # at least, for everything else
_SAVE, _BACK, _DOWN = "\x1b7", "\x1b8", "\x1bD"  # cursor and colours; a line down, scrolling at the end


class Panel:
    """A panel on a terminal of `size()` columns and rows, drawn by means of `write`."""

    def __init__(self, write: Callable[[str], None], size: Callable[[], tuple[int, int]]) -> None:
        self._write, self._size_now = write, size
        self._size: tuple[int, int] | None = None  # when it was last drawn
        self._drawn: list[str] = []
        self._recent: deque[str] = deque(maxlen=200)  # lines above, to be shown again when the size changes

    def show(self, picture: Picture, above: Sequence[str] = ()) -> None:
        """Print the lines `above`, which stay, and have the `picture` in the panel."""
        columns, rows = size = self._size_now()
        room = rows - ROWS_ABOVE if rows > ROWS_ABOVE else min(1, max(0, rows - 2))
        lines = picture(columns - 1, room)[:room] if room else []
        self._recent.extend(above)
        parts = [f"{line}\r\n" for line in above]
        if self._size not in (None, size):
            # Where the rows are now depends on the terminal; no guess is as good as a clean screen.
            again = list(self._recent)[-max(1, rows - len(lines) - 1) :]
            parts = ["\x1b[r\x1b[2J\x1b[H", *(f"{line[:columns]}\r\n" for line in again)]
            self._drawn = []
        if len(lines) != len(self._drawn) or self._size != size:
            parts.append(self._make_room(rows, len(lines)))
        first = rows - len(lines) + 1
        for row, line in enumerate(lines):
            if row >= len(self._drawn) or line != self._drawn[row]:
                parts.append(f"{_SAVE}\x1b[{first + row};1H{line}\x1b[K{_BACK}")
        self._size, self._drawn = size, list(lines)
        if parts:
            self._write("".join(parts))

    def close(self, picture: Picture, above: Sequence[str] = ()) -> None:
        """Give the rows back, and leave the picture behind as if it had been printed."""
        columns, rows = self._size_now()
        lines = picture(columns - 1, max(1, rows - ROWS_ABOVE))
        self._write(RESTORE + "".join(f"{line}\r\n" for line in (*above, *lines)))
        self._size, self._drawn = None, []

    def _make_room(self, rows: int, height: int) -> str:
        """Scroll what is in the way of a panel of so many rows, and set the margins above it."""
        more = height - len(self._drawn)
        scroll = _DOWN * more + f"\x1b[{more}A" if more > 0 else ""
        freed = range(rows - len(self._drawn) + 1, rows - height + 1)
        erase = "".join(f"\x1b[{row};1H\x1b[2K" for row in freed)
        self._drawn = []
        return f"{scroll}{_SAVE}{erase}\x1b[1;{rows - height}r{_BACK}"


def window_size(descriptor: int) -> Callable[[], tuple[int, int]]:
    """A function that tells the columns and rows of the window behind `descriptor` as they are now.

    A rank's own standard output is the launcher's, so `distprop run` names its terminal in DISTPROP_WINDOW, with the
    host; on another one, the size at the start is all that is known.
    """
    host, named, path = os.environ.get("DISTPROP_WINDOW", "").partition(":")

    def size() -> tuple[int, int]:
        columns = rows = 0
        with contextlib.suppress(OSError):
            if not named:
                columns, rows = os.get_terminal_size(descriptor)
            elif path and host == os.uname().nodename:  # and not in another container of this name, say
                window = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
                try:
                    columns, rows = os.get_terminal_size(window)
                finally:
                    os.close(window)
        return columns or _number("COLUMNS", 80), rows or _number("LINES", 24)

    return size


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and int(text) > 0 else default
