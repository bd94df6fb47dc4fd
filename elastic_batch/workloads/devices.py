"""Which device a worker computes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from elastic_batch.errors import InvalidSetting
from elastic_batch.launchers import launched_local_rank


def choose_device(setting: str, environ: Mapping[str, str]) -> torch.device:
    """Find the device of this worker: `auto` is the GPU of the local rank, or the CPU where there is none.

    Raises:
        InvalidSetting: A GPU is asked for where there is none.
    """
    available = torch.cuda.is_available()
    if setting.startswith("cuda") and not available:
        raise InvalidSetting("device", setting, "torch sees no GPU here", "Use auto or cpu")
    if setting == "cpu" or not available:
        return torch.device("cpu")
    number = launched_local_rank(environ) % torch.cuda.device_count()
    device = torch.device(setting if ":" in setting else f"cuda:{number}")
    torch.cuda.set_device(device)
    return device
