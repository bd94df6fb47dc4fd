"""Conversion of models, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from elastic_batch.errors import InvalidSetting
from elastic_batch.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d, convert_batch_norm


def small_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), nn.Flatten()
    )


class OwnForward(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_every_batch_norm_is_converted_and_counted() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm3d(2)), nn.Linear(2, 2))
    assert convert_batch_norm(model, 8) == 3
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(GhostBatchNorm1d) == kinds.count(GhostBatchNorm2d) == kinds.count(GhostBatchNorm3d) == 1
    assert convert_batch_norm(model, 8) == 0


def test_a_model_that_is_a_norm_is_converted() -> None:
    norm = nn.BatchNorm1d(3)
    assert convert_batch_norm(norm, 4) == 1
    assert type(norm) is GhostBatchNorm1d


def test_modules_parameters_and_states_stay_what_they_were() -> None:
    model = small_model()
    model[2].eval()
    before = {id(tensor) for tensor in (*model.parameters(), *model.buffers(), *model.modules())}
    names = list(model.state_dict())
    calls: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, output: calls.append(output))
    convert_batch_norm(model, 2)
    assert {id(tensor) for tensor in (*model.parameters(), *model.buffers(), *model.modules())} == before
    assert list(model.state_dict()) == names
    assert [module.training for module in model] == [True, True, False, True]
    model(torch.randn(2, 3, 5, 5))
    assert len(calls) == 1


def test_the_trained_state_loads_into_the_plain_model() -> None:
    plain, model = small_model(), small_model()
    convert_batch_norm(model, 2)
    for _ in range(3):
        model(torch.randn(4, 3, 5, 5))
    plain.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(3, 3, 5, 5)
    assert torch.equal(plain.eval()(x), model.eval()(x))


def test_a_shared_norm_is_converted_once_and_stays_shared() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.ReLU(), norm)
    assert convert_batch_norm(model, 2) == 1
    assert model[0] is model[2]


def test_norms_that_do_not_mix_samples_are_left_alone() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, track_running_stats=True))
    twin = copy.deepcopy(model)
    assert convert_batch_norm(model, 4) == 0
    assert [type(module) for module in model] == [type(module) for module in twin]


def test_ghost_norms_that_were_placed_by_hand_keep_their_size() -> None:
    model = nn.Sequential(GhostBatchNorm1d(3, 2), nn.BatchNorm1d(3))
    assert convert_batch_norm(model, 8) == 1
    assert [module.ghost_batch_size for module in model] == [2, 8]


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (nn.SyncBatchNorm(3), r"SyncBatchNorm \(1\)': its statistics span workers"),
        (nn.LazyBatchNorm2d(), r"LazyBatchNorm2d \(1\)': a lazy norm has no parameters yet"),
        (OwnForward(3), r"OwnForward \(1\)': this kind of batch norm has a forward pass of its own"),
    ],
    ids=["sync", "lazy", "own"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_norms_that_cannot_be_converted_are_refused_and_nothing_is_changed(norm: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), norm)
    with pytest.raises(InvalidSetting, match=message):
        convert_batch_norm(model, 4)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_ghost_batch_size_below_one_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="ghost_batch_size = 0: must be a number of samples"):
        convert_batch_norm(small_model(), 0)


def test_the_norm_and_activation_of_timm_is_converted() -> None:
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(layers.BatchNormAct2d(3, inplace=False, drop_layer=nn.Identity)).double()
    twin = copy.deepcopy(model)
    assert convert_batch_norm(model, 2) == 1
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.cat([twin(part) for part in x.split(2)]))
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model.eval()(x), twin.eval()(x))
