"""What happened, entered into the state: messages, broken connections, and decisions that were carried out.

Who has the newest state: the workers of the newest world that came to run, and whoever entered the one that forms,
since it took the state over. A worker that is given up still has it; one that said goodbye has saved it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from elastic_batch.coordinator.state import MembershipConfig, Phase, State, Worker, World

_MOST_DOUBLINGS = 4
"""Of a slot's cool-down."""


def hello(state: State, now: float, name: str, slot: str, generation: int = -1, members: tuple[str, ...] = ()) -> bool:
    """A worker connected, perhaps again. What it waits for it has to say again.

    A world that the state does not know yet is taken over from it: the journal was lost, or is older than the world.
    So is a running one of which nobody was in sight any more: its workers trained on meanwhile.

    Returns:
        Whether the world that it says it is in goes on; if not, it has to leave it.
    """
    if generation > state.generation or (generation == state.generation and state.world is None and generation >= 0):
        state.generation = generation
        state.world = World(generation, members, Phase.RUNNING, now)
        state.holders = state.holders or set(members)
        _await_members(state, now)
    _note_sight(state, now, [name])
    world = state.world
    belongs = world is not None and generation == world.generation and name in world.members
    is_given_up = belongs and name not in state.workers
    if is_given_up and world is not None and world.phase is Phase.RUNNING and not inside(state):
        _await_members(state, now)
    known = state.workers.get(name)
    if world is None or not belongs or known is None or known.generation != generation:
        # A member that was given up meanwhile comes back as a new worker: nobody waits for it to come out.
        state.workers[name] = Worker(name, slot, heard_at=now, leaving=known is not None and known.leaving)
        return generation < 0
    known.slot, known.connected, known.heard_at, known.ready = slot, True, now, False
    if world.phase is Phase.RUNNING:
        world.regroup = None  # it may not have heard that it was asked
    return world.phase is not Phase.ENDING


def _await_members(state: State, now: float) -> None:
    """Take a running world's workers for disconnected just now; one of them is back."""
    world = state.world
    assert world is not None
    world.out_of_sight = True
    for member in world.members:
        known = state.workers.get(member)
        if member not in world.certainly_gone and not (known and known.connected):
            slot = known.slot if known is not None else member
            state.workers[member] = Worker(member, slot, False, now, disconnected_at=now, generation=world.generation)


def ready(state: State, now: float, name: str, *, after: int, broken: bool, num_micro_batches: int) -> None:
    """A worker waits for a world."""
    worker = state.workers.get(name)
    if worker is None:
        return
    world = state.world
    worker.heard_at = now
    if is_inside(state, name) and after < worker.generation:
        return  # it was said before this worker heard of its world
    worker.ready, worker.ready_at, worker.broken = True, now, broken
    if after != worker.generation:
        worker.generation = -1  # it waits after a world that is not the newest: like a new one
    elif world is not None and world.generation == after and not broken and world.boundary_since is None:
        world.boundary_since = now
    # Others do not know how far the job is.
    if name in state.holders or (world is None and not state.num_micro_batches):
        state.num_micro_batches = num_micro_batches


def entered(state: State, now: float, name: str, generation: int) -> None:
    """A worker is in the world, and has the state; with the last one it runs."""
    world = state.world
    if world is None or world.generation != generation or not is_inside(state, name):
        return
    state.holders.add(name)
    world.entered.add(name)
    if world.phase is Phase.FORMING and len(world.entered) == len(world.members):
        world.phase, world.since = Phase.RUNNING, now
        state.holders = unaccounted(world)
        for worker in inside(state):
            worker.failed_formings = 0


def beat(state: State, now: float, name: str, *, stage: str, update: int, busy: float, num_micro_batches: int) -> None:
    """A worker gave a sign of life."""
    worker = state.workers.get(name)
    if worker is None:
        return
    worker.heard_at = now
    if (worker.stage, worker.update) != (stage, update):
        worker.stage, worker.update, worker.stage_since = stage, update, now
    worker.busy_until = now + busy
    world = state.world
    if world is None or world.phase is not Phase.RUNNING or not is_inside(state, name) or update < world.update:
        return  # while a world forms, a worker without the others' state does not know what comes next
    world.update, state.num_micro_batches = update, num_micro_batches


def leaving(state: State, name: str) -> None:
    """A worker is to leave at the next boundary."""
    if (worker := state.workers.get(name)) is not None:
        worker.leaving = True


def left(state: State, now: float, name: str) -> None:
    """A worker said goodbye in good order."""
    world = state.world
    if world is not None and is_inside(state, name):
        world.left.add(name)
        if world.boundary_since is None:
            world.boundary_since = now
    state.workers.pop(name, None)
    _note_end(state, now, name)


def disconnected(state: State, now: float, name: str) -> None:
    """A worker's connection broke."""
    if (worker := state.workers.get(name)) is not None and worker.connected:
        worker.connected, worker.disconnected_at, worker.doubted = False, now, False


def exited(state: State, now: float, name: str, config: MembershipConfig) -> None:
    """Whoever started the worker saw its process end: it certainly trains no more."""
    if name in state.workers:
        lost(state, now, [name], config)
    _note_end(state, now, name)


def lost(state: State, now: float, names: Collection[str], config: MembershipConfig) -> None:
    """Workers are given up; a slot that loses too many is held off for a while."""
    for name in names:
        _note_crash(state, now, state.workers.pop(name).slot, config)
    _note_sight(state, now, names)


def _note_crash(state: State, now: float, slot: str, config: MembershipConfig) -> None:
    recent = [at for at in state.crashes.get(slot, ()) if now - at < config.crash_window]
    state.crashes[slot] = [*recent, now]
    if len(recent) + 1 >= config.crashes:
        longest = config.cool_down * 2**_MOST_DOUBLINGS
        has_recovered = now - state.cooling.get(slot, now) >= longest
        times = 0 if has_recovered else state.cool_downs.get(slot, 0)
        state.cooling[slot] = now + config.cool_down * 2 ** min(times, _MOST_DOUBLINGS)
        state.cool_downs[slot] = times + 1
        del state.crashes[slot]


def _note_sight(state: State, now: float, names: Collection[str]) -> None:
    """Note when one that has the newest state, or may make a newer one, came or went."""
    moved, members = set(names), state.world.members if state.world is not None else ()
    if not (moved.isdisjoint(state.holders) and moved.isdisjoint(members)):
        state.seen_at = now


def _note_end(state: State, now: float, name: str) -> None:
    """A worker certainly trains no more."""
    _note_sight(state, now, [name])
    state.holders.discard(name)
    if state.world is not None and name in state.world.members:
        state.world.certainly_gone.add(name)


def woke_late(state: State, now: float) -> None:
    """The coordinator itself was held up: silence and waits meanwhile say nothing about the workers."""
    for worker in state.workers.values():
        worker.heard_at = worker.stage_since = now
        worker.disconnected_at = now
    if state.world is not None:
        state.world.since = now
        if state.world.boundary_since is not None:
            state.world.boundary_since = now
    state.seen_at = now


def world_ended(state: State, now: float) -> None:
    """The workers were told that their world is over."""
    world = state.world
    assert world is not None
    members = inside(state)
    if world.phase is Phase.FORMING and len(members) == len(world.members):  # nobody was lost: one of them is at fault
        for worker in [worker for worker in members if worker.name not in state.holders] or members:
            worker.failed_formings += 1
    world.phase, world.since = Phase.ENDING, now


def doubted(state: State, now: float, names: Iterable[str]) -> None:
    """The others of a world were asked whether they miss some workers too."""
    assert state.world is not None
    state.world.probed_at = now
    for name in names:
        state.workers[name].doubted = True


def sight_lost(state: State) -> None:
    """Most of the world's workers went out of sight together."""
    assert state.world is not None
    state.world.out_of_sight = True


def sight_regained(state: State) -> None:
    """All of the world's workers are in sight again."""
    assert state.world is not None
    state.world.out_of_sight = False


def regroup_asked(state: State, reason: str) -> None:
    """The workers were asked to leave their world at the next boundary."""
    assert state.world is not None
    state.world.regroup = reason


def world_announced(state: State, now: float, members: tuple[str, ...]) -> World:
    """The workers were told to form a new world."""
    state.generation += 1
    state.world = World(state.generation, members, Phase.FORMING, now)
    for name in members:
        worker = state.workers[name]
        worker.ready, worker.broken, worker.generation = False, False, state.generation
        worker.stage, worker.stage_since, worker.busy_until = "form", now, 0.0
    return state.world


def lead(state: State) -> Worker | None:
    """The newest world's first worker, if it is in it or waits after it."""
    world = state.world
    return state.workers[world.members[0]] if world is not None and is_inside(state, world.members[0]) else None


def is_inside(state: State, name: str) -> bool:
    """Whether a worker is in the newest world, or waits after it."""
    world, worker = state.world, state.workers.get(name)
    return world is not None and worker is not None and worker.generation == world.generation


def unaccounted(world: World) -> set[str]:
    """The workers that may be in a world, seen or unseen."""
    return set(world.members).difference(world.certainly_gone)


def inside(state: State) -> list[Worker]:
    """The workers that are in the newest world, or wait after it, by rank."""
    world, workers = state.world, state.workers
    if world is None:
        return []
    generation = world.generation
    return [workers[name] for name in world.members if name in workers and workers[name].generation == generation]
