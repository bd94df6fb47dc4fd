"""Errors in one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch.utils.data import default_collate

from elastic_batch.errors import InvalidSetting, in_one_line


def _lookup() -> None:
    raise KeyError("x")


def _collate() -> None:
    default_collate([torch.ones(1), torch.ones(2)])


def _caught(act: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as raised:  # noqa: PT011 # any: what becomes of it is the test
        act()
    return raised.value


@pytest.mark.parametrize(("act", "text"), [(_lookup, "KeyError: 'x'"), (_collate, "RuntimeError: stack expects")])
def test_a_foreign_error_says_where_in_the_user_s_code_it_comes_from(act: Callable[[], None], text: str) -> None:
    line = in_one_line(_caught(act))
    assert line.startswith(text)
    assert line.endswith(f" ({__file__}:{inspect.getsourcelines(act)[1] + 1})")


def test_an_error_that_no_user_s_code_had_a_part_in_has_no_place() -> None:
    assert in_one_line(ValueError("two\nlines")) == "ValueError: two lines"
    assert in_one_line(InvalidSetting("seed", -1, "must be at least 0")) == "seed = -1: must be at least 0"
