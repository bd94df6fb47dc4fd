"""Users' own code, named in a job file as `package.module:attribute`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from elastic_batch.errors import InvalidSetting, UnknownName


def load_target(field: str, target: str) -> Any:
    """Import what a target names; the working directory is searched too, as for `python -m`.

    Args:
        field: The job file's field, for the message.
        target: `package.module:attribute`, the attribute with dots for nesting.

    Raises:
        InvalidSetting: The module cannot be imported.
        UnknownName: The module has no such attribute.

    >>> load_target("model.target", "collections:OrderedDict").__name__
    'OrderedDict'
    """
    module_name, _, attribute = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = import_module(module_name)
    except ImportError as error:
        remedy = "Start elastic-batch where the module can be imported from, or install it"
        raise InvalidSetting(field, target, f"module {module_name} cannot be imported ({error})", remedy) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise UnknownName(field, name, [known for known in dir(found) if not known.startswith("_")])
        found = getattr(found, name)
    return found


def call_target(field: str, target: str, args: Mapping[str, Any], *positional: Any, **fixed: Any) -> Any:
    """Call what a target names with its `args`.

    Raises:
        InvalidSetting: It cannot be imported, or cannot be called with these arguments.
    """
    function = load_target(field, target)
    if not callable(function):
        raise InvalidSetting(field, target, f"must name a function or a class; it is a {type(function).__name__}")
    return call_with_args(field.rpartition(".")[0] + ".args", function, args, *positional, **fixed)


def call_with_args(field: str, function: Any, args: Mapping[str, Any], *positional: Any, **fixed: Any) -> Any:
    """Call a function with arguments of a job file, which win over `fixed` ones.

    Raises:
        InvalidSetting: It does not take such arguments.
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)
    given = {**fixed, **args}
    try:
        _bind(function, positional, given)
    except TypeError as error:
        raise InvalidSetting(field, dict(args), f"{name} refuses them: {error}") from error
    try:
        return function(*positional, **given)
    except (TypeError, ValueError) as error:
        if not args:
            raise  # of the function's own making
        raise InvalidSetting(field, dict(args), f"{name} refuses them: {error}") from error


def _bind(function: Any, positional: Sequence[Any], given: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a builtin that does not tell
        return
    signature.bind(*positional, **given)
