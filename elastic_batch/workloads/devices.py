"""Which device a worker computes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from elastic_batch.errors import InvalidSetting


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
    local_rank = int(environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", "0")))
    device = torch.device(setting) if ":" in setting else torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
