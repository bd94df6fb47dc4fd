"""The average of the weights, in every type."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from elastic_batch import EMA


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_small_steps_add_up_in_every_type(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 1).to(dtype)
    nn.init.constant_(model.weight, 1.0)
    ema = EMA(model, horizon=10_000)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(1000):
        ema.after_update(10)
    expected = torch.full((1, 2), 2 - math.exp(-1))
    torch.testing.assert_close(ema.state_dict()["weight"].float(), expected, rtol=1e-4, atol=0)
    assert ema.model.weight.dtype == dtype
    torch.testing.assert_close(ema.model.weight, expected.to(dtype), rtol=1e-4, atol=0, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_goes_on_where_it_was_and_fits_a_plain_model(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(dtype)
    ema, later = EMA(model, horizon=100), EMA(model, horizon=100)
    nn.init.ones_(model.get_parameter("0.weight"))
    ema.after_update(7)
    later.load_state_dict(copy.deepcopy(ema.state_dict()))
    for each in (ema, later):
        each.after_update(7)
    plain = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(dtype)
    plain.load_state_dict(later.state_dict())
    for name, value in ema.model.state_dict().items():
        assert torch.equal(later.model.state_dict()[name], value)
        assert torch.equal(plain.state_dict()[name], value)
