"""Train a classifier of digits with a multi-step schedule."""

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
loader = torch.utils.data.DataLoader(train_set, batch_size=32, shuffle=True)

for epoch in range(20):
    for batch in loader:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    scheduler.step()
    print(f"epoch {epoch}: {digits.accuracy(model, test_set):.4f}")
