"""Durations: what users write, what it is in samples, and what is refused."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from elastic_batch.errors import InvalidSetting
from elastic_batch.schedule import Duration

ADAPTER = TypeAdapter(Duration)


@pytest.mark.parametrize(
    ("text", "samples"),
    [
        ("90ep", 90 * 1437),
        ("1.5ep", 2156),
        ("0.1ep", 144),
        (".5ep", 719),
        ("2 ep", 2874),
        ("5e6sp", 5_000_000),
        ("1.5e3sp", 1500),
        ("250e9tok", 122_070_313),
        ("0.6dur", 6000),
        ("0", 0),
        ("0ep", 0),
    ],
)
def test_a_duration_becomes_samples(text: str, samples: int) -> None:
    assert Duration.parse(text).samples(num_samples=1437, tokens_per_sample=2048, total=10_000) == samples


def test_the_conversion_is_exact_where_floats_drift() -> None:
    assert 0.07 * 100 > 7, "the reason for this test"
    assert Duration.parse("0.07ep").samples(num_samples=100) == 7
    assert Duration.parse("1e-12ep").samples(num_samples=10**12) == 1


@given(amount=st.decimals("0.001", "1e6", places=3), num_samples=st.integers(1, 10**12))
def test_a_fraction_of_a_sample_counts_as_one(amount: Any, num_samples: int) -> None:
    exact = Fraction(amount) * num_samples
    samples = Duration.parse(f"{amount}ep").samples(num_samples=num_samples)
    assert samples - 1 < exact <= samples


@given(numerator=st.integers(0, 10**9), places=st.integers(0, 6), unit=st.sampled_from(["ep", "sp", "tok", "dur"]))
def test_a_written_duration_reads_back_equal(numerator: int, places: int, unit: str) -> None:
    duration = Duration.parse(
        f"{Fraction(numerator, 10**places)!s}{unit}" if not places else f"{numerator}e-{places}{unit}"
    )
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize(
    ("text", "written"),
    [("5e6sp", "5e6sp"), ("5000000sp", "5e6sp"), ("250e9tok", "250e9tok"), ("90.0ep", "90ep"), ("0.60dur", "0.6dur")],
)
def test_equal_lengths_are_written_alike(text: str, written: str) -> None:
    assert str(Duration.parse(text)) == written
    assert hash(Duration.parse(text)) == hash(Duration.parse(written))


@pytest.mark.parametrize(
    "text", ["90", "ep", "", "-1ep", "90 epochs", "1e400sp", "nanep", "1/2ep", 90, 1.5, None, True]
)
def test_what_is_not_a_number_with_a_unit_is_refused_with_examples(text: Any) -> None:
    with pytest.raises(InvalidSetting, match=r"must be a number with a unit.*Write, say, '90ep'") as caught:
        Duration.parse(text, "max_duration")
    assert caught.value.field == "max_duration"


def test_tokens_need_the_tokens_of_a_sample() -> None:
    with pytest.raises(InvalidSetting, match=r"schedule.warmup = '1e9tok': needs tokens_per_sample"):
        Duration.parse("1e9tok").samples(num_samples=100, field="schedule.warmup")


def test_the_whole_is_not_a_part_of_itself() -> None:
    with pytest.raises(InvalidSetting, match="must not be a part of itself"):
        Duration.parse("1dur").samples(num_samples=100)


def test_in_files_it_is_a_string() -> None:
    duration = ADAPTER.validate_python("90ep")
    assert ADAPTER.dump_python(duration) == "90ep"
    assert ADAPTER.dump_json(duration) == b'"90ep"'
    assert ADAPTER.validate_python(duration) is duration
    assert ADAPTER.validate_python(0) == Duration.parse("0sp")
    assert ADAPTER.json_schema()["type"] == "string"
    with pytest.raises(ValidationError, match="must be a number with a unit"):
        ADAPTER.validate_python("90")
