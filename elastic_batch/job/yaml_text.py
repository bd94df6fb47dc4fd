"""YAML as users expect it: 1e-3 is a number, `no` and 2024-01-01 are words, a repeated key is an error."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml.nodes import MappingNode

from elastic_batch.errors import InvalidSetting


class _Loader(yaml.SafeLoader):
    """Safe loader with the scalars of YAML 1.2's core schema; PyYAML's own are those of YAML 1.1."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own shape

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                rule = "a list or a mapping cannot be a field's name; put text with brackets or braces in quotes"
                raise yaml.constructor.ConstructorError(None, None, rule, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
for _tag, _pattern, _first in (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", _INTEGER, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern.pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: _to_float(node.value))


def parse_yaml(text: str, setting: str, value: str | None = None) -> Any:
    """Parse one YAML (hence also JSON) document.

    Args:
        text: The document.
        setting: What it is, for the message (a flag, a variable's name).
        value: What was given for it; None: the text.

    Raises:
        InvalidSetting: The text is not YAML; the message has line and column.

    >>> parse_yaml("{rate: 1e-3, strategy: no, every: 0:768}", "example")
    {'rate': 0.001, 'strategy': 'no', 'every': '0:768'}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InvalidSetting(setting, value or text, f"is not valid YAML{place}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise InvalidSetting(setting, value or text, f"is not valid YAML: {error}") from error


def format_yaml(value: Any) -> str:
    """Write plain data as YAML that `parse_yaml` reads back equal, fields in the given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes a string exactly where the loader above would read something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _to_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
