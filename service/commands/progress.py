"""A progress bar on a terminal; nothing where nobody looks."""

import sys
from typing import Self

WIDTH = 30
ERASE_LINE = "\r\x1b[K"


class Bar:
    """How far the work is, on the standard error output. Not safe to share between threads."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._is_seen = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._write(ERASE_LINE)

    def show(self, done: int, in_all: int, note: str = "") -> None:
        """Say that `done` of `in_all` are done."""
        filled = WIDTH * done // max(in_all, 1)
        self._write(
            f"{ERASE_LINE}[{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{in_all} {self._unit} {note}".rstrip()
        )

    def _write(self, text: str) -> None:
        if self._is_seen:
            print(text, end="", file=sys.stderr, flush=True)
