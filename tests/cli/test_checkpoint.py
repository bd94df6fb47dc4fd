"""`elastic-batch checkpoint`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from elastic_batch.checkpoint import CheckpointInfo, CheckpointStore, Manifest
from elastic_batch.cli.checkpoint import command
from elastic_batch.errors import CheckpointMissing


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints at updates 1 and 2; the newest payload is damaged."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints", clock=lambda: 1_700_000_000.0)
    for update in (1, 2):
        weight = torch.full((2, 2), float(update))
        store.save({"model": {"_orig_mod.weight": weight}}, CheckpointInfo(position=32 * update, update=update))
    newest = next((tmp_path / "run" / "checkpoints").glob("000000000064*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1])
    return tmp_path / "run"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], standalone_mode=False)


def test_a_list_has_the_newest_first(run: Path) -> None:
    shown = call("list", run).output.splitlines()
    assert shown[0].split() == ["checkpoint", "update", "position", "generation", "size", "written"]
    assert [line.split()[1:4] for line in shown[1:]] == [["2", "64", "0"], ["1", "32", "0"]]
    assert shown[1].endswith("2023-11-14 22:13:20 UTC")
    fields = json.loads(call("list", run / "checkpoints", "--json").output)
    assert [entry["update"] for entry in fields] == [2, 1]


def test_a_list_names_what_cannot_be_read_and_an_empty_place(run: Path, tmp_path: Path) -> None:
    next((run / "checkpoints").glob("*.json")).write_text("{")
    assert "damaged" in call("list", run).output
    damaged, whole = sorted(json.loads(call("list", run, "--json").output), key=lambda entry: entry["damage"] is None)
    assert set(damaged) == {"name", "damage"}
    assert whole["damage"] is None
    assert "There is no checkpoint in" in call("list", tmp_path).output


def test_verifying_tells_the_whole_from_the_damaged(run: Path) -> None:
    result = call("verify", run)
    assert result.return_value == 1
    whole, damaged = result.output.splitlines()[0], " ".join(result.output.splitlines()[1:])
    assert whole.startswith("whole   000000000032-g0-")
    assert damaged.startswith("damaged 000000000064-g0-")
    entries = json.loads(call("verify", run, "--json").output)
    assert [entry["damage"] is None for entry in entries] == [True, False]
    good = call("verify", run / "checkpoints" / entries[0]["name"])
    assert (good.return_value, good.output.count("whole")) == (0, 1)


def test_a_checkpoint_that_is_pruned_while_others_are_verified_is_no_fault(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = run / "checkpoints"
    verify, older = CheckpointStore.verify, next(checkpoints.glob("000000000032*.json"))
    next(checkpoints.glob("000000000064*.json")).unlink()
    CheckpointStore(checkpoints).save({"model": {}}, CheckpointInfo(position=96, update=3))

    def verify_while_the_run_goes_on(store: CheckpointStore, name: str) -> Manifest:
        older.unlink(missing_ok=True)
        return verify(store, name)

    monkeypatch.setattr(CheckpointStore, "verify", verify_while_the_run_goes_on)
    result = call("verify", run)
    assert (result.return_value, result.output.count("whole"), result.output.count("\n")) == (0, 1, 1)
    assert isinstance(call("verify", older.with_suffix("")).exception, CheckpointMissing)


def test_an_export_takes_the_newest_good_one(run: Path, tmp_path: Path) -> None:
    result = call("export", run, tmp_path / "weights.safetensors")
    assert "(update 1)" in result.output
    from safetensors.torch import load_file

    assert load_file(tmp_path / "weights.safetensors")["weight"].tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    "arguments", [("verify", "."), ("verify", "nowhere"), ("export", ".", "w.pt"), ("list", "nowhere")]
)
def test_a_place_without_checkpoints_is_one_error(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(call(*arguments).exception, CheckpointMissing)
