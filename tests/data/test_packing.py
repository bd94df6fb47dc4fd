"""How batches come out of a data worker."""

import multiprocessing
import pickle
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_batch.data.packing import pack

pytestmark = pytest.mark.timeout(60)


def batches(size: int) -> dict[str, Any]:
    values = torch.randn(size, 3, 4, 5, generator=torch.Generator().manual_seed(3))
    return {
        "plain": values,
        "channels last": values.to(memory_format=torch.channels_last),
        "transposed bfloat16": values.flatten(1).bfloat16().t(),
        "a part of its storage": values[1:, 1, 2:],
        "booleans": [values > 0, (values.sum(),)],
        "nothing": torch.empty(0, 7),
        "wants a gradient": torch.ones(3, requires_grad=True),
        "text": "as it is",
    }


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        same_layout = (one.stride(), one.dtype, one.requires_grad) == (other.stride(), other.dtype, other.requires_grad)
        return same_layout and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(alike, one, other))
    return bool(one == other)


def send_packed(size: int, sender: Connection) -> None:
    sender.send_bytes(pack(batches(size)))
    sender.recv_bytes()  # shared memory is handed over by the process that made it


@pytest.mark.parametrize("size", [2, 4000], ids=["by value", "in shared memory"])
def test_every_kind_of_tensor_comes_through(size: int) -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=send_packed, args=(size, there))
    process.start()
    received = pickle.loads(here.recv_bytes())
    here.send_bytes(b"")
    process.join()

    assert alike(received, batches(size))
    assert received["plain"].is_shared() == (size == 4000)


def test_what_came_by_value_can_be_changed_and_is_a_copy() -> None:
    made = torch.zeros(5)
    received = pickle.loads(pack(made))

    received += 1

    assert made.sum() == 0
    assert received.sum() == 5


def test_a_large_tensor_is_not_in_the_message() -> None:
    large = torch.zeros(1 << 20)

    assert len(pack(large)) < 2000
    assert len(pack(torch.zeros(1 << 10))) > 4096
