"""`elastic-batch checkpoint`: list, verify and export checkpoints."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from elastic_batch.cli.output import open_console
from elastic_batch.strict_json import to_json

if TYPE_CHECKING:
    from elastic_batch.checkpoint import CheckpointStore, Manifest
    from elastic_batch.errors import CheckpointDamaged

EXIT_DAMAGED = 1


@click.group("checkpoint")
def command() -> None:
    """List, verify or export checkpoints.

    PLACE is a run directory, a directory of checkpoints, one checkpoint, or a URL of one of these.
    """


@command.command("list", short_help="List checkpoints, the newest first.")
@click.argument("place")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def list_checkpoints(place: str, as_json: bool) -> None:
    """List the checkpoints in PLACE, the newest first."""
    store, name = _locate(place)
    damages: list[CheckpointDamaged] = []
    manifests = [manifest for manifest in store.manifests(damages.append) if name in (None, manifest.name)]
    if as_json:
        whole = [_fields(manifest) for manifest in manifests]
        damaged = [{"name": damage.name, "damage": damage.reason} for damage in damages]
        click.echo(to_json([*whole, *damaged], indent=2))
        return
    console = open_console()
    if manifests:
        console.print(_table(manifests))
    else:
        console.print(f"There is no checkpoint in {store.location}.")
    _print_damages(console, damages)


@command.command(short_help="Compare checkpoints with their digests.")
@click.argument("place")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def verify(place: str, as_json: bool) -> int:
    """Read every checkpoint in PLACE and compare it with its digest.

    Exit codes: 0 all are whole; 1 one is damaged; 2 there is none.
    """
    from elastic_batch.errors import CheckpointDamaged, CheckpointMissing

    store, only = _locate(place)
    damages: list[CheckpointDamaged] = []
    names = [only] if only else [manifest.name for manifest in store.manifests(damages.append)]
    whole = []
    for name in names:
        try:
            whole.append(store.verify(name).name)
        except CheckpointDamaged as damage:
            damages.append(damage)
        except CheckpointMissing:
            if only:
                raise
            # A run that goes on has pruned it since the names were listed.
    if not whole and not damages:
        raise CheckpointMissing(f"there is no checkpoint in {store.location}")
    if as_json:
        reasons = {damage.name: damage.reason for damage in damages}
        click.echo(to_json([{"name": name, "damage": reasons.get(name)} for name in [*whole, *reasons]], indent=2))
    else:
        console = open_console()
        for name in whole:
            console.print(f"[green]whole[/green]   {name}")
        _print_damages(console, damages)
    return EXIT_DAMAGED if damages else 0


@command.command(short_help="Write the weights of a checkpoint to a file.")
@click.argument("place")
@click.argument("output")
@click.option(
    "--entry", metavar="NAME", default="model", show_default=True, help="Which state_dict of it; dots go deeper."
)
def export(place: str, output: str, entry: str) -> None:
    """Write the weights of a checkpoint to OUTPUT, a plain state_dict: .safetensors, or .pt for torch.

    Of several checkpoints the newest good one is taken. The file loads strictly into the model as you wrote it.
    """
    from elastic_batch import checkpoint

    opened = checkpoint.open_checkpoint(place)
    checkpoint.export(opened, output, entry=entry)
    click.echo(f"Wrote {entry} of {opened.manifest.name} (update {opened.manifest.update}) to {output}")


def _locate(place: str) -> tuple[CheckpointStore, str | None]:
    from elastic_batch.checkpoint import locate  # loads torch

    return locate(place)


def _print_damages(console: Console, damages: list[CheckpointDamaged]) -> None:
    for damage in damages:
        console.print(f"[red]damaged[/red] {damage.name}: {damage.reason}")


def _table(manifests: list[Manifest]) -> Table:
    table = Table("checkpoint", box=None, pad_edge=False)
    for heading in ("update", "position", "generation", "size", "written"):
        table.add_column(heading, justify="right")
    for manifest in manifests:
        written = datetime.fromtimestamp(manifest.created_seconds, UTC)
        table.add_row(
            manifest.name,
            str(manifest.update),
            str(manifest.position),
            str(manifest.generation),
            _size(manifest.num_bytes),
            f"{written:%Y-%m-%d %H:%M:%S} UTC",
        )
    return table


def _fields(manifest: Manifest) -> dict[str, object]:
    return {
        "name": manifest.name,
        "damage": None,
        "update": manifest.update,
        "position": manifest.position,
        "generation": manifest.generation,
        "num_bytes": manifest.num_bytes,
        "digest": manifest.digest,
        "created_seconds": manifest.created_seconds,
        "written_by": manifest.written_by,
        "fingerprint": manifest.fingerprint,
    }


def _size(num_bytes: float) -> str:
    """A size for people.

    >>> _size(999), _size(1536), _size(3 * 1024**3)
    ('999 B', '1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
