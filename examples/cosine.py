"""Train a classifier of digits with a cosine schedule."""

import elastic_batch as eb
import torch
from torch.nn import functional as F

import digits

train_set, test_set = digits.load()
model = digits.make_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
schedule = eb.from_lr_scheduler(scheduler, per="epoch", max_duration="20ep", global_batch_size=32)
trainer = eb.Trainer(model, optimizer, train_set, schedule, micro_batch_size=32)

for update in trainer.updates():
    for inputs, targets in update:
        loss = F.cross_entropy(model(inputs), targets)
        update.backward(loss)
    if update.step() and update.ends_epoch:
        print(f"epoch {update.epoch}, update {trainer.num_updates}: {trainer.evaluate(test_set, eb.accuracy):.4f}")
