"""Training: the update loop, the transaction that an update is, and what belongs to them."""

from elastic_batch.trainer.ema import EMA
from elastic_batch.trainer.evaluation import accuracy
from elastic_batch.trainer.options import TrainerOptions
from elastic_batch.trainer.trainer import Trainer
from elastic_batch.trainer.update import Outcome, Update

__all__ = ["EMA", "Outcome", "Trainer", "TrainerOptions", "Update", "accuracy"]
