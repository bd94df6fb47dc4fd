"""The console that tables go to."""

from __future__ import annotations

from rich.console import Console

_WIDTH_OF_FILES = 140
"""Columns where the output is not a terminal: wide enough that no table is cut."""


def open_console() -> Console:
    """Standard output, as wide as the terminal, or wide where it is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_OF_FILES)
