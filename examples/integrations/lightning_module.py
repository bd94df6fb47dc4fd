"""A growing batch in a LightningModule: manual optimization steps when the schedule's batch is full."""

import lightning
import torch
from elastic_batch.schedule import MilestoneSchedule, Schedule, ScheduleContext
from order import TrainingOrder
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

PER_DEVICE_BATCH_SIZE = 16


class Classifier(lightning.LightningModule):
    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        self.schedule = schedule
        self.position = 0  # samples of complete updates
        self.num_passes_done = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.schedule.base_learning_rate, momentum=0.9)

    def training_step(self, batch: list[torch.Tensor], _: int) -> None:
        values = self.schedule.at(self.position)
        pass_size = self.schedule.micro_batch_size
        num_passes = min(values.global_batch_size, self.schedule.end - self.position) // pass_size
        inputs, targets = batch
        loss = F.cross_entropy(self.model(inputs), targets)
        self.manual_backward(loss / num_passes)
        self.num_passes_done += 1
        if self.num_passes_done == num_passes:
            optimizer = self.optimizers()
            for group in optimizer.param_groups:
                group["lr"] = values.learning_rate
            optimizer.step()
            optimizer.zero_grad()
            self.position += num_passes * pass_size
            self.num_passes_done = 0


pixels, targets = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(targets)
train_set = TensorDataset(images, labels)
trainer = lightning.Trainer(
    max_epochs=1,
    use_distributed_sampler=False,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
spec = MilestoneSchedule.of(
    strategy="grow-batch", global_batch_size=32, max_duration="10ep", milestones=["5ep", "7ep", "9ep"], factor=2
)
schedule = spec.build(
    ScheduleContext(
        num_samples=len(train_set),
        micro_batch_size=PER_DEVICE_BATCH_SIZE * trainer.world_size,
        learning_rate=0.1,
        momentum=0.9,
    )
)
order = TrainingOrder(len(train_set), schedule.end, rank=trainer.global_rank, world_size=trainer.world_size)
torch.manual_seed(0)
classifier = Classifier(schedule)
trainer.fit(classifier, DataLoader(train_set, batch_size=PER_DEVICE_BATCH_SIZE, sampler=order))
if trainer.is_global_zero:
    loss = F.cross_entropy(classifier.model(images), labels)
    print(f"{trainer.global_step} updates, training loss {loss:.6f}")
