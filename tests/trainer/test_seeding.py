"""Each pass draws what belongs to its position, whoever draws and from when on, and the generators are put back."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support import jobs
from support.jobs import IMAGES, SEED
from support.training import Plan, make_trainer

from elastic_batch import randomness
from elastic_batch.engines import FixedWorld, SoloEngine
from elastic_batch.randomness import seeded
from elastic_batch.stream import micro_batch_seed
from elastic_batch.trainer.seeding import PassSeeds

CPU = torch.device("cpu")
SOURCES: list[Callable[[], float]] = [random.random, np.random.rand, np.random.randn, lambda: random.gauss(0, 1)]


def held() -> list[str]:
    """What the global generators hold."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    parts = [numpy_state["state"]["key"].tolist(), numpy_state["state"]["pos"], numpy_state["gauss"]]
    return [str(part) for part in (random.getstate(), parts, torch.get_rng_state().tolist())]


def run_update(seeds: PassSeeds, draw: Callable[[], float] | None) -> list[float]:
    """An update of three passes, each with a draw."""
    with seeds:
        drawn = []
        for seed in (1, 2, 3):
            seeds.seed(seed)
            torch.rand(2)
            if draw is not None:
                drawn.append(draw())
        return drawn


def expected_of(draw: Callable[[], float]) -> list[float]:
    drawn = []
    for seed in (1, 2, 3):
        with seeded(seed):
            drawn.append(draw())
    return drawn


@pytest.mark.parametrize("draw", SOURCES)
def test_who_draws_from_the_first_update_on_never_strays(draw: Callable[[], float]) -> None:
    seeds = PassSeeds(CPU)
    for at_all in (True, False, True, True):
        before = held()
        found = run_update(seeds, draw if at_all else None)
        assert not seeds.have_strayed()
        assert found == (expected_of(draw) if at_all else [])
        assert held() == before


@pytest.mark.parametrize("draw", SOURCES)
def test_a_late_draw_strays_once_and_is_right_when_repeated(draw: Callable[[], float]) -> None:
    seeds = PassSeeds(CPU)
    for _ in range(2):
        run_update(seeds, None)
        assert not seeds.have_strayed()
    before = held()
    run_update(seeds, draw)
    assert seeds.have_strayed()
    assert held() == before
    for _ in range(2):
        assert run_update(seeds, draw) == expected_of(draw)
        assert not seeds.have_strayed()
        assert held() == before


def test_a_stray_draw_shows_before_the_update_is_over() -> None:
    seeds = PassSeeds(CPU)
    run_update(seeds, None)
    with seeds:
        seeds.seed(1)
        assert not seeds.have_strayed()
        random.random()
        assert seeds.have_strayed()


def test_exactly_as_many_draws_as_the_generator_holds_do_not_hide() -> None:
    seeds = PassSeeds(CPU)
    run_update(seeds, None)
    np.random.seed(1)  # whose next draw is the first of 624
    run_update(seeds, lambda: float(np.random.randint(0, 2**32, 624 // 3, dtype=np.uint32)[0]))
    assert seeds.have_strayed()


def test_where_the_layout_is_unknown_everything_is_always_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "_numpy_half", lambda: None)
    seeds = PassSeeds(CPU)
    run_update(seeds, None)
    before = held()
    assert run_update(seeds, np.random.rand) == expected_of(np.random.rand)
    assert not seeds.have_strayed()
    assert held() == before


@pytest.mark.parametrize("in_loop", [True, False])
def test_an_update_in_which_somebody_draws_for_the_first_time_is_repeated(in_loop: bool) -> None:
    """`in_loop`: `step` is called before the loop over the batches has ended."""
    plan = Plan(IMAGES, num_updates=5, owns_loop=True, options={"check_loss": False})
    attempts: list[tuple[int, bool]] = []
    with make_trainer(plan, FixedWorld(SoloEngine())) as trainer:
        for update in trainer.updates():
            before, drawn, committed = held(), [], False
            for number, batch in enumerate(update):
                if update.index >= 3:
                    drawn.append((random.random(), np.random.rand()))
                update.backward(IMAGES.loss_fn(trainer.model, batch))
                if in_loop and number + 1 == 4:
                    committed = update.step()
            if not in_loop:
                committed = update.step()
            assert held() == before
            attempts.append((update.index, committed))
            if committed and drawn:
                start = jobs.FIRST_BATCH * update.index
                for position, found in zip(
                    range(start, start + jobs.FIRST_BATCH, jobs.MICRO_BATCH), drawn, strict=True
                ):
                    with seeded(micro_batch_seed(SEED, position, "forward")):
                        assert found == (random.random(), np.random.rand())
            if committed and trainer.num_updates == plan.num_updates:
                trainer.stop("far enough")
    assert attempts[:6] == [(0, True), (1, True), (2, True), (3, False), (3, True), (4, True)]
    assert all(committed for _, committed in attempts[6:])
