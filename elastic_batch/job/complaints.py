"""From a pydantic error to one message of ours: field, value, rule, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from elastic_batch.errors import InvalidSetting, UnknownName


def explain(error: ValidationError, model: type[BaseModel]) -> InvalidSetting:
    """Translate the first fault that pydantic found, and name the fields of the others.

    Args:
        error: What validation raised.
        model: The class that was validated; its fields are the known names.
    """
    faults = [(_locate(fault["loc"], model), fault) for fault in error.errors()]
    # A misspelt field often makes another one "missing": the misspelling is the cause.
    place, first = next((pair for pair in faults if pair[1]["type"] == "extra_forbidden"), faults[0])
    complaint = _explain_one(place, [fault for there, fault in faults if there.path == place.path] or [first])
    others = {there.path for there, _ in faults if there.path and not _is_within(complaint.field, there.path)}
    if others:
        complaint.args = (f"{complaint.args[0]} (also wrong: {', '.join(sorted(others))})",)
    return complaint


def _is_within(field: str, section: str) -> bool:
    return f"{field}.".startswith(f"{section}.")


class _Place(NamedTuple):
    """Where a fault is: the dotted path without union tags, and the sections that could be there and around it."""

    path: str
    inside: list[type[BaseModel]]
    around: list[type[BaseModel]]


def _explain_one(place: _Place, faults: Sequence[ErrorDetails]) -> InvalidSetting:
    """Explain the faults of one field: several where it may be of several types."""
    path, fault = place.path, faults[0]
    value, context, kind = fault["input"], fault.get("ctx", {}), fault["type"]
    inner = context.get("error")
    if isinstance(inner, InvalidSetting):
        return _prefixed(inner, path)
    if kind == "extra_forbidden":
        return _unknown_field(path, value, [name for one in place.around for name in one.model_fields])
    if kind == "missing":
        return InvalidSetting(path, None, "is required")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = (_quoted(context["discriminator"]) or ["name"])[0]  # a callable one has no name; ours read `name`
        known = [word for one in place.inside for word in _words(one, tag)]
        if kind == "union_tag_not_found":
            return InvalidSetting(f"{path}.{tag}", None, f"is required: one of {', '.join(sorted(known))}")
        return UnknownName(f"{path}.{tag}", str(context["tag"]), known)
    if kind == "literal_error" and len(faults) == 1 and isinstance(value, str):
        return UnknownName(path, value, _quoted(context["expected"]))
    rules = list(dict.fromkeys(_rule(one) for one in faults))
    return InvalidSetting(path, value, ", or ".join(rules))


def _rule(fault: ErrorDetails) -> str:
    if fault["type"] in ("model_type", "model_attributes_type"):
        return "must be a section with fields of its own"
    if fault["type"] in ("tuple_type", "list_type"):
        value = fault["input"]
        return f"must be a list, as in [{value}]" if isinstance(value, str) else "must be a list"
    error = fault.get("ctx", {}).get("error")
    message = str(error) if error is not None else fault["msg"].replace("Input should be", "must be")
    return message[:1].lower() + message[1:]


def _unknown_field(path: str, value: object, known: Sequence[str]) -> InvalidSetting:
    parent, _, name = path.rpartition(".")
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    rule = f"there is no such field{f' in {parent}' if parent else ''}"
    remedy = f"Did you mean {nearest[0]!r}?" if nearest else f"Known: {', '.join(sorted(known))}"
    return InvalidSetting(path, value, rule, remedy)


def _prefixed(inner: InvalidSetting, path: str) -> InvalidSetting:
    return inner.renamed(f"{path}.{inner.field}" if path and not inner.field.startswith(path) else inner.field)


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _locate(location: tuple[int | str, ...], model: type[BaseModel]) -> _Place:
    """Follow pydantic's location through sections, unions of sections, lists and plain values."""
    inside, around, path = [model], [model], ""
    for step in location:
        owners = [one for one in inside if step in one.model_fields]
        if isinstance(step, int):
            path += f"[{step}]"
        elif not owners and len(inside) > 1:  # a tag: which member of a union pydantic tried
            inside = [one for one in inside if step in _words(one)] or [one for one in inside if not _words(one)]
        elif inside:
            path, around = f"{path}.{step}" if path else step, inside
            inside = [found for owner in owners for found in models_in(owner.model_fields[step].annotation)]
    return _Place(path, inside, around)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field of this type may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def _words(model: type[BaseModel], field: str | None = None) -> list[str]:
    """What the literal fields of a section may say (`sgd`, `grow-batch`), or one of them."""
    fields = [one for name, one in model.model_fields.items() if field in (None, name)]
    return [word for one in fields if get_origin(one.annotation) is Literal for word in get_args(one.annotation)]
