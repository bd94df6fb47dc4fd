"""A growing batch with the Trainer of transformers: one `train()` for each stretch of equal batches."""

from collections.abc import Callable
from itertools import groupby

import torch
from elastic_batch.schedule import MilestoneSchedule, ScheduleContext, walk
from elastic_batch.stream import SampleStream
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments

PER_DEVICE_BATCH_SIZE = 16


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(images)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def relative_rate(start: int, stop: int, batch: int) -> Callable[[int], float]:
    """The learning rate of each update in a stretch, as a part of the optimizer's."""

    def factor(update: int) -> float:
        position = min(start + update * batch, stop - 1)  # transformers also asks for the rate after the last update
        return schedule.at(position).learning_rate / schedule.base_learning_rate

    return factor


pixels, targets = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(targets)
train_set = [{"images": image, "labels": label} for image, label in zip(images, labels, strict=True)]
torch.manual_seed(0)
model = Classifier()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
arguments = TrainingArguments(
    per_device_train_batch_size=PER_DEVICE_BATCH_SIZE,
    num_train_epochs=1,
    train_sampling_strategy="sequential",
    max_grad_norm=0,
    save_strategy="no",
    logging_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)

pass_size = PER_DEVICE_BATCH_SIZE * arguments.world_size
spec = MilestoneSchedule.of(
    strategy="grow-batch", global_batch_size=32, max_duration="10ep", milestones=["5ep", "7ep", "9ep"], factor=2
)
schedule = spec.build(
    ScheduleContext(num_samples=len(train_set), micro_batch_size=pass_size, learning_rate=0.1, momentum=0.9)
)
stream = SampleStream(len(train_set), seed=0)

start = num_updates = 0
for batch, runs in groupby(walk(schedule), key=lambda run: run.values.global_batch_size):
    stop = start + sum(run.num_samples for run in runs)
    arguments.gradient_accumulation_steps = batch // pass_size
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Subset(train_set, stream.indices(start, stop).tolist()),
        optimizers=(optimizer, LambdaLR(optimizer, relative_rate(start, stop, batch))),
    )
    trainer.train()
    num_updates += trainer.state.global_step
    start = stop

if trainer.is_world_process_zero():
    loss = F.cross_entropy(model.net(images), labels)
    print(f"{num_updates} updates, training loss {loss:.6f}")
