"""What `bench_elastic.py` runs under torchrun: a small model, DistributedDataParallel, a checkpoint every 20 steps."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main(folder: Path) -> None:
    """Train until killed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint = folder / "checkpoint.pt"
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        step = state["step"]
    while True:
        loss = model(torch.randn(32, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        time.sleep(0.05)
        if rank == 0:
            with (folder / "steps").open("a") as log:
                log.write(f"{time.monotonic()}\n")
            if step % 20 == 0:
                torch.save({"model": model.state_dict(), "step": step}, folder / "part.pt")
                os.replace(folder / "part.pt", checkpoint)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
