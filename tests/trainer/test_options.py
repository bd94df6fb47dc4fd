"""What a trainer's options may be; each mistake names the option."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from elastic_batch.errors import InvalidSetting
from elastic_batch.trainer.options import _KINDS, TrainerOptions


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("micro_batch_size", "16", "must be a whole number, at least 1"),
        ("micro_batch_size", 4.0, "must be a whole number, at least 1"),
        ("micro_batch_size", True, "must be a whole number, at least 1"),
        ("ghost_batch_size", 0, "must be a whole number, at least 1, or None"),
        ("ghost_batch_size", 3, "must divide micro_batch_size = 16"),
        ("seed", "a", "must be a whole number, from 0 to 18446744073709551615"),
        ("seed", 2**64, "must be a whole number, from 0 to 18446744073709551615"),
        ("max_grad_norm", "1", "must be a number above 0, or None"),
        ("max_grad_norm", float("inf"), "must be a number above 0, or None"),
        ("momentum", 1, "must be from 0 to below 1, or None"),
        ("run_dir", 5, "must be a path, or None"),
        ("resume", True, "must be auto, never, or a path"),
        ("noise_horizon", 0, "must be a whole number, at least 1, or None"),
        ("num_workers", 1.5, "must be a whole number, at least 0"),
        ("micro_batches_per_pass", True, "must be a whole number from 1 on, or auto"),
        ("deterministic", "no", "must be True or False"),
        ("precision", "fp8", "must be float32, bf16 or fp16"),
        ("precision", ["bf16"], "must be float32, bf16 or fp16"),
        ("collate_fn", 3, "must be a function, or None"),
        ("metrics_port", 70_000, "must be a whole number, from 0 to 65535, or None"),
        ("checkpoint_every", "0ep", "must be above 0"),
        ("loggers", ["tensorboard"], "elastic_batch.telemetry.open_loggers"),
        ("loggers", "tensorboard", "elastic_batch.telemetry.open_loggers"),
    ],
)
def test_an_option_of_a_wrong_type_or_size_is_named(name: str, value: Any, rule: str) -> None:
    with pytest.raises(InvalidSetting) as refusal:
        TrainerOptions.of(**{"micro_batch_size": 16, name: value})
    assert refusal.value.field == name
    assert rule in str(refusal.value)


def test_a_whole_number_of_numpy_is_one() -> None:
    assert TrainerOptions.of(micro_batch_size=np.int64(16)).micro_batch_size == 16


def test_every_option_is_checked() -> None:
    assert {*_KINDS, "checkpoint_every"} == {field.name for field in fields(TrainerOptions)}
