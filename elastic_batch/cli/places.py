"""What a command line names on the disk, looked at before anything starts."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

import click

from elastic_batch.errors import InvalidSetting

PATH = click.Path(path_type=Path)
"""Type of an option that is a path."""
_WORDS = ("auto", "never")
"""What `--resume` takes besides a path."""


def require_directory(setting: str, path: str | Path) -> None:
    """Refuse a directory that is there and cannot be written to, or could not be made; nothing is made.

    Raises:
        InvalidSetting: It is a file, say, or another user's.
    """
    place = Path(path).absolute()
    nearest = next(one for one in (place, *place.parents) if one.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InvalidSetting(setting, str(path), "must be a directory that can be written to")


def require_file(setting: str, path: str | Path, rule: str) -> None:
    """Refuse a path that is no file.

    Raises:
        InvalidSetting: There is no such file.
    """
    if not Path(path).is_file():
        raise InvalidSetting(setting, str(path), rule, f"There is no file {Path(path).absolute()}")


def check_resume(resume: str) -> None:
    """Refuse a misspelt word, or none; whether there is a checkpoint at a path is seen when it is read.

    Raises:
        InvalidSetting: It is nearly `auto` or `never`, and no path. Or it is empty.
    """
    rule = "must be auto, never, or the path of a checkpoint or run"
    if not resume:
        raise InvalidSetting("--resume", resume, rule)
    nearest = get_close_matches(resume, _WORDS, n=1)
    if resume not in _WORDS and nearest and os.sep not in resume and not Path(resume).exists():
        raise InvalidSetting("--resume", resume, rule, f"Did you mean {nearest[0]!r}?")
