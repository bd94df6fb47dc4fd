"""What an update measures and reports: sums for the noise scale, overflow, formats, compiled models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import jobs, training
from support.jobs import IMAGES, SEED, TOKENS
from support.reference import largest_difference, train_plainly
from support.training import Plan, make_trainer, run
from support.worlds import run_world
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from elastic_batch import Trainer
from elastic_batch.engines import FixedWorld, SoloEngine
from elastic_batch.errors import JobDiffers
from elastic_batch.randomness import seeded
from elastic_batch.schedule import StepsSchedule
from elastic_batch.stream import SampleStream, micro_batch_seed


def _gradient_of_sum(start: int, stop: int) -> tuple[Tensor, float]:
    """Gradient of the summed loss over positions [start, stop) of the token job, and its weight, written plainly."""
    model, dataset = TOKENS.model(torch.float64), TOKENS.dataset(torch.float64)
    stream = SampleStream(jobs.NUM_SAMPLES, SEED)
    total = 0.0
    for position in range(start, stop, jobs.MICRO_BATCH):
        indices = stream.indices(position, position + jobs.MICRO_BATCH).tolist()
        with seeded(micro_batch_seed(SEED, position, "forward")):
            loss_sum, weight = TOKENS.loss_fn(model, default_collate([dataset[index] for index in indices]))
        loss_sum.backward()
        total += float(weight)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients]), total


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_header_has_the_sums_from_which_noise_is_estimated(size: int) -> None:
    # 4 micro-batches: on 3 workers the first has two, and each one's first pass is a single micro-batch.
    shares = {1: [4], 2: [2, 2], 3: [2, 1, 1]}[size]
    starts = [sum(shares[:rank]) * jobs.MICRO_BATCH for rank in range(size)]
    first_passes = [_gradient_of_sum(start, start + jobs.MICRO_BATCH) for start in starts]
    whole, weight = _gradient_of_sum(0, jobs.FIRST_BATCH)
    plan = Plan(TOKENS, options={"check_loss": False})
    found = (
        [training.first_noise_sums(SoloEngine(), plan)]
        if size == 1
        else run_world(size, training.first_noise_sums, plan)
    )
    for sums in found:
        assert sums.num_workers == size
        assert sums.weight == weight
        assert sums.square_sum == pytest.approx(sum(float(s.square().sum()) / w**2 for s, w in first_passes), rel=1e-9)
        assert sums.inverse_weight_sum == pytest.approx(sum(1 / w for _, w in first_passes))
        assert sums.gradient_square == pytest.approx(float(whole.square().sum()) / weight**2, rel=1e-9)
        assert sums.dataset_weight == pytest.approx(jobs.NUM_SAMPLES * weight / jobs.FIRST_BATCH)


def test_the_loss_scale_is_taken_out_of_what_is_reported() -> None:
    job = jobs.SMOOTH_IMAGES
    records = []
    for precision in ("float32", "fp16"):
        with make_trainer(Plan(job, options={"precision": precision}), FixedWorld(SoloEngine())) as trainer:
            update = next(iter(trainer))
            records.append((update.loss, update.gradient_norm, update.committed_header.first_pass_squares))
    assert records[1] == pytest.approx(records[0], rel=0.02)


def test_an_overflow_skips_the_update_consumes_its_samples_and_lowers_the_scale() -> None:
    def exploding_loss(model: nn.Module, batch: Any) -> Tensor:
        return jobs.image_loss(model, batch) * 1e30

    job = jobs.SmallJob(jobs.NoisyImages, jobs.SMOOTH_IMAGES.model, exploding_loss, None, torch.float32)
    plan = Plan(job, options={"precision": "fp16", "check_loss": False})
    with make_trainer(plan, FixedWorld(SoloEngine())) as trainer:
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        scale = trainer._scaler.scale
        update = next(iter(trainer))
        assert update.was_skipped
        assert trainer.position == jobs.FIRST_BATCH
        assert trainer._scaler.scale == scale / 2
        assert largest_difference(trainer.model.state_dict(), before) == 0


def test_a_compiled_model_trains_alike_with_no_new_shape_when_the_batch_grows() -> None:
    model = IMAGES.model(torch.float64)
    compiled = torch.compile(model, backend="aot_eager")
    trainer = Trainer(
        compiled,  # type: ignore[arg-type]  # torch.compile of a module gives a module
        jobs.sgd(model),
        IMAGES.dataset(torch.float64),
        training.SCHEDULE,
        loss_fn=IMAGES.loss_fn,
        batch_transform=IMAGES.batch_transform,
        micro_batch_size=jobs.MICRO_BATCH,
        ghost_batch_size=jobs.GHOST,
        seed=SEED,
        membership=FixedWorld(SoloEngine()),
    )
    torch._dynamo.reset()
    with trainer, torch._dynamo.config.patch(error_on_recompile=True):
        run(trainer, Plan(IMAGES, 60))
    expected = train_plainly(IMAGES, 60)
    weights = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert largest_difference(weights, {name: expected[name] for name in weights}) < 1e-10


def test_deterministic_runs_are_equal_to_the_bit() -> None:
    plan = Plan(IMAGES, 10, options={"deterministic": True, "micro_batches_per_pass": "auto"})
    try:
        first, second = (training.train(SoloEngine(), plan) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert largest_difference(first, second) == 0


def test_resuming_another_job_names_every_difference(tmp_path: Path) -> None:
    plan = Plan(TOKENS, 3, options={"run_dir": tmp_path, "resume": "auto"})
    training.train(SoloEngine(), plan)
    other = Plan(TOKENS, 3, options={**plan.options, "seed": SEED + 1, "max_grad_norm": 1.0})
    with (
        make_trainer(other, FixedWorld(SoloEngine())) as trainer,
        pytest.raises(JobDiffers, match=r"max_grad_norm: None there, 1.0 now; seed: 11 there, 12 now"),
    ):
        trainer.start()


def test_an_update_s_loss_is_the_weighted_mean_over_workers() -> None:
    losses = run_world(3, training.first_loss, Plan(TOKENS, options={"check_loss": False}))
    assert math.isclose(losses[0], training.first_loss(SoloEngine(), Plan(TOKENS)), rel_tol=1e-12)
    assert losses[0] == losses[1] == losses[2]


class _WithScale(nn.Module):
    """A model whose loss has a parameter itself as a term."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        loss: Tensor = (inputs * self.weight).square().mean() + self.scale.squeeze()
        return loss


def test_a_parameter_that_is_a_view_of_the_loss_gets_a_gradient_of_its_own() -> None:
    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = _WithScale()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = StepsSchedule.of(global_batch_size=24, max_duration="2ep", points="0:24")
    with Trainer(model, optimizer, TensorDataset(inputs), schedule, micro_batch_size=8, max_grad_norm=0.5) as trainer:
        for update in trainer.updates():
            before = model.scale.item()
            for (batch,) in update:
                update.backward(model(batch))
            update.step()
            factor = min(1.0, 0.5 / (update.gradient_norm + 1e-6))
            assert model.scale.item() == pytest.approx(before - 0.1 * factor, abs=1e-12)
