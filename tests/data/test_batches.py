"""The same batches on every path: in this process or in data workers, one micro-batch or several at a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from support.samples import Draws, DrawsAtOnce, read, requests
from torch.utils.data import Dataset, Subset, TensorDataset

from elastic_batch.data import CannotFuse, DataError, PassRequest, open_source
from elastic_batch.stream import SampleStream

STREAM = SampleStream(101, 5)
NUM = 28  # micro-batches: beyond the end of the first epoch


def batches(dataset: Any, *, width: int = 1, count: int = NUM, **settings: Any) -> list[Any]:
    usable: dict[str, Any] = {"stream": STREAM, "micro_batch_size": 4, "device": "cpu"}
    with closing(open_source(dataset, **(usable | settings))) as source:
        return read(source, count, width=width)


def joined(parts: list[Any]) -> list[torch.Tensor]:
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def assert_equal(left: list[Any], right: list[Any]) -> None:
    for one, other in zip(joined(left), joined(right), strict=True):
        assert torch.equal(one, other)


def mix_up(samples: list[Any]) -> list[torch.Tensor]:
    """A collate_fn that draws: mixes the samples of its micro-batch with each other."""
    inputs, targets = torch.utils.data.default_collate(samples)
    share = np.random.beta(0.3, 0.3)
    return [share * inputs + (1 - share) * inputs.roll(1, 0), targets]


def jitter(batch: list[torch.Tensor]) -> list[torch.Tensor]:
    """A batch_transform that draws from every generator."""
    noise = torch.randn_like(batch[0]) + random.random() + np.random.rand()
    return [batch[0] + noise, batch[1]]


@pytest.mark.parametrize("dataset", [Draws(), DrawsAtOnce()])
@pytest.mark.parametrize("collate_fn", [None, mix_up])
@pytest.mark.parametrize("batch_transform", [None, jitter])
def test_batches_depend_on_position_only_not_on_workers_or_width(
    dataset: Draws, collate_fn: Callable[..., Any] | None, batch_transform: Callable[..., Any] | None
) -> None:
    extras: dict[str, Any] = {"collate_fn": collate_fn, "batch_transform": batch_transform}
    reference = batches(Draws(), **extras)
    assert [batch[0].shape for batch in reference] == [(4, 5)] * NUM
    if collate_fn is None:
        assert joined(reference)[1].tolist() == STREAM.indices(0, 4 * NUM).tolist()
    for width in (1, 2, 4):
        for num_workers in (0, 2):
            parts = batches(dataset, width=width, num_workers=num_workers, **extras)
            assert len(parts) == NUM // width
            assert_equal(parts, reference)


def test_other_seeds_give_other_batches_and_repetition_the_same() -> None:
    reference = batches(Draws())
    assert_equal(batches(Draws()), reference)
    other = batches(Draws(), stream=SampleStream(101, 6))
    assert not torch.equal(joined(other)[0], joined(reference)[0])


def test_reading_leaves_the_generators_of_the_training_process_alone() -> None:
    for num_workers in (0, 2):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        expected = random.random(), np.random.rand(), float(torch.rand(()))
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        batches(Draws(), num_workers=num_workers, batch_transform=jitter, count=4)
        assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected


ROWS = TensorDataset(torch.randn(101, 2, 3), torch.arange(101), torch.arange(101) % 2 == 0)
SUBSET = Subset(Subset(ROWS, list(range(100, -1, -1))), [*range(0, 90, 3), -1])


class General(Dataset[Any]):
    """The same samples, but not recognised as rows of tensors."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # the tests' data sets have a length

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


@pytest.mark.parametrize("dataset", [ROWS, SUBSET])
@pytest.mark.parametrize("batch_transform", [None, jitter])
def test_rows_of_tensors_give_the_batches_of_the_general_path(
    dataset: Dataset[Any], batch_transform: Callable[..., Any] | None
) -> None:
    stream = SampleStream(len(dataset), 3)  # type: ignore[arg-type]  # both have a length
    reference = batches(General(dataset), stream=stream, batch_transform=batch_transform)
    for width in (1, 2, 4):
        choices: list[dict[str, Any]] = [{}, {"num_workers": 2}, {"keep_on_device": True}]
        for settings in choices:
            parts = batches(dataset, width=width, stream=stream, batch_transform=batch_transform, **settings)
            assert all(type(part) is list for part in parts)
            assert_equal(parts, reference)


def test_rows_that_were_selected_together_are_batches_of_their_own() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    with closing(open_source(ROWS, stream=STREAM, micro_batch_size=4, device="cpu")) as source:
        source.start(iter(PassRequest(start, 1) for start in range(0, 40, 4)))
        first, *_ = source.next()
        first.mul_(scale)
        second, *_ = source.next()
        assert first.requires_grad
        assert not second.requires_grad
        second.mul_(scale).sum().backward()  # autograd knows of no change to what the first one was made with
        first.sum().backward()
        source.start(iter([PassRequest(60, 1)]))
        assert torch.equal(source.next()[1], ROWS.tensors[1][STREAM.indices(60, 64)])


def test_gradients_reach_rows_that_are_trained() -> None:
    rows = torch.randn(101, 3, requires_grad=True)
    for part in batches(TensorDataset(rows), count=101 // 4):
        part[0].sum().backward()
    assert rows.grad is not None
    assert rows.grad.sum() == 3 * 100


def test_a_subset_with_an_index_outside_names_it() -> None:
    with pytest.raises(DataError, match=r"IndexError"):
        batches(Subset(ROWS, [0, 1, 101]), stream=SampleStream(3, 0), micro_batch_size=3, count=1)


class Ragged(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 101

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((1 + index % 5,), float(index))


def pad(samples: list[torch.Tensor]) -> dict[str, Any]:
    return {"x": torch.nn.utils.rnn.pad_sequence(samples, batch_first=True), "lengths": [len(s) for s in samples]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_of_different_shapes_come_in_passes_of_one_and_wider_ones_say_so(num_workers: int) -> None:
    parts = batches(Ragged(), collate_fn=pad, num_workers=num_workers)
    assert [index for part in parts for index in part["x"][:, 0].tolist()] == STREAM.indices(0, 4 * NUM).tolist()
    assert len({part["x"].shape for part in parts}) > 1
    with pytest.raises(CannotFuse, match=r"position 0 .*micro_batches_per_pass=1"):
        batches(Ragged(), collate_fn=pad, num_workers=num_workers, width=4)
    with pytest.raises(DataError, match=r"default collation .* pass a collate_fn"):
        batches(Ragged(), num_workers=num_workers)


class Growing(Dataset[torch.Tensor]):
    """Samples of one shape inside each micro-batch of one sample."""

    def __len__(self) -> int:
        return 101

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(1 + index % 5)


def test_micro_batches_that_only_differ_from_each_other_cannot_be_fused() -> None:
    assert len(batches(Growing(), micro_batch_size=1)) == NUM
    with pytest.raises(CannotFuse, match=r"4 micro-batches cannot be one pass: .*shapes"):
        batches(Growing(), micro_batch_size=1, width=4)


def test_a_transform_whose_results_differ_in_shape_cannot_be_fused() -> None:
    def crop(batch: list[torch.Tensor]) -> list[torch.Tensor]:
        return [batch[0][:, : random.randint(1, 5)], batch[1]]

    assert len(batches(Draws(), batch_transform=crop)) == NUM
    with pytest.raises(CannotFuse):
        batches(Draws(), batch_transform=crop, width=4)


def test_an_error_in_the_transform_names_the_position_and_running_out_of_memory_stays_itself() -> None:
    def fail(batch: Any) -> Any:
        raise ValueError("no such colour")

    def exhaust(batch: Any) -> Any:
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(DataError, match="ValueError: no such colour") as raised:
        batches(Draws(), batch_transform=fail, width=2)
    assert raised.value.position == 0
    assert raised.value.sample_indices == tuple(STREAM.indices(0, 4).tolist())
    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        batches(Draws(), batch_transform=exhaust)


def test_requests_are_served_in_order_and_no_further() -> None:
    for num_workers in (0, 2):
        source = open_source(Draws(), stream=STREAM, micro_batch_size=4, device="cpu", num_workers=num_workers)
        with closing(source):
            source.start(requests(3, start=40))
            seen = [source.next()[1].tolist() for _ in range(3)]
            assert [index for batch in seen for index in batch] == STREAM.indices(40, 52).tolist()
            with pytest.raises(RuntimeError, match="every request was served"):
                source.next()


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu() -> None:
    def noise(batch: list[torch.Tensor]) -> list[torch.Tensor]:
        return [batch[0] + torch.randn_like(batch[0]), batch[1]]

    for dataset in (Draws(), TensorDataset(torch.randn(101, 5), torch.arange(101))):
        reference = joined(batches(dataset))
        transformed = joined(batches(dataset, device="cuda", batch_transform=noise))
        choices: list[dict[str, Any]] = [{}, {"num_workers": 2}, {"width": 4}, {"num_workers": 2, "width": 4}]
        for settings in choices:
            parts = joined(batches(dataset, device="cuda", **settings))
            assert all(part.is_cuda for part in parts)
            assert all(torch.equal(part.cpu(), other) for part, other in zip(parts, reference, strict=True))
            parts = joined(batches(dataset, device="cuda", batch_transform=noise, **settings))
            assert all(torch.equal(part, other) for part, other in zip(parts, transformed, strict=True))
