"""The job files that come with the package, found by name."""

from __future__ import annotations

import os
from pathlib import Path

from elastic_batch.errors import InvalidSetting, UnknownName

_FOLDER = Path(__file__).parent / "recipes"
_SUFFIXES = (".yaml", ".yml", ".json")


def recipe_names() -> list[str]:
    """Names of the recipes, in alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe_summary(name: str) -> str:
    """The first comment line of a recipe, which says what it is."""
    first = (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def find_job_file(recipe_or_path: str) -> Path:
    """Find the file of a recipe's name, or of a path to a job file; a recipe goes before a file of the same name.

    Raises:
        UnknownName: No recipe is called so; the message has the nearest name.
        InvalidSetting: There is no such file.
    """
    if recipe_or_path in recipe_names():
        return _FOLDER / f"{recipe_or_path}.yaml"
    path = Path(recipe_or_path)
    if path.is_file():
        return path
    if path.suffix not in _SUFFIXES and os.sep not in recipe_or_path:
        raise UnknownName("recipe", recipe_or_path, recipe_names())
    if path.is_dir():
        raise InvalidSetting("job file", recipe_or_path, "must be a file, and this is a directory")
    raise InvalidSetting("job file", recipe_or_path, f"there is no such file (looked for {path.absolute()})")
