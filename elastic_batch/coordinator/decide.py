"""Who should form the world: a pure function of the time and of what is known. Every answer has a reason."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_batch.coordinator.events import inside, is_inside, unaccounted
from elastic_batch.coordinator.losses import Evict, Finding, look_around, name_some
from elastic_batch.coordinator.state import MembershipConfig, Phase, State, Worker, WorkerState, World

_LONGEST_SAVE = 600.0
"""How long a worker of an ended world is waited for that says that it has something to do, such as saving its state."""


@dataclass(frozen=True, slots=True)
class EndWorld:
    """Tell the world's workers that it is over."""

    reason: str


@dataclass(frozen=True, slots=True)
class AskRegroup:
    """Ask the world's workers to leave it at the next boundary; they train on until then."""

    reason: str


@dataclass(frozen=True, slots=True)
class FormWorld:
    """Form a world of these workers, by rank."""

    members: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing is to be done now."""

    reason: str


Decision = Finding | EndWorld | AskRegroup | FormWorld | Wait


def decide(now: float, state: State, config: MembershipConfig) -> Decision:
    """The next step. It is carried out, entered into the state, and `decide` is asked again until it says `Wait`.

    Args:
        now: Seconds of the clock that the state's times are of.
        state: What is known.
        config: The rules' numbers.
    """
    if (found := look_around(now, state, config)) is not None:
        return found
    if state.ended is not None:
        return Wait(state.ended)
    world = state.world
    if world is None or not inside(state):
        return _next_world(now, state, config)
    if world.phase is Phase.ENDING:
        return _gather(now, state, world, config)
    if (reason := _why_over(state, world)) is not None:
        return EndWorld(reason)
    if world.phase is Phase.FORMING:
        return _form(now, state, world, config)
    return _run(now, state, world, config)


def desired_workers(state: State, config: MembershipConfig) -> int:
    """How many workers the world should have: one for each micro-batch and the spares, within the job's bounds."""
    wanted = min(max(state.num_micro_batches, config.min_workers), config.max_workers)
    return min(wanted + config.spares, config.max_workers)


def worker_state(now: float, state: State, worker: Worker) -> WorkerState:
    """What to call a worker's condition."""
    if not worker.connected:
        return "lost"
    if worker.leaving:
        return "draining"
    if state.world is not None and is_inside(state, worker.name):
        num_active, members = max(1, state.num_micro_batches), state.world.members
        is_active = num_active >= len(members) or members.index(worker.name) < num_active
        return "active" if is_active else "spare"
    if not worker.ready:
        return "joining"
    return "cooling down" if _is_cooling(now, state, worker) else "standby"


def _why_over(state: State, world: World) -> str | None:
    """Why the workers of a world cannot go on in it, if they cannot."""
    here = {worker.name for worker in inside(state)}
    for name in world.members:
        if name not in here and name not in world.left:
            return f"worker {name} was lost"
    for worker in inside(state):
        if worker.ready and worker.broken:
            return f"worker {worker.name} found the world broken"
    if world.phase is Phase.FORMING and world.boundary_since is not None:
        return "a worker left while the world formed"
    return None


def _form(now: float, state: State, world: World, config: MembershipConfig) -> Decision:
    if now - world.since <= config.form:
        return Wait(f"generation {world.generation} forms")
    if any(now < worker.busy_until for worker in inside(state)):
        return Wait(f"generation {world.generation} forms: a worker announced that it takes longer")
    late = next(name for name in world.members if name not in world.entered)
    # It may be another one that all wait for: only those that do not come out of it either are given up.
    return EndWorld(f"worker {late} did not enter generation {world.generation} within {config.form:g} s")


def _run(now: float, state: State, world: World, config: MembershipConfig) -> Decision:
    if world.boundary_since is not None:
        if not _to_come(state):
            return _next_world(now, state, config)
        if now - world.boundary_since > config.gather:
            return EndWorld("a worker did not come to the boundary that the others left at")
        return Wait(f"generation {world.generation} is left at a boundary")
    if (evict := _stalled(now, state, config)) is not None:
        return evict
    if world.regroup is None and not world.out_of_sight and (reason := _why_regroup(now, state, config)) is not None:
        return AskRegroup(reason)
    return Wait(world.regroup or f"generation {world.generation} trains")


def _gather(now: float, state: State, world: World, config: MembershipConfig) -> Decision:
    to_come = _to_come(state)
    if not to_come:
        return _next_world(now, state, config)
    limit = _LONGEST_SAVE if any(now < worker.busy_until for worker in to_come) else config.gather
    if now - world.since <= limit:
        return Wait(f"{len(to_come)} workers come out of generation {world.generation}")
    late = [worker.name for worker in to_come]
    return Evict(tuple(late), f"{name_some(late)} did not come out of the world within {config.gather:g} s")


def _stalled(now: float, state: State, config: MembershipConfig) -> Evict | None:
    """A worker that others have waited for in the reduction for too long."""
    inner = inside(state)
    late = [worker for worker in inner if worker.stage != "reduce"]
    if not late or len(late) == len(inner):
        return None
    limit = max(config.stall, 10 * state.median_update)
    if now - max(worker.stage_since for worker in inner if worker.stage == "reduce") <= limit:
        return None
    for worker in late:
        if now >= worker.busy_until:
            text = f"worker {worker.name} stalled: others wait for its {worker.stage} for {limit:g} s"
            return Evict((worker.name,), text)
    return None


def _why_regroup(now: float, state: State, config: MembershipConfig) -> str | None:
    """Why another world would be better than the one that runs."""
    staying = [worker for worker in inside(state) if not worker.leaving]
    joiners = _joiners(now, state, config)
    if len(staying) < len(inside(state)):
        return f"worker {next(worker.name for worker in inside(state) if worker.leaving)} leaves"
    if not state.num_micro_batches:
        return None
    target = min(desired_workers(state, config), len(staying) + len(joiners))
    if target > len(staying):
        return f"worker {joiners[0].name} joins"
    if target < len(staying):
        return f"{target} workers suffice for {state.num_micro_batches} micro-batches"
    return None


def _next_world(now: float, state: State, config: MembershipConfig) -> Decision:
    """The world to form of those that wait, or why there is none."""
    survivors = [worker for worker in inside(state) if _waits(worker)]
    sound = [worker for worker in survivors if not _spoils(now, worker, config)]
    candidates = (sound or survivors[:1]) + _joiners(now, state, config)
    awaited = _awaited(state)
    candidates.sort(key=lambda worker: [worker.name not in group for group in awaited])  # a small world has them too
    are_here = all(any(worker.name in group for worker in candidates) for group in awaited)
    if not are_here and now - state.seen_at < config.orphan_grace:
        grace = f"{config.orphan_grace:g} s"
        return Wait(f"the workers that have the newest state are out of sight; without them it starts after {grace}")
    needed = max(1, config.min_workers)
    if len(candidates) < needed:
        return Wait(f"{len(candidates)} of at least {needed} workers are ready")
    members = tuple(worker.name for worker in candidates[: max(1, desired_workers(state, config))])
    return FormWorld(members, _describe(state, members))


def _awaited(state: State) -> list[set[str]]:
    """Groups of workers that a world needs one each of: they have the newest state, or may be making a newer one."""
    may_train = unaccounted(state.world) if state.world is not None else set()
    return [group for group in (state.holders, may_train) if group]


def _describe(state: State, members: tuple[str, ...]) -> str:
    before = set(state.world.members) if state.world is not None else set()
    joined, gone = [name for name in members if name not in before], before.difference(members)
    changes = [f"{', '.join(joined)} joined"] * bool(joined) + [f"{', '.join(sorted(gone))} gone"] * bool(gone)
    return f"{len(members)} workers: {'; '.join(changes) or 'the same as before'}"


def _joiners(now: float, state: State, config: MembershipConfig) -> list[Worker]:
    """Workers outside the world that could join it, the longest waiting first."""
    names = {worker.name for worker in inside(state)}
    waiting = [worker for worker in state.workers.values() if _waits(worker) and worker.name not in names]
    able = [w for w in waiting if not _is_cooling(now, state, w) and not _spoils(now, w, config)]
    return sorted(able, key=lambda worker: worker.ready_at)


def _spoils(now: float, worker: Worker, config: MembershipConfig) -> bool:
    """Whether a newcomer is held off: worlds fail to form with it, and the others must not wait for it for ever."""
    return worker.failed_formings >= config.crashes and now < worker.ready_at + config.cool_down


def _waits(worker: Worker) -> bool:
    """Whether a worker can be told to form a world."""
    return worker.ready and worker.connected and not worker.leaving


def _to_come(state: State) -> list[Worker]:
    """The workers of an ended world that the next one has to wait for.

    One that came out to leave is waited for only if it has the state and no other has: it saves it before it says
    goodbye.
    """
    inner = inside(state)
    is_kept = any(_waits(worker) and worker.name in state.holders for worker in inner)
    return [
        worker
        for worker in inner
        if not (_waits(worker) or (worker.ready and worker.leaving and (is_kept or worker.name not in state.holders)))
    ]


def _is_cooling(now: float, state: State, worker: Worker) -> bool:
    """Whether a worker's slot is held off. Whoever has the newest state has not crashed, and is needed."""
    return worker.name not in state.holders and now < state.cooling.get(worker.slot, now)
