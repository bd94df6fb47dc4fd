"""How the command was called."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Invocation:
    """One call of the command line; subcommands get it as click's object.

    Args:
        arguments: What follows the program's name.
        environ: Where `ELASTIC_BATCH_*` and a launcher's variables are read.
    """

    arguments: Sequence[str]
    environ: Mapping[str, str]

    @property
    def rank(self) -> int:
        """This worker's rank as the launcher says it; 0 without one."""
        return int(self.environ.get("RANK", self.environ.get("SLURM_PROCID", "0")))

    @property
    def was_restarted(self) -> bool:
        """Whether torchrun or Slurm started this job again after it had ended early."""
        return any(self.environ.get(name, "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))

    def with_options(self, **options: str) -> str:
        """This command line with other values for some options, as one would type it.

        >>> Invocation(["train", "digits", "--resume", "never"], {}).with_options(run_dir="runs/a b", resume="auto")
        "elastic-batch train digits --run-dir 'runs/a b' --resume auto"
        """
        flags = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        kept: list[str] = []
        words = iter(self.arguments)
        for word in words:
            if word in flags:
                next(words, None)
            elif word.partition("=")[0] not in flags:
                kept.append(word)
        given = [word for pair in flags.items() for word in pair]
        launcher = int(self.environ.get("WORLD_SIZE", "1")) > 1
        program = ["torchrun", "...", "-m", "elastic_batch"] if launcher else ["elastic-batch"]
        return shlex.join([*program, *kept, *given])
