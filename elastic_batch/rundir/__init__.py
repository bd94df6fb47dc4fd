"""Run directories: writing one while training, reading them afterwards."""

from elastic_batch.rundir.directory import (
    RunDirectory,
    has_updates,
    is_used,
    open_run_ledger,
    read_evaluations,
    read_job,
    read_metrics,
    read_run_id,
    read_run_ledger,
    read_summary,
)
from elastic_batch.rundir.hold import Hold
from elastic_batch.rundir.ledger import Commit, Ledger, LedgerReader
from elastic_batch.rundir.lines import LineWriter

__all__ = [
    "Commit",
    "Hold",
    "Ledger",
    "LedgerReader",
    "LineWriter",
    "RunDirectory",
    "has_updates",
    "is_used",
    "open_run_ledger",
    "read_evaluations",
    "read_job",
    "read_metrics",
    "read_run_id",
    "read_run_ledger",
    "read_summary",
]
