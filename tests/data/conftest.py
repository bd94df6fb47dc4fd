"""Every test of data loading leaves no process behind."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    assert multiprocessing.active_children() == []
