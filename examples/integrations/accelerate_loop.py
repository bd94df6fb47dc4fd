"""A growing batch in an Accelerate loop: the schedule says how many passes make an update."""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from elastic_batch.schedule import MilestoneSchedule, ScheduleContext
from order import TrainingOrder
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

PER_DEVICE_BATCH_SIZE = 16

pixels, targets = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(targets)
train_set = TensorDataset(images, labels)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
accelerator = Accelerator(cpu=True)

pass_size = PER_DEVICE_BATCH_SIZE * accelerator.num_processes
spec = MilestoneSchedule.of(
    strategy="grow-batch", global_batch_size=32, max_duration="10ep", milestones=["5ep", "7ep", "9ep"], factor=2
)
schedule = spec.build(
    ScheduleContext(num_samples=len(train_set), micro_batch_size=pass_size, learning_rate=0.1, momentum=0.9)
)
order = TrainingOrder(len(train_set), schedule.end)
loader = DataLoader(train_set, batch_size=PER_DEVICE_BATCH_SIZE, sampler=order)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

batches = iter(loader)
position = num_updates = 0
while position < schedule.end:
    values = schedule.at(position)
    num_passes = min(values.global_batch_size, schedule.end - position) // pass_size
    for group in optimizer.param_groups:
        group["lr"] = values.learning_rate
    for index in range(num_passes):
        batch = next(batches)
        with accelerator.no_sync(model) if index + 1 < num_passes else nullcontext():
            loss = F.cross_entropy(model(batch[0]), batch[1])
            accelerator.backward(loss / num_passes)
    optimizer.step()
    optimizer.zero_grad()
    position += num_passes * pass_size
    num_updates += 1

loss = F.cross_entropy(accelerator.unwrap_model(model)(images), labels)
accelerator.print(f"{num_updates} updates, training loss {loss:.6f}")
