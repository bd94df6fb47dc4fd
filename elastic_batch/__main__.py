"""`python -m elastic_batch`, which is also what `torchrun -m elastic_batch train ...` starts."""

from __future__ import annotations

from elastic_batch.cli.main import console

if __name__ == "__main__":
    console()
