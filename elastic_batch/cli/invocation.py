"""How the command was called."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from elastic_batch.launchers import launched_rank, launched_size


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
        """This worker's rank as the launcher says it; 0 without one.

        Raises:
            InvalidSetting: It says something else.
        """
        return launched_rank(self.environ)

    @property
    def is_elastic(self) -> bool:
        """Whether this is a worker of an elastic job, which finds its coordinator by the environment."""
        return not {"ELASTIC_BATCH_COORDINATOR", "ELASTIC_BATCH_RUN_DIR"}.isdisjoint(self.environ)

    @property
    def was_restarted(self) -> bool:
        """Whether torchrun or Slurm started this job again after it had ended early."""
        return any(self.environ.get(name, "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))

    def with_options(self, **options: str) -> str:
        """This command line with other values for some options, as one would type it.

        >>> Invocation(["train", "digits", "--resume", "never"], {}).with_options(run_dir="runs/a b", resume="auto")
        "elastic-batch train digits --run-dir 'runs/a b' --resume auto"
        """
        words = self.words_with(**options)
        program = ["torchrun", "...", "-m", "elastic_batch"] if launched_size(self.environ) > 1 else ["elastic-batch"]
        return shlex.join([*program, *words])

    def words_with(self, without: Collection[str] = (), **options: str) -> list[str]:
        """The arguments with other values for some options.

        Args:
            without: Names of options that take a value and are left out.
            options: Values by name.

        >>> invocation = Invocation(["train", "digits", "--workers=1:4", "--resume", "never"], {})
        >>> invocation.words_with(["workers"], resume="auto")
        ['train', 'digits', '--resume', 'auto']
        """
        flags = {_flag(name): value for name, value in options.items()}
        dropped = {*flags, *map(_flag, without)}
        kept: list[str] = []
        words = iter(self.arguments)
        for word in words:
            if word in dropped:
                next(words, None)
            elif word.partition("=")[0] not in dropped:
                kept.append(word)
        return kept + [word for pair in flags.items() for word in pair]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
