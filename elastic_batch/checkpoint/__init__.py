"""Durable, verified state: saving in the background, loading the newest good one, exporting plain weights."""

from elastic_batch.checkpoint.fingerprint import Fingerprint, check_fingerprint
from elastic_batch.checkpoint.locate import locate, open_checkpoint
from elastic_batch.checkpoint.manifest import CheckpointInfo, Manifest
from elastic_batch.checkpoint.state import check_state, put_together, snapshot, take_apart
from elastic_batch.checkpoint.store import Checkpoint, CheckpointStore
from elastic_batch.checkpoint.weights import export, plain_weights, read_weights
from elastic_batch.checkpoint.writer import CheckpointWriter, WriterEvents

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "CheckpointStore",
    "CheckpointWriter",
    "Fingerprint",
    "Manifest",
    "WriterEvents",
    "check_fingerprint",
    "check_state",
    "export",
    "locate",
    "open_checkpoint",
    "plain_weights",
    "put_together",
    "read_weights",
    "snapshot",
    "take_apart",
]
