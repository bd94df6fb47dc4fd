from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_batch import randomness
from elastic_batch.randomness import GeneratorState, preserved, reseed, seeded


def draw() -> tuple[float, ...]:
    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
        float(torch.randn(())),
    )


def held() -> tuple[Any, ...]:
    """Everything the global generators hold, as comparable values."""
    kind, key, position, has_half, half = np.random.get_state()
    return (
        random.getstate(),
        (kind, np.asarray(key).tobytes(), position, has_half, half),
        torch.get_rng_state().numpy().tobytes(),
    )


@pytest.fixture(autouse=True)
def fresh_numpy_generator() -> Iterator[None]:
    source = np.random.get_bit_generator()  # type: ignore[attr-defined]  # missing in numpy's stubs
    np.random.set_bit_generator(np.random.MT19937(1))  # type: ignore[attr-defined]  # the same
    yield
    np.random.set_bit_generator(source)  # type: ignore[attr-defined]  # the same


@given(st.integers(0, 2**63 - 1))
def test_a_seed_decides_every_generator(seed: int) -> None:
    with seeded(seed):
        first = draw()
    draw()
    with seeded(seed):
        assert draw() == first
    with seeded(seed ^ 1):
        other = draw()
    assert sum(a == b for a, b in zip(first, other, strict=True)) <= 2  # numpy looks at the upper bits only


@given(st.integers(0, 5), st.integers(0, 5))
def test_generators_are_put_back_even_after_half_a_pair_of_normal_draws(before: int, inside: int) -> None:
    np.random.seed(before)
    for _ in range(before):
        np.random.randn()
        random.gauss(0, 1)
    state = held()
    with seeded(7):
        for _ in range(inside):
            draw()
    assert held() == state


def test_generators_are_put_back_after_an_exception() -> None:
    def fail() -> None:
        draw()
        raise KeyError("inside")

    state = held()
    with pytest.raises(KeyError), seeded(7):
        fail()
    assert held() == state


def test_a_kept_half_of_a_pair_does_not_leak_into_the_block() -> None:
    with seeded(7):
        first = draw()
    np.random.randn()
    with seeded(7):
        assert draw() == first


def test_blocks_may_be_nested() -> None:
    with seeded(1):
        draw()
        state = held()
        with seeded(2):
            draw()
        assert held() == state


def test_one_saved_state_serves_many_blocks() -> None:
    state = held()
    with preserved():
        reseed(1)
        first = draw()
        reseed(2)
        assert draw() != first
        reseed(1)
        assert draw() == first
    assert held() == state


def test_a_saved_state_can_be_restored_twice() -> None:
    saved = GeneratorState()
    first = draw()
    saved.restore()
    assert draw() == first
    saved.restore()
    assert draw() == first


def test_saving_alone_changes_nothing() -> None:
    np.random.randn()
    state = held()
    GeneratorState()
    assert held() == state


def test_numpy_and_torch_do_not_draw_the_same_bits() -> None:
    with seeded(123456789012345678):
        assert float(np.random.rand()) != float(torch.rand((), dtype=torch.float64))
        words = np.random.randint(0, 2**32, 2000, dtype=np.uint32)
    with seeded(123456789012345678):
        other = torch.randint(0, 2**32, (2000,), dtype=torch.int64).numpy()
    assert np.intersect1d(words, other).size < 5


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.Philox, np.random.MT19937])
def test_a_generator_that_the_user_installed_in_numpy_is_put_back(kind: Callable[[int], Any]) -> None:
    source = kind(5)
    np.random.set_bit_generator(source)  # type: ignore[attr-defined]  # missing in numpy's stubs
    np.random.randn()
    saved = GeneratorState()
    expected = [np.random.randn() for _ in range(3)]
    saved.restore()
    with seeded(3):
        np.random.randn(5)
    assert [np.random.randn() for _ in range(3)] == expected
    assert np.random.get_bit_generator() is source  # type: ignore[attr-defined]  # the same


@pytest.mark.gpu
def test_the_generator_of_a_cuda_device_is_seeded_and_put_back() -> None:
    device = torch.device("cuda")
    torch.rand(3, device=device)
    state = torch.cuda.get_rng_state(device)
    with seeded(4, device):
        first = torch.rand(3, device=device)
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    with seeded(4, device):
        assert torch.equal(torch.rand(3, device=device), first)


def test_the_state_is_the_same_where_the_generators_have_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "_python_words", lambda: None)
    monkeypatch.setattr(randomness, "_numpy_half", lambda: None)
    random.gauss(0, 1)  # keeps the second half of a pair
    np.random.randn()
    state = held()
    with seeded(7):
        draw()
    assert held() == state


def test_this_python_and_numpy_have_the_layout_that_is_fast() -> None:
    source = np.random.get_bit_generator()  # type: ignore[attr-defined]  # missing in numpy's stubs
    assert randomness._python_words() is not None
    assert randomness._numpy_words(source) is not None
    assert randomness._numpy_half() is not None
