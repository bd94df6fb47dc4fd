"""Each decision and its reason, by a clock that is turned by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.membership import Service, running

from elastic_batch.coordinator import events
from elastic_batch.coordinator.decide import AskRegroup, EndWorld, FormWorld, desired_workers, worker_state
from elastic_batch.coordinator.losses import Doubt, Evict, LoseSight, RegainSight
from elastic_batch.coordinator.state import MembershipConfig, Phase, State, Worker, World

AWAY, BACK = LoseSight("most workers went out of sight together"), RegainSight("all workers are back")
FOUR = MembershipConfig(min_workers=1, max_workers=4)


def recovered(*names: str, generation: int = 5, config: MembershipConfig = FOUR) -> Service:
    """A coordinator that was started again; its journal knows a world."""
    service = Service(config, State(generation=generation))
    service.state.world = World(generation, names, Phase.RUNNING, service.now, out_of_sight=True)
    for name in names:
        service.state.workers[name] = Worker(name, name, False, disconnected_at=service.now, generation=generation)
    return service


def back(service: Service, *names: str) -> bool:
    """Members of the newest world connect again. Returns whether the last one's world goes on."""
    goes_on = False
    for name in names:
        goes_on = events.hello(service.state, service.now, name, name, service.world.generation, service.world.members)
    return goes_on


def test_a_world_starts_when_the_least_number_of_workers_is_ready() -> None:
    service = Service(MembershipConfig(min_workers=2, max_workers=4))
    assert service.settle() == []
    assert service.reason == "0 of at least 2 workers are ready"
    assert service.join("a") == []
    assert service.reason == "1 of at least 2 workers are ready"
    assert service.join("b") == [FormWorld(("a", "b"), "2 workers: a, b joined")]
    assert service.reason == "generation 1 forms"
    service.enter("a")
    assert not service.runs
    service.enter("b")
    assert service.runs == ("a", "b")
    assert service.reason == "generation 1 trains"


def test_a_joiner_is_taken_in_at_a_boundary_after_those_that_are_there() -> None:
    service = running("b", "c", config=FOUR)
    assert service.join("a") == [AskRegroup("worker a joins")]
    assert service.reason == "worker a joins"
    service.ready("b")
    assert service.settle() == []
    assert service.reason.endswith("is left at a boundary")
    assert service.all_ready()[-1] == FormWorld(("b", "c", "a"), "3 workers: a joined")


def test_nobody_joins_a_world_that_has_a_worker_for_each_micro_batch_and_its_spares() -> None:
    service = running("a", "b", micro_batches=2, config=MembershipConfig(min_workers=2, max_workers=4))
    assert service.join("c") == []
    assert worker_state(service.now, service.state, service.state.workers["c"]) == "standby"
    service.config = replace(service.config, spares=1)
    assert desired_workers(service.state, service.config) == 3
    assert service.settle() == [AskRegroup("worker c joins")]
    service.all_ready(micro_batches=2)
    service.enter()
    states = [worker_state(service.now, service.state, service.state.workers[name]) for name in "abc"]
    assert states == ["active", "active", "spare"]


def test_the_world_grows_and_shrinks_with_the_micro_batches_that_its_workers_report() -> None:
    service = running("a", micro_batches=1, config=FOUR)
    assert service.join("b", micro_batches=1) == []
    service.beat("a", update=7, micro_batches=2)
    assert service.settle() == [AskRegroup("worker b joins")]
    service.all_ready(micro_batches=2)
    service.enter()
    assert service.runs == ("a", "b")
    service.beat("a", update=9, micro_batches=1)
    service.beat("b", update=8, micro_batches=2)  # late: it is about an update before
    assert service.settle() == [AskRegroup("1 workers suffice for 1 micro-batches")]
    assert service.all_ready(micro_batches=1) == [FormWorld(("a",), "1 workers: b gone")]


def test_a_newcomer_that_does_not_know_how_far_the_job_is_changes_nothing() -> None:
    service = running("a", "b", config=FOUR)
    service.join("c", micro_batches=1)
    service.all_ready()
    service.beat("c", "sync", update=0, micro_batches=1)
    assert service.state.num_micro_batches == 8
    service.ready("a", broken=True)
    service.ready("c", broken=True, micro_batches=1)
    service.ready("b", broken=True)
    assert service.state.num_micro_batches == 8


def test_a_lost_worker_ends_the_world_and_the_survivors_form_the_next_in_rank_order_before_joiners() -> None:
    service = running("c", "b", "a", config=MembershipConfig(min_workers=1, max_workers=3))
    service.join("d")
    assert service.disconnect("b") == []
    assert service.after(0.6) == [
        Evict(("b",), "worker b given up: the connection ended"),
        EndWorld("worker b was lost"),
    ]
    assert service.reason == "2 workers come out of generation 1"
    service.ready("a", broken=True)
    assert service.settle() == []
    service.ready("c", broken=True)
    assert service.settle() == [FormWorld(("c", "a", "d"), "3 workers: d joined; b gone")]


def test_a_worker_that_finds_the_world_broken_ends_it_for_all() -> None:
    service = running("a", "b")
    service.ready("a", broken=True)
    assert service.settle() == [EndWorld("worker a found the world broken")]
    assert service.all_ready(broken=True) == [FormWorld(("a", "b"), "2 workers: the same as before")]


def test_a_broken_connection_that_is_back_while_nobody_finds_the_world_broken_changes_nothing() -> None:
    service = running("a", "b")
    service.disconnect("b")
    service.after(0.4)
    assert back(service, "b")
    assert service.after(5) == []
    assert service.runs == ("a", "b")


def test_the_fellows_of_one_whose_connection_ended_are_asked_once_each_time() -> None:
    service = running("a", "b", "c")
    before = len(service.taken)
    for _ in range(2):
        service.disconnect("b")
        service.after(0.3)
        back(service, "b")
        service.settle()
    assert service.taken[before:] == 2 * [Doubt(("b",), "worker b out of sight: the connection ended")]
    service.disconnect("a", "b")
    assert service.taken[before + 2 :] == [AWAY]


def test_the_fellows_are_not_asked_again_within_the_settling_time() -> None:
    service = running(*"abcde")
    service.disconnect("a")
    service.after(0.01)
    service.disconnect("b")
    assert service.taken[-1] == Doubt(("a",), "worker a out of sight: the connection ended")
    service.after(0.011)
    assert service.taken[-1] == Doubt(("b",), "worker b out of sight: the connection ended")


def test_many_that_are_lost_together_are_given_up_in_one_decision() -> None:
    names = [f"w{number:02d}" for number in range(30)]
    service = running(*names, micro_batches=30, config=MembershipConfig(min_workers=1, max_workers=30))
    service.join("outside", micro_batches=30)
    service.disconnect(*names[:10], "outside")
    named = ", ".join(names[:8])
    assert service.taken[-2:] == [
        Doubt(tuple(names[:10]), f"workers {named} and 2 more out of sight: the connection ended"),
        Evict(("outside",), "worker outside given up: the connection ended"),
    ]
    silent = service.state.workers["w10"]
    silent.heard_at = service.now - 2.9
    assert service.after(0.51, beats=False)[0] == Evict(
        (*names[:11],), f"workers {named} and 3 more given up: silent for 3 s, or the connection ended"
    )


def test_a_broken_connection_is_a_loss_at_once_where_a_fellow_found_the_world_broken() -> None:
    service = running("a", "b", "c")
    service.ready("a", broken=True)
    assert service.settle() == [EndWorld("worker a found the world broken")]
    assert service.disconnect("b") == [Evict(("b",), "worker b given up: the connection ended")]


def test_when_most_connections_break_one_after_the_other_they_are_waited_for_too() -> None:
    service = running("a", "b", "c", "d", "e")
    service.ready("a", broken=True)
    service.settle()
    lost = [service.disconnect(name) for name in ("b", "c", "d", "e")]
    assert lost == [[Evict(("b",), "worker b given up: the connection ended")], [], [AWAY], []]
    assert service.after(1) == []


def test_a_silent_worker_is_evicted_after_the_bound() -> None:
    service = running("a", "b", config=MembershipConfig(min_workers=2, max_workers=2))
    for _ in range(3):
        service.now += 0.99
        service.beat("a")
        assert service.settle() == []
    service.now += 0.1
    assert service.settle()[0] == Evict(("b",), "worker b given up: silent for 3 s")


def test_when_most_connections_break_within_the_time_of_doubt_they_are_waited_for() -> None:
    service = running("a", "b", "c")
    for name, expected in (("a", []), ("b", [AWAY]), ("c", [])):
        assert service.disconnect(name) == expected
        assert service.after(0.4) == []
    assert service.after(3.7) == []
    lost = [Evict(("c", "b", "a"), "workers c, b, a given up: the connection ended")]
    assert service.after(0.2) == lost  # together, so that the world goes on if they are back
    assert back(service, "a", "b", "c")
    assert service.settle() == [BACK]
    assert service.runs == ("a", "b", "c")


@pytest.mark.parametrize("silent", [False, True], ids=["disconnected", "silent"])
def test_when_most_workers_come_back_the_rest_of_them_is_waited_for_as_long(silent: bool) -> None:
    service = running("a", "b", "c")
    if silent:
        assert service.after(4, beats=False) == [AWAY]
    else:
        assert service.disconnect("a", "b", "c") == [AWAY]
    for name, expected in (("a", []), ("b", []), ("c", [BACK])):
        assert service.after(1, beats=False) == []
        if silent:
            service.beat(name)
        else:
            back(service, name)
        assert service.settle() == expected
        for other in "abc"["abc".index(name) :: -1]:
            service.beat(other)
    assert service.after(0.5) == []
    assert service.runs == ("a", "b", "c")


def test_only_who_is_lost_is_given_up_where_others_of_a_majority_are_back() -> None:
    service = running("a", "b", "c", "d")
    service.disconnect("a", "b", "c")
    service.after(2)
    back(service, "b")
    assert service.after(2.9) == []
    assert service.after(0.2)[:2] == [
        Evict(("a", "c"), "workers a, c given up: the connection ended"),
        EndWorld("worker a was lost"),
    ]


def test_when_most_workers_fall_silent_together_they_are_waited_for() -> None:
    service = running("a", "b", "c")
    for name in "abc":
        service.beat(name)
        service.now += 0.3
    assert service.after(2.2, beats=False) == [AWAY]  # the first has been silent for more than 3 s by now
    assert service.after(4.8, beats=False) == []
    assert service.after(0.2, beats=False) == [Evict(("c", "b", "a"), "workers c, b, a given up: silent for 3 s")]
    assert back(service, "a", "b", "c")
    assert service.runs == ("a", "b", "c")


def test_a_silent_worker_is_not_waited_for_where_a_fellow_found_the_world_broken() -> None:
    service = running("a", "b", "c")
    service.now += 2.9
    service.ready("a", broken=True)
    service.settle()
    lost = [Evict(("b", "c"), "workers b, c given up: silent for 3 s")]
    assert service.after(0.2, beats=False) == [AWAY, *lost]


def test_silence_while_the_coordinator_itself_was_held_up_evicts_nobody() -> None:
    service = running("a", "b")
    service.beat("a", "reduce")
    service.now += 100
    events.woke_late(service.state, service.now)
    assert service.settle() == []
    assert service.after(2.9, beats=False) == []
    service.beat("a")
    assert service.after(0.2, beats=False)[0] == Evict(("b",), "worker b given up: silent for 3 s")


def test_when_most_connections_break_at_once_they_are_waited_for() -> None:
    service = running("a", "b", "c")
    assert service.disconnect("a", "b") == [AWAY]
    assert service.after(4.9) == []
    assert back(service, "a", "b")
    assert service.after(1) == [BACK]
    assert service.disconnect("a", "b") == [AWAY]
    assert [type(decision) for decision in service.after(5)] == [Evict, EndWorld]


def test_a_restarted_coordinator_adopts_the_world_that_reconnects() -> None:
    service = recovered("a", "b", "c")
    service.join("z")  # does not lead to a regroup that nobody would hear of
    assert back(service, "b")
    assert service.after(4) == []
    assert back(service, "a", "c")
    service.beat("a", micro_batches=3)
    assert service.settle() == [BACK]
    assert (service.world.generation, service.runs) == (5, ("a", "b", "c"))


def test_members_that_do_not_come_back_after_a_restart_are_given_up() -> None:
    service = recovered("a", "b")
    assert back(service, "a")
    assert service.after(5) == [
        Evict(("b",), "worker b given up: the connection ended"),
        EndWorld("worker b was lost"),
    ]
    assert isinstance(service.all_ready(broken=True)[0], FormWorld)
    assert service.world.generation == 6


def test_members_are_waited_for_less_long_where_others_already_wait_for_the_next_world() -> None:
    service = recovered("a", "b")
    assert back(service, "a")
    service.ready("a", broken=True)
    assert service.settle() == [EndWorld("worker a found the world broken")]
    assert service.after(1.4) == []
    evict, form = service.after(0.2)
    assert evict == Evict(("b",), "worker b given up: the connection ended")
    assert isinstance(form, FormWorld)


@pytest.mark.parametrize("generation", [0, 5], ids=["nothing is known", "only the number is known"])
def test_without_a_journal_the_world_is_taken_over_from_what_a_worker_reports(generation: int) -> None:
    service = Service(FOUR, State(generation=generation))
    assert events.hello(service.state, service.now, "b", "b", 5, ("a", "b"))
    assert events.hello(service.state, service.now, "a", "a", 5, ("a", "b"))
    assert service.after(30) == [BACK]
    assert (service.world.generation, service.runs) == (5, ("a", "b"))


def test_a_worker_that_is_still_in_an_older_world_when_a_newer_one_shows_up_is_sent_away() -> None:
    service = Service(FOUR)
    assert events.hello(service.state, service.now, "a", "a", 5, ("a", "c"))
    assert events.hello(service.state, service.now, "b", "b", 6, ("b",))
    assert Evict(("a",), "worker a still in an earlier generation than 6") in service.after(0.1)
    assert not events.hello(service.state, service.now, "a", "a", 5, ("a", "c"))
    assert service.runs == ("b",)


def test_a_stale_worker_has_to_leave_its_world_and_joins_like_a_new_one() -> None:
    service = running("a", config=FOUR)
    service.disconnect("a")
    service.after(1)
    service.join("b")
    assert service.after(60) == [FormWorld(("b",), "1 workers: b joined; a gone")]
    service.enter()
    assert not events.hello(service.state, service.now, "a", "a", 1, ("a",))
    service.ready("a", after=1, broken=True, micro_batches=1)
    assert service.settle() == [AskRegroup("worker a joins")]
    assert service.state.num_micro_batches == 8
    assert service.all_ready()[-1] == FormWorld(("b", "a"), "2 workers: a joined")


def test_a_world_out_of_sight_is_waited_for_before_another_one_starts_without_its_workers() -> None:
    service = running("a", "b", config=FOUR)
    service.disconnect("a", "b")
    service.after(5)
    service.join("c")
    assert "out of sight" in service.reason
    assert service.after(59.9) == []
    assert service.after(0.2) == [FormWorld(("c",), "1 workers: c joined; a, b gone")]


def test_a_world_that_comes_back_into_sight_goes_on_in_the_same_generation() -> None:
    service = running("a", "b", config=MembershipConfig(min_workers=2, max_workers=2))
    service.disconnect("a", "b")
    service.after(5)
    service.after(120)
    assert back(service, "b")
    assert service.after(3) == []
    assert back(service, "a")
    assert service.after(30) == [BACK]
    assert (service.world.generation, service.runs) == (1, ("a", "b"))


def test_no_one_is_waited_for_whose_process_was_seen_to_exit() -> None:
    service = running("a", "b", config=FOUR)
    service.join("c")
    service.disconnect("a")
    service.exit("a")
    assert service.exit("b") == [FormWorld(("c",), "1 workers: c joined; a, b gone")]


def test_neither_is_one_that_left_while_the_others_exited() -> None:
    service = running("a", "b", config=FOUR)
    events.left(service.state, service.now, "a")
    assert service.exit("b") == []
    assert service.join("c") == [FormWorld(("c",), "1 workers: c joined; a, b gone")]


def test_exits_of_strangers_are_not_kept() -> None:
    service = running("a")
    service.exit("nobody")
    assert service.world.certainly_gone == set()


def test_a_member_that_is_back_outside_its_world_needs_no_wait() -> None:
    service = running("a", "b", config=FOUR)
    service.disconnect("b")
    service.after(0.5)
    service.after(11)  # a does not come out either
    assert [type(decision) for decision in service.taken[-2:]] == [EndWorld, Evict]
    assert not back(service, "a")
    assert service.settle() == []  # time to say that it is ready
    service.ready("a", broken=True)
    assert service.settle() == [FormWorld(("a",), "1 workers: b gone")]


def test_one_that_leaves_in_good_order_ends_nothing() -> None:
    service = running("a", "b", config=FOUR)
    events.leaving(service.state, "b")
    assert service.settle() == [AskRegroup("worker b leaves")]
    assert worker_state(service.now, service.state, service.state.workers["b"]) == "draining"
    service.ready("a")
    assert service.settle() == []
    events.left(service.state, service.now, "b")
    assert service.settle() == [FormWorld(("a",), "1 workers: b gone")]
    assert service.state.crashes == {}


def test_the_last_one_that_leaves_is_waited_for_before_others_start() -> None:
    service = running("a", config=FOUR)
    service.join("c")
    service.ready("a")
    events.leaving(service.state, "a")
    assert service.settle() == []
    events.left(service.state, service.now, "a")
    assert service.settle() == [FormWorld(("c",), "1 workers: c joined; a gone")]


def test_a_worker_whose_connection_breaks_at_the_boundary_is_not_overlooked() -> None:
    service = running("a", config=FOUR)
    service.join("b")
    service.ready("a")
    events.disconnected(service.state, service.now, "a")
    assert service.settle() == []  # b alone would lack the state
    back(service, "a")
    service.ready("a")
    assert service.settle() == [FormWorld(("a", "b"), "2 workers: b joined")]


def test_a_worker_that_does_not_come_out_of_a_world_is_evicted() -> None:
    service = running("a", "b")
    service.ready("a", broken=True)
    service.settle()
    assert service.after(10) == []
    assert service.after(0.1)[0] == Evict(("b",), "worker b did not come out of the world within 10 s")


def test_a_world_that_does_not_form_is_over_and_only_those_that_hang_are_evicted() -> None:
    service = Service(MembershipConfig(min_workers=2, max_workers=2))
    service.join("a", "b")
    assert service.after(30) == []
    assert service.after(0.1) == [EndWorld("worker a did not enter generation 1 within 30 s")]
    service.ready("a", broken=True)
    assert service.after(10.1)[0] == Evict(("b",), "worker b did not come out of the world within 10 s")


def test_a_worker_that_reconnects_while_its_world_forms_stays_in_it() -> None:
    service = Service(MembershipConfig(min_workers=2, max_workers=2))
    service.join("a", "b")
    service.disconnect("b")
    assert back(service, "b")
    assert service.settle() == []
    assert service.enter() == []
    assert service.runs == ("a", "b")


def test_a_worker_that_lost_the_order_to_form_ends_the_forming() -> None:
    service = Service(MembershipConfig(min_workers=2, max_workers=2))
    service.join("a", "b")
    assert events.hello(service.state, service.now, "b", "b")
    assert service.settle() == [EndWorld("worker b was lost")]
    service.ready("b", after=-1)
    assert service.settle() == []
    assert service.all_ready(broken=True) == [FormWorld(("a", "b"), "2 workers: the same as before")]


def test_a_worker_that_leaves_while_the_world_forms_ends_the_forming() -> None:
    service = Service(MembershipConfig(min_workers=2, max_workers=2))
    service.join("a", "b")
    events.left(service.state, service.now, "b")
    assert service.settle() == [EndWorld("a worker left while the world formed")]


def test_a_crash_loop_cools_down_and_comes_back_each_time_later() -> None:
    service = running("a", config=FOUR)
    for name in ("x1", "x2", "x3"):
        service.join(name, slot="x")
        service.exit(name)
    service.world.regroup = None
    assert service.join("x4", slot="x") == []
    assert worker_state(service.now, service.state, service.state.workers["x4"]) == "cooling down"
    assert service.after(29.9) == []
    assert service.after(0.2) == [AskRegroup("worker x4 joins")]
    service.exit("x4")
    for name in ("x5", "x6"):
        service.join(name, slot="x")
        service.exit(name)
    service.world.regroup = None
    assert service.join("x7", slot="x") == []
    assert service.after(59) == []
    assert service.after(2) == [AskRegroup("worker x7 joins")]


def test_a_slot_that_has_long_been_sound_starts_over_with_its_cool_downs() -> None:
    def crash_thrice() -> float:
        for number in range(3):
            service.join(f"x{number}", slot="x")
            service.exit(f"x{number}")
        return service.state.cooling["x"] - service.now

    service = running("a", config=FOUR)
    assert [crash_thrice(), crash_thrice()] == [30, 60]
    service.after(60 + 479)
    assert crash_thrice() == 120
    service.after(120 + 480)
    assert crash_thrice() == 30


def test_losses_far_apart_do_not_cool_a_slot_down() -> None:
    service = running("a", config=FOUR)
    for name in ("x1", "x2", "x3", "x4"):
        service.join(name, slot="x")
        service.exit(name)
        service.after(31)
    assert service.state.cooling == {}


def test_a_newcomer_that_no_world_can_be_formed_with_is_held_off_for_a_while() -> None:
    service = running("a", config=FOUR)
    service.join("bad")
    service.all_ready()
    for _ in range(3):
        assert service.world.members == ("a", "bad")
        service.ready("a", broken=True)
        service.settle()
        service.ready("bad", broken=True)
        service.settle()
    assert service.world.members == ("a",)
    service.enter()
    assert service.after(29) == []
    assert service.after(2) == [AskRegroup("worker bad joins")]


def test_a_worker_that_all_others_wait_for_is_stalled() -> None:
    service = running("a", "b", "c")
    for name, stage in (("a", "reduce"), ("b", "compute"), ("c", "reduce")):
        service.beat(name, stage)
    assert service.after(30) == []
    assert service.after(0.1)[0] == Evict(("b",), "worker b stalled: others wait for its compute for 30 s")


def test_two_that_stall_together_are_evicted_too() -> None:
    service = running("a", "b", "c", config=FOUR)
    service.beat("a", "reduce")
    assert [d.workers for d in service.after(30.1) if isinstance(d, Evict)] == [("b",)]
    service.ready("a", broken=True)
    assert [d.workers for d in service.after(10.1) if isinstance(d, Evict)] == [("c",)]
    assert service.world.members == ("a",)


def test_a_stage_that_announced_itself_or_a_slow_job_is_no_stall() -> None:
    service = running("a", "b")
    service.beat("a", "reduce")
    service.beat("b", "compute", busy=100)
    assert service.after(90) == []
    service.beat("b", "compute")
    service.state.median_update = 20
    assert service.after(100) == []
    assert isinstance(service.after(11)[0], Evict)


def test_all_asleep_in_their_own_code_are_left_alone() -> None:
    service = running("a", "b")
    service.beat("a", "user")
    service.beat("b", "user")
    assert service.after(1000) == []


def test_a_request_to_regroup_that_a_worker_may_have_missed_is_made_again() -> None:
    service = running("a", config=FOUR)
    service.join("b")
    service.disconnect("a")
    assert back(service, "a")
    assert service.settle() == [AskRegroup("worker b joins")]


def test_after_the_end_nothing_is_formed() -> None:
    service = running("a", config=FOUR)
    service.state.ended = "the job is complete"
    assert service.join("b") == []
    assert service.reason == "the job is complete"
    assert service.exit("a") == []


def test_nobody_waits_for_a_worker_that_came_out_to_leave() -> None:
    service = running("a", "b", "x", config=MembershipConfig(min_workers=1, max_workers=3))
    events.leaving(service.state, "x")
    service.settle()
    [formed] = [decision for decision in service.all_ready() if isinstance(decision, FormWorld)]
    assert formed.members == ("a", "b")


def test_the_last_worker_with_the_state_is_waited_for_until_it_has_saved_it() -> None:
    service = running("a", "x", config=MembershipConfig(min_workers=1, max_workers=2))
    service.join("n")
    events.leaving(service.state, "x")
    service.exit("a")
    service.ready("x", broken=True)
    assert not [decision for decision in service.settle() if isinstance(decision, FormWorld)]
    service.beat("x", "wait", busy=600)
    assert not [decision for decision in service.after(5 * service.config.gather) if isinstance(decision, FormWorld)]
    events.left(service.state, service.now, "x")
    [formed] = [decision for decision in service.settle() if isinstance(decision, FormWorld)]
    assert formed.members == ("n",)


def test_a_worker_that_never_says_goodbye_is_given_up() -> None:
    service = running("a", "x", config=MembershipConfig(min_workers=1, max_workers=2))
    service.join("n")
    events.leaving(service.state, "x")
    service.exit("a")
    service.ready("x", broken=True)
    service.settle()
    assert [type(decision) for decision in service.after(service.config.gather + 1)] == [Evict]
    [formed] = service.after(service.config.orphan_grace + 1)
    assert isinstance(formed, FormWorld)
    assert formed.members == ("n",)


def _forming_with_a_joiner(config: MembershipConfig = FOUR) -> Service:
    """Worker a trained alone; a world of it and b, who has no state yet, forms."""
    service = running("a", config=config)
    service.join("b")
    service.all_ready()
    assert service.world.members == ("a", "b")
    return service


def test_a_joiner_without_the_state_waits_for_whoever_has_it() -> None:
    service = _forming_with_a_joiner()
    service.disconnect("a")
    assert [type(decision) for decision in service.after(0.021)] == [Evict, EndWorld]
    service.ready("b", broken=True)
    assert service.settle() == []
    assert "have the newest state are out of sight" in service.reason
    service.after(0.04)
    assert not back(service, "a")
    service.ready("a", broken=True)
    assert service.settle() == [FormWorld(("a", "b"), "2 workers: the same as before")]


def test_without_whoever_has_the_state_a_joiner_starts_after_the_grace() -> None:
    service = _forming_with_a_joiner()
    service.disconnect("a")
    service.after(0.021)
    service.ready("b", broken=True)
    assert service.after(59.9) == []
    assert service.after(0.2) == [FormWorld(("b",), "1 workers: a gone")]


def test_nobody_waits_for_the_state_of_a_worker_that_is_seen_to_end() -> None:
    service = _forming_with_a_joiner()
    service.exit("a")
    service.ready("b", broken=True)
    assert service.settle() == [FormWorld(("b",), "1 workers: a gone")]


def test_whoever_has_the_state_may_come_late_out_of_a_world_that_did_not_form() -> None:
    service = _forming_with_a_joiner()
    service.ready("b", broken=True)
    assert [type(decision) for decision in service.settle()] == [EndWorld]
    assert [type(decision) for decision in service.after(10.1)] == [Evict]
    assert not back(service, "a")
    service.after(5)
    service.ready("a", broken=True)
    assert service.settle() == [FormWorld(("a", "b"), "2 workers: the same as before")]


def test_a_worker_that_saves_the_state_is_waited_for_though_a_joiner_waits() -> None:
    service = _forming_with_a_joiner()
    events.leaving(service.state, "a")
    service.ready("b", broken=True)
    service.ready("a", broken=True)
    assert [type(decision) for decision in service.settle()] == [EndWorld]
    service.beat("a", "wait", busy=600)
    assert service.after(100) == []
    events.left(service.state, service.now, "a")
    assert service.settle() == [FormWorld(("b",), "1 workers: a gone")]


def test_a_joiner_has_the_state_once_it_entered() -> None:
    service = _forming_with_a_joiner()
    service.disconnect("a")
    service.after(0.021)
    service.enter("b")  # it was under way
    service.ready("b", broken=True)
    assert service.settle() == [FormWorld(("b",), "1 workers: a gone")]


def test_whoever_has_the_state_is_in_a_world_that_has_room_for_one() -> None:
    service = _forming_with_a_joiner()
    service.disconnect("a")
    service.after(0.021)
    service.ready("b", broken=True)
    service.config = replace(service.config, max_workers=1)
    back(service, "a")
    service.ready("a", broken=True)
    assert service.settle() == [FormWorld(("a",), "1 workers: b gone")]


def test_whoever_has_the_state_is_not_held_off_for_losing_its_connection() -> None:
    service = _forming_with_a_joiner()
    for _ in range(4):  # the first time in another slot
        service.disconnect("a")
        service.after(0.021)
        back(service, "a")
    assert "a" in service.state.cooling
    service.ready("b", broken=True)
    service.ready("a", broken=True)
    assert service.settle() == [FormWorld(("a", "b"), "2 workers: the same as before")]


def test_a_world_that_may_train_unseen_is_waited_for_though_another_one_has_the_state() -> None:
    service = running("a", "b", micro_batches=2, config=FOUR)
    service.beat("a", update=2, micro_batches=1)
    service.settle()
    service.all_ready(micro_batches=1)
    assert service.world.members == ("a",)
    service.disconnect("a")
    service.after(0.1)
    assert service.after(59.9) == []
    assert service.after(0.2) == [FormWorld(("b",), "1 workers: b joined; a gone")]


def test_a_newcomer_is_held_off_though_whoever_has_the_state_was_given_up_before() -> None:
    service = _forming_with_a_joiner()
    service.disconnect("a")
    service.after(0.021)
    service.ready("b", broken=True)
    back(service, "a")
    service.ready("a", broken=True)
    service.settle()
    for _ in range(3):
        assert service.world.members == ("a", "b")
        service.ready("b", broken=True)
        service.settle()
        service.ready("a", broken=True)
        service.settle()
    assert service.world.members == ("a",)


def test_a_ready_from_before_a_worker_heard_of_its_world_changes_nothing() -> None:
    service = _forming_with_a_joiner()
    service.ready("b", after=-1)
    service.ready("a", after=1)
    assert service.settle() == []
    assert service.enter() == []
    assert service.runs == ("a", "b")
