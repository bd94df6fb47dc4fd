"""Train a classifier of digits with a cosine schedule."""

import torch
from torch.nn import functional as F

import digits

train_set, test_set = digits.load()
model = digits.make_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
loader = torch.utils.data.DataLoader(train_set, batch_size=32, shuffle=True)

for epoch in range(20):
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
    scheduler.step()
    print(f"epoch {epoch}: {digits.accuracy(model, test_set):.4f}")
