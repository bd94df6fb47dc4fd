"""Settings of every test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
ALONE = {"data", "engines", "scaling", "worker"}
"""Directories whose tests start programs that live by the clock: nothing else runs beside them."""

# Small tensors: more threads only fight with the test workers for the same cores.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(TESTS) and item.path.relative_to(TESTS).parts[0] in ALONE:
            item.add_marker("alone")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
