"""Weights out of checkpoints, and into models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from elastic_batch.checkpoint import CheckpointInfo, CheckpointStore, export, locate, open_checkpoint, read_weights
from elastic_batch.errors import CheckpointDamaged, CheckpointMissing, InvalidSetting


class Tied(nn.Module):
    """Shares a weight, normalizes, and has a convolution in channels-last memory."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight


def saved(place: Path, state: dict[str, Any]) -> CheckpointStore:
    store = CheckpointStore(place)
    store.save(state, CheckpointInfo(position=64, update=2))
    return store


def equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_an_export_loads_strictly_into_the_plain_model(tmp_path: Path, suffix: str) -> None:
    model = Tied()
    compiled = {name.replace("features.", "features._orig_mod."): value for name, value in model.state_dict().items()}
    saved(tmp_path / "run" / "checkpoints", {"model": {f"_orig_mod.{name}": value for name, value in compiled.items()}})
    output = tmp_path / "out" / f"weights{suffix}"
    export(open_checkpoint(str(tmp_path / "run")), output)
    weights = load_file(output) if suffix == ".safetensors" else torch.load(output, weights_only=True)
    fresh = Tied()
    fresh.load_state_dict(weights, strict=True)
    assert equal(fresh.state_dict(), model.state_dict())
    assert equal(read_weights(output), model.state_dict())
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_an_export_says_where_it_comes_from(tmp_path: Path) -> None:
    store = saved(tmp_path / "c", {"model": nn.Linear(2, 2).state_dict()})
    newest = store.load_newest()
    assert newest is not None
    export(newest, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "position": "64", "update": "2"}


def test_other_entries_are_named_with_dots(tmp_path: Path) -> None:
    average = nn.Linear(2, 2).state_dict()
    checkpoint = saved(tmp_path / "c", {"model": {}, "attached": {"ema": average}}).load_newest()
    assert checkpoint is not None
    export(checkpoint, tmp_path / "w.pt", entry="attached.ema")
    assert equal(read_weights(tmp_path / "w.pt"), average)
    with pytest.raises(InvalidSetting, match="'swa' is not one of: ema"):
        export(checkpoint, tmp_path / "w.pt", entry="attached.swa")
    with pytest.raises(InvalidSetting, match="must name a state_dict"):
        export(checkpoint, tmp_path / "w.pt", entry="attached")


def test_what_a_format_cannot_hold_is_named(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "c", {"model": {"weight": torch.ones(1), "_extra_state": 3}}).load_newest()
    assert checkpoint is not None
    with pytest.raises(InvalidSetting, match=r"not _extra_state\. Export to \.pt instead"):
        export(checkpoint, tmp_path / "w.safetensors")
    with pytest.raises(InvalidSetting, match=r"must end with one of \.safetensors, \.pt"):
        export(checkpoint, tmp_path / "w.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_safetensors_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved(tmp_path / "c", {"model": {"weight": torch.ones(1)}}).load_newest()
    assert checkpoint is not None
    save_file({"weight": torch.ones(1)}, tmp_path / "w.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InvalidSetting, match=r"pip install 'elastic-batch\[safetensors\]'"):
        export(checkpoint, tmp_path / "x.safetensors")
    with pytest.raises(InvalidSetting, match=r"pip install 'elastic-batch\[safetensors\]'"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("entry", [None, "model", "state_dict", "model_state_dict"])
def test_weights_are_found_in_files_of_other_programs(tmp_path: Path, entry: str | None) -> None:
    weights = nn.Linear(2, 2).state_dict()
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    torch.save({entry: wrapped, "epoch": 3} if entry else wrapped, tmp_path / "w.pt")
    assert equal(read_weights(tmp_path / "w.pt"), weights)


def test_weights_are_read_from_runs_checkpoints_and_bare_payloads(tmp_path: Path) -> None:
    weights = nn.Linear(2, 2).state_dict()
    directory = tmp_path / "run" / "checkpoints"
    name = saved(directory, {"model": weights}).manifests()[0].name
    (tmp_path / f"{name}.pt").write_bytes((directory / f"{name}.pt").read_bytes())
    places = [
        tmp_path / "run",
        directory,
        directory / f"{name}.pt",
        directory / f"{name}.json",
        tmp_path / f"{name}.pt",
    ]
    for place in places:
        assert equal(read_weights(place), weights)
    assert equal(read_weights(f"local://{directory}"), weights)


def test_a_pickled_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(CheckpointDamaged, match=r"save model\.state_dict\(\)"):
        read_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_is_not_whole_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"not much")
    with pytest.raises(CheckpointDamaged, match=f"w{suffix}"):
        read_weights(path)


def test_places_without_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match=r"no weights at .*nothing\.pt"):
        read_weights(tmp_path / "nothing.pt")
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(CheckpointMissing, match="there is no state_dict in"):
        read_weights(tmp_path / "w.pt")
    with pytest.raises(CheckpointMissing, match="there is no checkpoint in"):
        read_weights(tmp_path)
    with pytest.raises(CheckpointMissing, match="there is no run or checkpoint at"):
        open_checkpoint(str(tmp_path / "nowhere"))


def test_a_checkpoint_may_be_named_in_a_url(tmp_path: Path) -> None:
    name = saved(tmp_path, {"model": {"weight": torch.ones(1)}}).manifests()[0].name
    store, found = locate(f"file://{tmp_path}/{name}.json")
    assert (store.location, found) == (str(tmp_path), name)
    assert open_checkpoint(f"local://{tmp_path}/{name}").manifest.name == name
