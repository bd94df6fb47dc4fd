"""Plain weights: out of a checkpoint for other programs, and into a model that starts from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_batch.checkpoint.locate import open_checkpoint
from elastic_batch.checkpoint.manifest import generation_of
from elastic_batch.checkpoint.payload import save_to
from elastic_batch.checkpoint.store import Checkpoint
from elastic_batch.durable import PendingFile, temporary_beside
from elastic_batch.errors import CheckpointDamaged, CheckpointMissing, InvalidSetting

# Put in front of every name by torch.compile; a compiled part of a model has it in the middle of its names.
_COMPILED = "_orig_mod."
# Put in front of every name by DistributedDataParallel, in files of other programs.
_DISTRIBUTED = "module."
_USUAL_ENTRIES = ("model", "state_dict", "model_state_dict")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def plain_weights(checkpoint: Checkpoint, entry: str = "model") -> dict[str, Any]:
    """The `state_dict` of the unconverted, uncompiled model in a checkpoint.

    Args:
        checkpoint: A checkpoint.
        entry: Where in its state; dots go deeper.

    Raises:
        InvalidSetting: There is no state_dict there.
    """
    found: Any = checkpoint.state
    for part in entry.split("."):
        if not isinstance(found, Mapping) or part not in found:
            known = ", ".join(map(str, found)) if isinstance(found, Mapping) and found else "there is nothing inside"
            raise InvalidSetting(
                "entry", entry, f"must name an entry of the checkpoint; {part!r} is not one of: {known}"
            )
        found = found[part]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise InvalidSetting("entry", entry, "must name a state_dict: names with tensors")
    return _plain_names(found)


def export(checkpoint: Checkpoint, output: str | os.PathLike[str], *, entry: str = "model") -> None:
    """Write a checkpoint's weights as a plain `state_dict`; it loads with `strict=True` into the plain model.

    Args:
        checkpoint: A checkpoint.
        output: A file, replaced if there; its suffix decides: `.safetensors`, or `.pt`, `.pth`, `.bin` for torch.
        entry: Where in its state; dots go deeper (`attached.ema` for an attached object of that name, say).

    Raises:
        InvalidSetting: An unknown suffix, no such entry, or safetensors is not installed or cannot hold what is there.
        OSError: The disk is full or fails; a file that was there is as it was.
    """
    path = Path(output)
    weights = plain_weights(checkpoint, entry)
    if path.suffix not in _SUFFIXES:
        raise InvalidSetting("output", str(path), f"must end with one of {', '.join(_SUFFIXES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with PendingFile(temporary_beside(path)) as pending:
        if path.suffix == ".safetensors":
            pending.write(_safetensors(weights, path, checkpoint))
        else:
            save_to(weights, pending)
        pending.sync()
        pending.publish(path)


def read_weights(place: str | os.PathLike[str]) -> dict[str, Any]:
    """Read weights to start a model from, without running code that may be in them.

    Args:
        place: A `.safetensors` or torch file that holds a state_dict, alone or under a usual name (`model`,
            `state_dict`, `model_state_dict`); or a run directory, a checkpoint or a URL of checkpoints.

    Raises:
        CheckpointMissing: There is nothing of that name, or no state_dict in it.
        CheckpointDamaged: The file cannot be read, or only by running code.
    """
    path = Path(place)
    if "://" in os.fspath(place) or path.is_dir() or _has_manifest(path):
        return plain_weights(open_checkpoint(os.fspath(place)))
    if not path.is_file():
        raise CheckpointMissing(f"there are no weights at {path}. Name a file, a checkpoint or a run directory")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    weights = _plain_names(_find_state_dict(content, path))
    if all(name.startswith(_DISTRIBUTED) for name in weights):
        weights = {name.removeprefix(_DISTRIBUTED): value for name, value in weights.items()}
    return weights


def _plain_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace(_COMPILED, ""): value for name, value in weights.items()}


def _has_manifest(path: Path) -> bool:
    return generation_of(path.stem) is not None and path.with_suffix(".json").is_file()


def _safetensors(weights: Mapping[str, Any], path: Path, checkpoint: Checkpoint) -> bytes:
    others = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        raise InvalidSetting(
            "output", str(path), f"safetensors holds tensors only, not {', '.join(others)}", "Export to .pt instead"
        )
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise _needs_safetensors("output", path) from error
    # Tied weights get one copy for each name, so that every name of the model is in the file and loads strictly.
    copies = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    manifest = checkpoint.manifest
    metadata = {"format": "pt", "position": str(manifest.position), "update": str(manifest.update)}
    return save(copies, metadata=metadata)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise _needs_safetensors("init_from", path) from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointDamaged(str(path), f"not a whole safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        # torch raises errors of many kinds here; each means that the file is no use as it is.
        raise CheckpointDamaged(
            str(path),
            f"torch.load(weights_only=True) cannot read it ({type(error).__name__}). If it is a whole pickled model, "
            "load it where it was made and save model.state_dict()",
        ) from error


def _find_state_dict(content: Any, path: Path) -> Mapping[str, Any]:
    candidates = [content, *(content.get(entry) for entry in _USUAL_ENTRIES)] if isinstance(content, Mapping) else []
    for candidate in candidates:
        if isinstance(candidate, Mapping) and any(isinstance(value, Tensor) for value in candidate.values()):
            return candidate
    raise CheckpointMissing(f"there is no state_dict in {path}: neither itself nor under {', '.join(_USUAL_ENTRIES)}")


def _needs_safetensors(field: str, path: Path) -> InvalidSetting:
    return InvalidSetting(
        field, str(path), "needs the package safetensors", "Run: pip install 'elastic-batch[safetensors]'"
    )
