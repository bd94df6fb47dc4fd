"""Settings of every test."""

from __future__ import annotations

import torch

# Small tensors: more threads only fight with the test workers for the same cores.
torch.set_num_threads(1)
