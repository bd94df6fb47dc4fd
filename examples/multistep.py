"""Train a classifier of digits with a multi-step schedule."""

import elastic_batch as eb
import torch
from torch.nn import functional as F

import digits


def loss_fn(model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


train_set, test_set = digits.load()
model = digits.make_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[8, 12, 16], gamma=0.5)
schedule = eb.from_lr_scheduler(scheduler, per="epoch", max_duration="20ep", global_batch_size=32)
trainer = eb.Trainer(model, optimizer, train_set, schedule, micro_batch_size=32, loss_fn=loss_fn)

for update in trainer:
    if update.ends_epoch:
        print(f"epoch {update.epoch}, update {trainer.num_updates}: {trainer.evaluate(test_set, eb.accuracy):.4f}")
