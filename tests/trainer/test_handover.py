"""The greatest state of a new world reaches every worker, whole, beside what it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.handover import exchange_states
from support.worlds import run_world

from elastic_batch.checkpoint import put_together, take_apart
from elastic_batch.engines import SoloEngine
from elastic_batch.errors import UnsavableState
from elastic_batch.trainer.handover import NOWHERE, Muster, Whereabouts, _share_outline, hand_over


def test_the_newest_generation_wins_and_the_position_second() -> None:
    places = (NOWHERE, Whereabouts(1, 900), Whereabouts(2, 300), Whereabouts(2, 400), Whereabouts(2, 400))
    found = Muster(places, (0,) * len(places))
    assert found.source == 3
    assert not found.agreed


def test_workers_agree_when_all_have_the_same_state_but_not_when_none_has_one() -> None:
    assert Muster((Whereabouts(2, 5),) * 3, (0, 0, 0)).agreed
    assert not Muster((NOWHERE, NOWHERE), (0, 0)).agreed


@pytest.mark.parametrize(
    ("evaluating", "together"), [((1, 1), True), ((2, 2, 2), True), ((0, 0), False), ((1, 0), False), ((1, 2), False)]
)
def test_workers_evaluate_together_only_where_all_are_at_the_same_evaluation(
    evaluating: tuple[int, ...], together: bool
) -> None:
    assert Muster((Whereabouts(2, 5),) * len(evaluating), evaluating).evaluates_together is together


def _states_of(world: list[Any]) -> list[Any]:
    return [state for state, _ in world]


@pytest.mark.parametrize("source", [0, 1, 2])
def test_every_type_of_value_arrives_at_those_that_want_it(source: int) -> None:
    world = run_world(3, exchange_states, source, timeout_seconds=40)
    states = _states_of(world)
    assert states[source] is None
    for rank in {0, 1, 2} - {source}:
        state = states[rank]
        assert torch.equal(state["weights"], torch.full((3, 4), float(source), dtype=torch.float64))
        assert state["flags"].dtype == torch.bool
        assert state["half"].dtype == torch.bfloat16
        assert state["last"].is_contiguous()
        assert torch.equal(state["last"], torch.arange(24.0).view(2, 3, 2, 2))
        assert state["empty"].shape == (0, 3)
        assert state["nested"] == [1, {"two": 2.5, 3: None}, "four"]
        assert state["tied"] is state["weights"]


def test_the_outline_says_which_tensors_are_on_the_host() -> None:
    tensors = [torch.ones(2), torch.ones(3, device="meta", dtype=torch.half)]
    outline = _share_outline(SoloEngine(), 0, None, tensors, torch.device("cpu"))
    assert outline["tensors"] == [((2,), torch.float32, "cpu"), ((3,), torch.float16, "meta")]


@pytest.mark.gpu
def test_what_is_on_the_sender_s_host_arrives_on_the_host() -> None:
    device = torch.device("cuda")
    sent = {"step": torch.tensor(7.0), "weights": torch.ones(3, device=device)}
    received = hand_over(SoloEngine(), 0, lambda: sent, wanted=True, device=device)
    assert received is not None
    assert received["step"].device.type == "cpu"
    assert received["weights"].device.type == "cuda"


def test_a_state_is_taken_apart_and_put_together() -> None:
    weights = torch.ones(2)
    nesting, tensors = take_apart({"a": weights, "b": [weights, 3]})
    assert len(tensors) == 1
    assert tensors[0].data_ptr() == weights.data_ptr()
    again = put_together(nesting, [torch.zeros(2)])
    assert torch.equal(again["a"], torch.zeros(2))
    assert again["b"][1] == 3


def test_what_would_need_code_to_be_read_is_refused() -> None:
    with pytest.raises(UnsavableState, match="of type"):
        take_apart({"a": object()})
