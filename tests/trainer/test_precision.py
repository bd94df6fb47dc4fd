"""The loss scale: near one for a mean, halved by an overflow, grown after a long time without."""

from __future__ import annotations

import pytest

from elastic_batch.trainer.precision import LossScaler


def test_only_fp16_is_scaled_and_by_the_micro_batch_whatever_the_update() -> None:
    assert LossScaler("float32", 32).divisor(96) == 96
    assert LossScaler("bf16", 32).divisor(96) == 96
    scaler = LossScaler("fp16", 32)
    assert scaler.divisor(96) == scaler.divisor(32) == 32 / scaler.scale


@pytest.mark.parametrize("nominal_weight", [1, 3, 100, 4096])
def test_the_shift_is_a_power_of_two_near_the_weight(nominal_weight: int) -> None:
    scaler = LossScaler("fp16", nominal_weight)
    shift = scaler.scale * scaler.divisor(nominal_weight)
    assert shift.hex().startswith("0x1.0000000000000p")
    assert 0.7 < shift / nominal_weight < 1.42


def test_overflow_halves_and_patience_doubles() -> None:
    scaler = LossScaler("fp16", 1)
    start = scaler.scale
    scaler.record(overflow=True)
    assert scaler.scale == start / 2
    for _ in range(2000):
        scaler.record(overflow=False)
    assert scaler.scale == start


def test_an_overflow_is_not_the_scale_s_doing_where_it_is_least() -> None:
    assert not LossScaler("float32", 1).may_overflow
    scaler = LossScaler("fp16", 1)
    while scaler.may_overflow:
        scaler.record(overflow=True)
    assert scaler.scale == 1


def test_the_state_survives_a_checkpoint() -> None:
    scaler, other = LossScaler("fp16", 8), LossScaler("fp16", 8)
    scaler.record(overflow=True)
    scaler.record(overflow=False)
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict()
