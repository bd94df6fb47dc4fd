"""What the tests of checkpoints share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from elastic_batch import durable
from elastic_batch.checkpoint import CheckpointInfo

# A program of its own, which imports its neighbour.
collect_ignore = ["kill_trial.py"]

Save = tuple[dict[str, Any], CheckpointInfo]
Dying = Callable[[int], AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_save() -> Callable[[int], Save]:
    """A state that its position determines, with the information to save it by."""

    def make(position: int) -> Save:
        generator = torch.Generator().manual_seed(position)
        weights = {"weight": torch.randn(8, 3, generator=generator), "bias": torch.randn(3, generator=generator)}
        state = {"position": position, "model": weights, "history": [0.1, None, "text", (1, True)]}
        return state, CheckpointInfo(position=position, update=position // 32, fingerprint={"seed": 1, "end": 5000})

    return make


@pytest.fixture(scope="session")
def dying() -> Dying:
    """A context in which the process is as good as dead from the given effect on the disk on."""
    module = _load(Path(__file__).with_name("dying_os.py"))

    @contextmanager
    def die_at(moment: int) -> Iterator[None]:
        def die() -> None:
            raise module.Died

        with pytest.MonkeyPatch.context() as patch, suppress(module.Died):
            patch.setattr(durable, "os", module.DyingOs(moment, die))
            yield

    return die_at


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
