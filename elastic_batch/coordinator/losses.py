"""Who is out of sight, and who is lost: pure functions of the time and of what is known.

A broken connection says that a worker died, or that the way to it broke. In the second case the world trains on, and
ending it would be the only harm done. So it matters who else noticed, and how many went together.
"""

from __future__ import annotations

from elastic_batch.coordinator.events import inside
from elastic_batch.coordinator.state import MembershipConfig, Phase, State, Worker, World


def changes_sight(now: float, state: State, config: MembershipConfig) -> bool | None:
    """Whether the world, as a whole, came into sight (True) or went out of it (False) just now; None: neither.

    It goes with more than half of its workers and is back with the last of them. What lies between is one event: those
    that come later than others are waited for as long.
    """
    world = state.world
    if world is None:
        return None
    inner = inside(state)
    # Where cables are cut there is nothing but silence, in which workers differ by up to a beat.
    margin = min(config.beat, config.eviction / 3) if _trains_on(world, inner) else 0.0
    num_members = _num_members(world)
    num_seen = sum(_unseen(now, worker, config) < -margin for worker in inner)
    if world.out_of_sight:
        return True if num_seen == num_members else None
    is_awaited = any(_unseen(now, worker, config) >= 0 for worker in inner)
    return False if is_awaited and num_members > 1 and 2 * num_seen < num_members else None


def find_lost(now: float, state: State, config: MembershipConfig) -> tuple[str, str] | None:
    """A worker to be given up, and why; None if there is none now. It is asked again after each.

    Args:
        now: Seconds of the clock that the state's times are of.
        state: What is known; whether the world is out of sight is up to date.
        config: The rules' numbers.
    """
    inner = inside(state)
    names = {worker.name for worker in inner}
    for worker in state.workers.values():
        if worker.connected and 0 <= worker.generation < state.generation and not worker.ready:
            return worker.name, f"worker {worker.name} is still in generation {worker.generation}"
        if worker.name not in names and _unseen(now, worker, config) >= 0:
            return _reason(worker, config)
    if state.world is not None and (member := _lost_member(now, state.world, inner, config)) is not None:
        return _reason(member, config)
    return None


def _lost_member(now: float, world: World, inner: list[Worker], config: MembershipConfig) -> Worker | None:
    unseen = {worker.name: seconds for worker in inner if (seconds := _unseen(now, worker, config)) >= 0}
    due = [w for w in inner if w.name in unseen and unseen[w.name] >= _grace(world, inner, w, len(unseen), config)]
    if due and len(unseen) == len(inner) and _trains_on(world, inner):
        # All go with the first, and the last one first: the world may train on unseen, and is not over.
        return min(inner, key=lambda worker: unseen[worker.name])
    return due[0] if due else None


def _grace(world: World, inner: list[Worker], worker: Worker, num_unseen: int, config: MembershipConfig) -> float:
    """How long a worker that is out of sight may take to come back."""
    trains_on = _trains_on(world, inner)
    if worker.connected:  # and silent
        return config.reconnect_grace if world.out_of_sight and trains_on else 0.0
    if world.out_of_sight:
        is_over = world.phase is Phase.ENDING
        return min(config.reconnect_grace, config.return_grace) if is_over else config.reconnect_grace
    if trains_on:
        return config.doubt
    is_alone = num_unseen == 1 and len(inner) == _num_members(world)
    return 0.0 if is_alone and _is_broken(inner) else config.settle


def _trains_on(world: World, inner: list[Worker]) -> bool:
    """Whether the world runs, so far as anybody says."""
    return world.phase is Phase.RUNNING and world.boundary_since is None and not _is_broken(inner)


def _num_members(world: World) -> int:
    """How many workers the world has but for those that certainly are in it no more."""
    return len(set(world.members).difference(world.left, world.certainly_gone))


def _is_broken(inner: list[Worker]) -> bool:
    return any(worker.ready and worker.broken for worker in inner)


def _unseen(now: float, worker: Worker, config: MembershipConfig) -> float:
    """Seconds since a worker went out of sight: its connection ended, or its silence reached the bound. Negative: it
    did not."""
    return now - worker.heard_at - config.eviction if worker.connected else now - worker.disconnected_at


def _reason(worker: Worker, config: MembershipConfig) -> tuple[str, str]:
    if worker.connected:
        return worker.name, f"worker {worker.name} was silent for {config.eviction:g} s"
    return worker.name, f"worker {worker.name} was lost: its connection ended"
