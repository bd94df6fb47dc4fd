"""The faults that a job has to come through, each at each stage: how to make one happen, and how long it may take."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

from support.trials import CONFIG, PATIENCE_SECONDS, RECONNECT_SECONDS, Trial, after_loss, monotonic

from elastic_batch.failpoints import ACTIONS

STEADY = ("compute.pass", "reduce.start", "reduce.header", "commit.start", "commit.done")
FORMING = ("join.ready", "form.start", "form.done", "sync.start", "sync.done", "transfer.tensor")
NUM_TENSORS = {"digits": 13, "tokens": 17}
"""Tensors of each job's state, which a source sends."""
SECONDS = {"stop": CONFIG.eviction + 1.0, "slow": 0.4, "partition": 1.0, "kill": 0.0, "leave": 0.0}
"""How long each action lasts: one that is stopped wakes after it was given up."""
AFTER_RESTART = RECONNECT_SECONDS + CONFIG.reconnect_grace
CUT_OFF_SECONDS = 2 * CONFIG.orphan_grace

Strike = Callable[[Trial, str, int], None]
"""Of (trial, the cell's name, which repetition): makes the fault happen and sees the job recover."""


@dataclass(frozen=True)
class Cell:
    """One fault at one stage.

    Args:
        name: `fault at stage`.
        strike: Makes it happen.
    """

    name: str
    strike: Strike


def cells() -> list[Cell]:
    """All of them."""
    found = [Cell(f"{action} at {place}", _steady(place, action)) for place in STEADY for action in ACTIONS]
    found += [Cell(f"{action} at {place}", _forming(place, action)) for place in FORMING for action in ACTIONS]
    found += [Cell(f"{action} at checkpoint.start", _at_checkpoint(action)) for action in ACTIONS]
    found += [Cell(f"{action} at leave.start", _at_leaving(action)) for action in ACTIONS if action != "leave"]
    counts = range(1, max(NUM_TENSORS.values()) + 1)
    found += [Cell(f"source killed at tensor {count}", _source_killed(count)) for count in counts]
    return [
        *found,
        Cell("coordinator killed while training", _coordinator_killed),
        Cell("coordinator stopped while training", _coordinator_stopped),
        Cell("coordinator killed at coordinator.decision", _coordinator_killed_at("coordinator.decision")),
        Cell("coordinator killed at coordinator.form", _coordinator_killed_at("coordinator.form")),
        Cell("coordinator and a worker killed", _coordinator_and_worker_killed),
        Cell("two workers killed at once", _two_killed),
        Cell("a worker stopped and another killed", _one_stopped_one_killed),
        Cell("source and joiner killed at once", _source_and_joiner_killed),
        Cell("all workers killed", _all_killed),
        Cell("all workers told to end", _all_told_to_end),
        Cell("all workers cut off", _all_cut_off),
        Cell("all workers cut off while another waits", _all_cut_off_and_one_waits),
    ]


def _detected(action: str) -> float:
    """Seconds until a fault is noticed."""
    if action == "stop":
        return CONFIG.eviction
    return CONFIG.doubt + SECONDS[action]


def _text(place: str, count: int, action: str) -> str:
    return f"{place}:{count}={action},{SECONDS[action]}"


def _replace(trial: Trial, action: str) -> None:
    """Somebody else is started for one that was lost, before a stopped one wakes."""
    if action in ("kill", "stop"):
        trial.start_worker()


def _steady(place: str, action: str) -> Strike:
    """In the middle of an update; the first worker and others in turn."""

    def strike(trial: Trial, cell: str, repetition: int) -> None:
        world = trial.bring_to(2 + repetition % 2)
        rank = 0 if repetition % 2 == 0 else len(world) - 1
        victim, before = world[rank], len(trial.cluster.happened())
        trial.may_die(*([victim] if action == "kill" else []))
        trial.cluster.arm(victim, _text(place, 1 + repetition % 3, action))
        moment = trial.await_faults_after(before)
        trial.recovers(cell, f"rank {rank} of {len(world)}", moment, after_loss(_detected(action)))
        _replace(trial, action)

    return strike


def _forming(place: str, action: str) -> Strike:
    """While a joiner is taken in; the first worker, the joiner, and another one in turn."""

    def strike(trial: Trial, cell: str, repetition: int) -> None:
        world = trial.bring_to(2)
        before = len(trial.cluster.happened())
        text = _text(place, 1 + repetition % 2 if place == "transfer.tensor" else 1, action)
        who = ("rank 0", "the joiner", "rank 1")[repetition % 3]
        if who == "the joiner":
            victim = trial.start_worker(text)
        else:
            victim = world[int(who[-1])]
            trial.cluster.arm(victim, text)
            trial.start_worker()
        trial.may_die(*([victim] if action == "kill" else []))
        moment = trial.await_faults_after(before)
        trial.recovers(cell, f"{who} of a world that grows to 3", moment, after_loss(_detected(action), formings=2))
        _replace(trial, action)

    return strike


def _at_checkpoint(action: str) -> Strike:
    def strike(trial: Trial, cell: str, repetition: int) -> None:
        victim, before = trial.bring_to(2)[0], len(trial.cluster.happened())
        trial.may_die(*([victim] if action == "kill" else []))
        trial.cluster.arm(victim, _text("checkpoint.start", 1 + repetition % 2, action))
        moment = trial.await_faults_after(before)
        trial.recovers(cell, "the first worker", moment, after_loss(_detected(action)))
        _replace(trial, action)

    return strike


def _at_leaving(action: str) -> Strike:
    def strike(trial: Trial, cell: str, repetition: int) -> None:
        world, before = trial.bring_to(2), len(trial.cluster.happened())
        victim = world[repetition % 2]
        trial.may_die(*([victim] if action == "kill" else []))
        trial.cluster.arm(victim, _text("leave.start", 1, action))
        trial.cluster.kill(victim, signal.SIGTERM)
        moment = trial.await_faults_after(before)
        trial.recovers(cell, f"rank {repetition % 2} of 2", moment, after_loss(_detected(action)))

    return strike


def _source_killed(count: int) -> Strike:
    """The state's source dies at one tensor of the transfer to a joiner."""

    def strike(trial: Trial, cell: str, repetition: int) -> None:
        size = 1 + repetition % 2
        source, before = trial.bring_to(size)[0], len(trial.cluster.happened())
        trial.may_die(source)
        # Where the state has fewer, the source dies at the last.
        trial.cluster.arm(source, _text("transfer.tensor", min(count, NUM_TENSORS[trial.job]), "kill"))
        trial.start_worker()
        moment = trial.await_faults_after(before)
        # Where the source was the only one with a state, the joiner starts from the newest checkpoint.
        orphan = CONFIG.orphan_grace if size == 1 else 0.0
        trial.recovers(cell, f"rank 0 of {size}", moment, orphan + after_loss(CONFIG.doubt, formings=2))

    return strike


def _coordinator_killed(trial: Trial, cell: str, repetition: int) -> None:
    trial.bring_to(2 + repetition % 2)
    update, generation = trial.tail.before(monotonic())
    moment = monotonic()
    trial.cluster.kill_coordinator()
    trial.recovers(cell, "the coordinator", moment, after_loss(0) - CONFIG.gather - CONFIG.form)
    trial.cluster.start_coordinator()
    update = trial.tail.last_update
    trial.wait(lambda: trial.tail.last_update > update + 3, PATIENCE_SECONDS, "training goes on")
    assert trial.tail.lines[-1]["generation"] == generation, "a restarted coordinator made another world"


def _coordinator_stopped(trial: Trial, cell: str, repetition: int) -> None:
    trial.bring_to(2 + repetition % 2)
    coordinator = trial.cluster.coordinator
    assert coordinator is not None
    _, generation = trial.tail.before(monotonic())
    moment = monotonic()
    coordinator.send_signal(signal.SIGSTOP)
    trial.wait(lambda: monotonic() > moment + SECONDS["stop"], PATIENCE_SECONDS, "it stands still")
    coordinator.send_signal(signal.SIGCONT)
    trial.recovers(cell, "the coordinator", moment, after_loss(0) - CONFIG.gather - CONFIG.form)
    awake = trial.tail.last_update
    trial.wait(lambda: trial.tail.last_update > awake + 3, PATIENCE_SECONDS, "training goes on")
    assert trial.tail.lines[-1]["generation"] == generation, "a coordinator that was held up gave workers up"


def _coordinator_killed_at(place: str) -> Strike:
    def strike(trial: Trial, cell: str, repetition: int) -> None:
        world, before = trial.bring_to(2), len(trial.cluster.happened())
        trial.cluster.kill_coordinator()
        trial.cluster.start_coordinator(_text(place, 1, "kill"))

        def are_back() -> bool:
            # If they come back one by one, that they are all there again is a decision already.
            return len(trial.by_rank()) == len(world) or len(trial.cluster.happened()) > before

        trial.wait(are_back, PATIENCE_SECONDS, "the workers are back")
        trial.start_worker()  # deciding that it joins, or forming the world with it, is the end at the latest
        moment = trial.await_faults_after(before)
        trial.cluster.start_coordinator()
        detect = monotonic() - moment + AFTER_RESTART
        trial.recovers(cell, "the coordinator, as a worker joins", moment, after_loss(detect))

    return strike


def _coordinator_and_worker_killed(trial: Trial, cell: str, repetition: int) -> None:
    world = trial.bring_to(2 + repetition % 2)
    rank = 0 if repetition % 2 == 0 else len(world) - 1
    trial.may_die(world[rank])
    moment = monotonic()
    trial.cluster.kill_coordinator()
    trial.cluster.kill(world[rank])
    trial.cluster.start_coordinator()
    detect = monotonic() - moment + AFTER_RESTART
    trial.recovers(cell, f"rank {rank} of {len(world)} and the coordinator", moment, after_loss(detect))
    _replace(trial, "kill")


def _two_killed(trial: Trial, cell: str, repetition: int) -> None:
    world = trial.bring_to(3)
    pair = ((0, 1), (1, 2), (0, 2))[repetition % 3]
    before = len(trial.cluster.happened())
    trial.may_die(*(world[rank] for rank in pair))
    for rank in pair:
        trial.cluster.arm(world[rank], _text(STEADY[repetition % len(STEADY)], 1, "kill"))
    moment = trial.await_faults_after(before)
    for rank in pair:
        trial.cluster.kill(world[rank])  # the second may wait for the first in a reduction
    # Two of three connections that end at once may come back.
    bound = after_loss(CONFIG.doubt + CONFIG.reconnect_grace)
    trial.recovers(cell, f"ranks {pair[0]} and {pair[1]} of 3", moment, bound)
    _replace(trial, "kill")


def _one_stopped_one_killed(trial: Trial, cell: str, repetition: int) -> None:
    world = trial.bring_to(3)
    stopped, killed = ((0, 1), (1, 0), (2, 1))[repetition % 3]
    before = len(trial.cluster.happened())
    trial.may_die(world[killed])
    trial.cluster.arm(world[stopped], _text(STEADY[repetition % len(STEADY)], 1, "stop"))
    moment = trial.await_faults_after(before)
    trial.cluster.kill(world[killed])
    trial.recovers(cell, f"ranks {stopped} and {killed} of 3", moment, after_loss(_detected("stop"), formings=2))
    _replace(trial, "kill")


def _source_and_joiner_killed(trial: Trial, cell: str, repetition: int) -> None:
    world, before = trial.bring_to(2), len(trial.cluster.happened())
    text = _text("transfer.tensor", 1 + repetition, "kill")
    trial.cluster.arm(world[0], text)
    joiner = trial.start_worker(text)
    trial.may_die(world[0], joiner)
    moment = trial.await_faults_after(before)
    trial.cluster.kill(world[0])
    trial.cluster.kill(joiner)
    trial.recovers(cell, "rank 0 of 2 and the joiner", moment, after_loss(CONFIG.doubt + CONFIG.reconnect_grace))
    _replace(trial, "kill")


def _all_killed(trial: Trial, cell: str, repetition: int) -> None:
    world = trial.bring_to(1 + repetition % 3)
    trial.may_die(*world)
    moment = monotonic()
    for slot in world:
        trial.cluster.kill(slot)
    trial.start_worker()
    bound = after_loss(CONFIG.reconnect_grace + CONFIG.orphan_grace + PATIENCE_SECONDS / 6)
    trial.recovers(cell, f"all {len(world)}; another one is started", moment, bound)


def _all_told_to_end(trial: Trial, cell: str, repetition: int) -> None:
    world = trial.bring_to(1 + repetition % 3)
    moment = monotonic()
    for slot in world:
        trial.cluster.kill(slot, signal.SIGTERM)
    trial.wait(lambda: not trial.living(), PATIENCE_SECONDS, "all have left")
    _, generation = trial.tail.before(monotonic())
    update = max(line["update"] for line in trial.tail.lines if line["generation"] == generation)
    trial.start_worker()
    detect = monotonic() - moment + PATIENCE_SECONDS / 6
    trial.recovers(cell, f"all {len(world)}; another one is started", moment, after_loss(detect))
    trial.wait(lambda: trial.tail.last_update > update, PATIENCE_SECONDS, "training goes on")
    later = [line["update"] for line in trial.tail.lines if line["generation"] > generation]
    assert min(later) == update + 1, f"update {min(later)} was done again, though {update} was committed and saved"


def _cut_all_off(trial: Trial, size: int) -> float:
    world, before = trial.bring_to(size), len(trial.cluster.happened())
    for slot in world:
        trial.cluster.arm(slot, f"compute.pass:1=partition,{CUT_OFF_SECONDS}")
    return trial.await_faults_after(before, size)


def _all_cut_off(trial: Trial, cell: str, repetition: int) -> None:
    """They train on, and are taken back."""
    size = 1 + repetition % 3
    moment = _cut_all_off(trial, size)
    _, generation = trial.tail.before(moment)
    trial.recovers(cell, f"all {size}", moment, after_loss(0) - CONFIG.gather - CONFIG.form)
    trial.wait(lambda: monotonic() > moment + CUT_OFF_SECONDS, PATIENCE_SECONDS, "they are cut off")
    trial.wait(lambda: len(trial.by_rank()) == size, PATIENCE_SECONDS, "the workers are back")
    assert trial.tail.lines[-1]["generation"] == generation, "a world that trained on unseen was ended"


def _all_cut_off_and_one_waits(trial: Trial, cell: str, repetition: int) -> None:
    """Another world starts without them; back, they drop their state and join it."""
    moment = _cut_all_off(trial, 1 + repetition % 2)
    trial.start_worker()
    trial.recovers(cell, f"all {1 + repetition % 2}", moment, after_loss(0) - CONFIG.gather - CONFIG.form)
    trial.wait(lambda: monotonic() > moment + CUT_OFF_SECONDS, PATIENCE_SECONDS, "they are cut off")
