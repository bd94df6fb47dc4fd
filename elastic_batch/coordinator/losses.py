"""Who is out of sight, and who is lost: pure functions of the time and of what is known.

A broken connection says that a worker died, or that the way to it broke. In the second case the world trains on, and
ending it would be the only harm done. So it matters who else noticed, and how many went together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic_batch.coordinator.events import inside, unaccounted
from elastic_batch.coordinator.state import MembershipConfig, Phase, State, Worker, World

_MOST_NAMES = 8


@dataclass(frozen=True, slots=True)
class Evict:
    """Give workers up."""

    workers: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class LoseSight:
    """Take it that the way to the world's workers broke, and wait for them."""

    reason: str


@dataclass(frozen=True, slots=True)
class RegainSight:
    """The world's workers are all back."""

    reason: str


@dataclass(frozen=True, slots=True)
class Doubt:
    """Ask the others of a world whether they miss these workers too."""

    workers: tuple[str, ...]
    reason: str


Finding = Evict | Doubt | LoseSight | RegainSight


def look_around(now: float, state: State, config: MembershipConfig) -> Finding | None:
    """What is to be done about workers that are out of sight; None if nothing is now. It is asked again after each.

    A world goes out of sight with more than half of its workers and is back with the last of them. What lies between is
    one event: those that come later than others are waited for as long.

    Args:
        now: Seconds of the clock that the state's times are of.
        state: What is known.
        config: The rules' numbers.
    """
    # Where cables are cut there is nothing but silence, in which workers differ by up to a beat.
    margin = min(config.beat, config.eviction / 3)
    latest, generation = now - config.eviction + margin, state.generation
    stale: list[str] = []
    missing: dict[str, float] = {}  # worker -> seconds since it went out of sight; less than 0: it soon will have
    for worker in state.workers.values():
        if worker.connected and worker.heard_at > latest and worker.generation == generation:
            continue  # as nearly all of thousands
        if worker.connected and 0 <= worker.generation < generation and not worker.ready:
            stale.append(worker.name)
        if not worker.connected:
            missing[worker.name] = now - worker.disconnected_at
        elif worker.heard_at <= latest:
            missing[worker.name] = now - worker.heard_at - config.eviction
    if stale:
        return Evict(tuple(stale), f"{name_some(stale)} still in an earlier generation than {generation}")
    world = state.world
    if world is None or not (missing or world.out_of_sight):
        return _give_up(_lost_outsiders(state, missing), config)
    inner = inside(state)
    trains_on = world.phase is Phase.RUNNING and world.boundary_since is None and not _is_broken(inner)
    unseen = {worker.name: missing[worker.name] for worker in inner if missing.get(worker.name, -1.0) >= 0}
    num_members = len(unaccounted(world))
    num_seen = sum(worker.name not in (missing if trains_on else unseen) for worker in inner)
    if world.out_of_sight and num_seen == num_members:
        return RegainSight("all workers are back")
    if not world.out_of_sight and unseen and num_members > 1 and 2 * num_seen < num_members:
        return LoseSight("most workers went out of sight together")
    if trains_on and not world.out_of_sight and now - world.probed_at >= config.settle:
        doubtful = tuple(worker.name for worker in inner if not worker.connected and not worker.doubted)
        if doubtful:
            return Doubt(doubtful, f"{name_some(doubtful)} out of sight: the connection ended")
    is_known = _is_broken(inner) and len(unseen) == 1 and len(inner) == num_members
    silent, cut = _graces(world, trains_on=trains_on, is_known=is_known, config=config)
    due = [w for w in inner if w.name in unseen and unseen[w.name] >= (silent if w.connected else cut)]
    if due and trains_on and len(unseen) == len(inner):
        # All go with the first, and the last one first: the world may train on unseen, and is not over.
        due = sorted(inner, key=lambda worker: unseen[worker.name])
    return _give_up(due + _lost_outsiders(state, missing), config)


def name_some(workers: Sequence[str]) -> str:
    """For people: which workers, of which there may be thousands."""
    if len(workers) == 1:
        return f"worker {workers[0]}"
    rest = f" and {len(workers) - _MOST_NAMES} more" if len(workers) > _MOST_NAMES else ""
    return f"workers {', '.join(workers[:_MOST_NAMES])}{rest}"


def _graces(world: World, *, trains_on: bool, is_known: bool, config: MembershipConfig) -> tuple[float, float]:
    """How long a silent worker, and one whose connection ended, may take to come back.

    Args:
        world: Which they are in.
        trains_on: Whether it does, so far as anybody says.
        is_known: Whether the one that is missing is why the world broke.
        config: The rules' numbers.
    """
    if world.out_of_sight and trains_on:
        return config.reconnect_grace, config.reconnect_grace
    if world.out_of_sight:
        is_over = world.phase is Phase.ENDING
        return 0.0, min(config.reconnect_grace, config.return_grace) if is_over else config.reconnect_grace
    if trains_on:
        return 0.0, config.doubt
    return 0.0, 0.0 if is_known else config.settle


def _lost_outsiders(state: State, missing: dict[str, float]) -> list[Worker]:
    """Those outside the world, for whom nobody waits."""
    if not missing:
        return []
    names = {worker.name for worker in inside(state)}
    return [state.workers[name] for name, seconds in missing.items() if name not in names and seconds >= 0]


def _is_broken(inner: list[Worker]) -> bool:
    return any(worker.ready and worker.broken for worker in inner)


def _give_up(lost: list[Worker], config: MembershipConfig) -> Evict | None:
    if not lost:
        return None
    silent = sum(worker.connected for worker in lost)
    causes = [f"silent for {config.eviction:g} s"] * bool(silent) + ["the connection ended"] * (silent < len(lost))
    names = tuple(worker.name for worker in lost)
    return Evict(names, f"{name_some(names)} given up: {', or '.join(causes)}")
