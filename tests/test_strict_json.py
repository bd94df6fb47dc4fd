"""JSON that every reader accepts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_batch.strict_json import to_json

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=10,
)


@settings(deadline=None)
@given(value=values)
def test_plain_values_come_back_as_they_were(value: object) -> None:
    text = to_json(value)
    assert json.loads(text) == value
    assert "\n" not in text


def test_numbers_that_are_not_finite_become_null() -> None:
    assert (
        to_json([float("nan"), float("inf"), -float("inf"), {"a": np.float32("nan")}])
        == '[null, null, null, {"a": null}]'
    )


def test_numbers_of_numpy_and_torch_become_plain_ones_and_other_objects_text() -> None:
    values = [np.float64(0.5), np.int64(3), torch.tensor(2.0), Path("a/b"), {1: 2}]
    assert to_json(values) == '[0.5, 3, 2.0, "a/b", {"1": 2}]'
