"""One loader of jobs, with one precedence: flag, then environment, then file, then default."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from elastic_batch.errors import InvalidSetting
from elastic_batch.job.complaints import models_in
from elastic_batch.job.job import Job
from elastic_batch.job.yaml_text import parse_yaml

ENVIRONMENT_PREFIX = "ELASTIC_BATCH_"
_SHORT_FORMS = {"schedule.shape": "name", "schedule.warmup": "duration"}
"""Sections that may be written as one word, and the field of theirs that it stands for."""


def load_job(path: Path, *, environ: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None) -> Job:
    """Read a job file (YAML or JSON) and put environment and flags over it.

    Args:
        path: The file.
        environ: `ELASTIC_BATCH_SEED`, `ELASTIC_BATCH_OPTIMIZER__LEARNING_RATE` and so on are taken from here: a field's
            name in capitals, two underscores for a dot, the value as in YAML.
        flags: Dotted field name -> value.

    Raises:
        InvalidSetting: There is no such file, or a field is wrong; the message says which, where it was set, and why.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting("job file", str(path), f"cannot be read ({error})") from error
    fields = parse_yaml(text, "job file", str(path))
    if not isinstance(fields, dict):
        raise InvalidSetting("job file", str(path), "must be a mapping of fields, name: value")
    return resolve_job(fields, environ=environ, flags=flags)


def resolve_job(
    fields: Mapping[str, Any], *, environ: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> Job:
    """Put environment and flags over the fields of a job file and check the result.

    Args:
        fields: As in a job file.
        environ: As in `load_job`.
        flags: Dotted field name -> value.

    Raises:
        InvalidSetting: A field is wrong.
    """
    origins: dict[str, str] = {}
    merged = dict(fields)
    for variable, name, value in _environment_settings(environ or {}):
        merged = _with(merged, name, value)
        origins[name] = variable
    for name, value in (flags or {}).items():
        merged = _with(merged, name, value)
        origins[name] = "the command line"
    try:
        return Job.parse(merged)
    except InvalidSetting as error:
        if error.field in origins:
            error.args = (f"{error.args[0]} (set by {origins[error.field]})",)
        raise


def parse_assignments(assignments: tuple[str, ...]) -> dict[str, Any]:
    """Read `name=value` words of a command line, values as in YAML.

    Raises:
        InvalidSetting: A word has no `=`.

    >>> parse_assignments(("optimizer.learning_rate=5e-2", "data.root=/data"))
    {'optimizer.learning_rate': 0.05, 'data.root': '/data'}
    """
    found = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not re.fullmatch(r"[a-z_]\w*(\.\w+)*", name):
            raise InvalidSetting("--set", assignment, "must be NAME=VALUE, as in optimizer.learning_rate=0.05")
        found[name] = parse_yaml(text, f"--set {name}")
    return found


def _environment_settings(environ: Mapping[str, str]) -> list[tuple[str, str, Any]]:
    """(variable, dotted field, value) of every variable that names a field of a job.

    Other parts of the package have variables with this prefix too, and Kubernetes makes some for a service that is
    called `elastic-batch` (ELASTIC_BATCH_SERVICE_PORT). One that is nearly a field's name, or a section's field alone,
    is a slip.
    """
    settings = []
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        section = name.partition(".")[0]
        if section in Job.model_fields:
            settings.append((variable, name, parse_yaml(environ[variable], variable)))
        elif "service_" not in name and (nearest := get_close_matches(section, _fields_by_word(), n=1, cutoff=0.75)):
            meant = [_variable(field) for field in _fields_by_word()[nearest[0]]]
            rule, remedy = "names no field of a job", f"Did you mean {' or '.join(meant)}?"
            raise InvalidSetting(f"environment variable {variable}", environ[variable], rule, remedy)
    return settings


def _variable(field: str) -> str:
    return ENVIRONMENT_PREFIX + field.upper().replace(".", "__")


@cache
def _fields_by_word() -> dict[str, list[str]]:
    """A word -> the field of that name, or else the sections' fields of that name, dotted."""
    inner: dict[str, list[str]] = {}
    for name, field in Job.model_fields.items():
        for word in {word: None for section in models_in(field.annotation) for word in section.model_fields}:
            inner.setdefault(word, []).append(f"{name}.{word}")
    return inner | {name: [name] for name in Job.model_fields}


def _with(fields: Mapping[str, Any], name: str, value: Any, around: str = "") -> dict[str, Any]:
    """A copy of nested fields, which lie at `around`, with one of them set by its dotted name."""
    first, _, rest = name.partition(".")
    if not rest:
        return {**fields, first: value}
    inner, section = fields.get(first), f"{around}{first}"
    if isinstance(inner, str) and section in _SHORT_FORMS:
        inner = {_SHORT_FORMS[section]: inner}
    return {**fields, first: _with(inner if isinstance(inner, Mapping) else {}, rest, value, f"{section}.")}
