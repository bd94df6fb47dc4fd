"""What the tests of checkpoints share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import pytest
import torch
from support.dying_os import Died, DyingOs

from elastic_batch import durable
from elastic_batch.checkpoint import CheckpointInfo

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

    @contextmanager
    def die_at(moment: int) -> Iterator[None]:
        def die() -> None:
            raise Died

        with pytest.MonkeyPatch.context() as patch, suppress(Died):
            patch.setattr(durable, "os", DyingOs(moment, die))
            yield

    return die_at
