"""Settings of every test."""

from __future__ import annotations

import pytest
import torch

# Small tensors: more threads only fight with the test workers for the same cores.
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
