"""Which worker is lost: a pure function of the time and of what is known.

A broken connection says that a worker died, or that the way to it broke. In the second case the world trains on, and
ending it would be the only harm done. So it matters who else noticed.
"""

from __future__ import annotations

from elastic_batch.coordinator.events import inside
from elastic_batch.coordinator.state import MembershipConfig, Phase, State, Worker, World


def find_lost(now: float, state: State, config: MembershipConfig) -> tuple[str, str] | None:
    """A worker to be given up, and why; None if there is none now. It is asked again after each.

    Args:
        now: Seconds of the clock that the state's times are of.
        state: What is known.
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
    is_broken = any(worker.ready and worker.broken for worker in inner)
    trains_on = world.phase is Phase.RUNNING and world.boundary_since is None and not is_broken
    # Where cables are cut there is nothing but silence, in which workers differ by up to a beat.
    margin = config.beat if trains_on else 0.0
    unseen = [worker for worker in inner if _unseen(now, worker, config) >= -margin]
    num_members = len(set(world.members).difference(world.left))
    num_lost = num_members - len(inner) + len(unseen)
    is_mass = num_members > 1 and 2 * num_lost > num_members
    if is_mass and trains_on:
        by_time = sorted(unseen, key=lambda worker: _unseen(now, worker, config))
        # The last one first: else the world would be over with the first, before the others' time has come.
        return by_time[0] if by_time and _unseen(now, by_time[-1], config) >= config.reconnect_grace else None
    if is_mass or world.recovered:
        is_over = world.phase is Phase.ENDING
        grace = min(config.reconnect_grace, config.return_grace) if is_over else config.reconnect_grace
    elif trains_on:
        grace = config.doubt
    else:
        grace = 0.0 if is_broken and num_lost == 1 else config.settle
    for worker in unseen:
        if _unseen(now, worker, config) >= (0.0 if worker.connected else grace):
            return worker
    return None


def _unseen(now: float, worker: Worker, config: MembershipConfig) -> float:
    """Seconds since a worker went out of sight: its connection ended, or its silence reached the bound. Negative: it
    did not."""
    return now - worker.heard_at - config.eviction if worker.connected else now - worker.disconnected_at


def _reason(worker: Worker, config: MembershipConfig) -> tuple[str, str]:
    if worker.connected:
        return worker.name, f"worker {worker.name} was silent for {config.eviction:g} s"
    return worker.name, f"worker {worker.name} was lost: its connection ended"
