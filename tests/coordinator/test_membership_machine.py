"""Workers, messages, deaths and restarts in any order: what the membership promises holds in all of them."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.membership import Service

from elastic_batch.coordinator import events
from elastic_batch.coordinator.decide import AskRegroup, Decision, EndWorld, FormWorld, desired_workers
from elastic_batch.coordinator.losses import Evict
from elastic_batch.coordinator.state import MembershipConfig, Phase, State, Worker, World
from elastic_batch.protocol import Abort, Beat, Bye, Entered, Form, FromCoordinator, Hello, Leaving, Ready, Regroup

NUM_MICRO_BATCHES = 3
MOST_WORKERS = 5
SLOTS = 3
NOTHING = (-1, 0)
ToCoordinator = Hello | Ready | Entered | Beat | Bye | Leaving


@dataclass
class Wire:
    """One connection: what is under way in both directions, and which side knows that it is broken."""

    up: deque[ToCoordinator] = field(default_factory=deque)
    down: deque[FromCoordinator] = field(default_factory=deque)
    is_broken: bool = False
    is_known: bool = False
    """Whether the coordinator heard a Hello on it."""


@dataclass
class Process:
    """A worker's session and its training thread, as far as the membership sees them."""

    name: str
    slot: str
    at: str = "waiting"
    """`waiting` for a world, `forming` it, `training` in it, or `gone`."""
    generation: int = -1
    members: tuple[str, ...] = ()
    state: tuple[int, int] = NOTHING
    """Of its model: the generation that made it, and the updates in it."""
    came_out_broken: bool = False
    wants_regroup: bool = False
    leaves: bool = False
    is_aborted: bool = False
    is_stopped: bool = False
    wire: Wire | None = None

    @property
    def lives(self) -> bool:
        return self.at != "gone"

    def say(self, message: ToCoordinator) -> None:
        if self.wire is not None and not self.wire.is_broken:
            self.wire.up.append(message)

    def connect(self) -> None:
        self.wire = Wire()
        hello = Hello(
            package="0",
            worker=self.name,
            slot=self.slot,
            host="h",
            address="a",
            pid=1,
            generation=self.generation,
            members=self.members,
        )
        self.say(hello)
        if self.leaves:
            self.say(Leaving())
        if self.at == "waiting":
            self.say_ready()
        elif self.at == "training":
            self.say(Entered(generation=self.generation))

    def say_ready(self) -> None:
        self.say(Ready(after=self.generation, broken=self.came_out_broken, num_micro_batches=NUM_MICRO_BATCHES))

    def come_out(self, *, broken: bool) -> None:
        self.at, self.came_out_broken, self.wants_regroup = "waiting", broken, False
        if self.leaves:
            self.say(Bye(reason="left"))
            self.at = "gone"
        else:
            self.say_ready()


class Membership(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.processes: dict[str, Process] = {}
        self.left_at_boundary: set[int] = set()
        self.entered: dict[int, set[str]] = {}
        self.worlds: dict[int, tuple[str, ...]] = {}
        self.taken_up: set[int] = set()
        self.known_to_run: set[int] = set()
        self.seen_at: dict[int, float] = {}
        self.shown_at: dict[str, float] = {}
        self.given_up: set[str] = set()
        self.known_gone: set[str] = set()
        self.saved = NOTHING
        self.journal: tuple[int, tuple[str, ...]] = (0, ())
        self.journal_holders: set[str] = set()
        self.num_started = 0
        self.service = Service(MembershipConfig())

    @initialize(
        least=st.integers(1, 2),
        most=st.integers(2, 4),
        spares=st.integers(0, 1),
        num=st.integers(1, 5),
        calm=st.booleans(),
    )
    def configure(self, least: int, most: int, spares: int, num: int, calm: bool) -> None:
        self.service.config = MembershipConfig(
            min_workers=least,
            max_workers=most,
            spares=spares,
            gather=4,
            form=8,
            reconnect_grace=2,
            orphan_grace=20,
            crash_window=30,
            cool_down=5,
        )
        for _ in range(num):
            self.start()
        for _ in range(5 * calm):
            self.all_do_what_they_can()

    # The coordinator's side.

    def settle(self) -> None:
        service = self.service
        original = service.carry_out

        def carry_out(decision: Decision) -> None:
            self.before(decision)
            original(decision)
            self.tell(decision)

        service.carry_out = carry_out  # type: ignore[method-assign]  # to see each decision as it is taken
        try:
            service.settle()
        finally:
            service.carry_out = original  # type: ignore[method-assign]
        self.look()

    def look(self) -> None:
        """Remember when the coordinator last saw some worker of its world, and each of them."""
        world, inner = self.service.state.world, events.inside(self.service.state)
        if world is not None and any(worker.connected for worker in inner):
            self.seen_at[world.generation] = self.service.now
        self.shown_at.update({worker.name: self.service.now for worker in inner})

    def before(self, decision: Decision) -> None:
        self.look()
        if isinstance(decision, FormWorld):
            assert len(decision.members) == len(set(decision.members)) <= self.service.config.max_workers
            assert len(decision.members) >= self.service.config.min_workers
            for generation, members in self.worlds.items():
                if self.could_commit(generation, members):
                    unseen = self.service.now - self.seen_at.get(generation, 0)
                    assert unseen >= self.service.config.orphan_grace, (generation, members, decision)
            self.see_that_no_state_is_lost(decision)

    def see_that_no_state_is_lost(self, decision: FormWorld) -> None:
        """A world has the newest state if that is not saved, or those that have it have been out of sight for long."""
        able = [each for each in self.processes.values() if each.name not in self.given_up]
        newest = max((each.state for each in able), default=NOTHING)
        holders = {each.name for each in able if each.state == newest > self.saved and each.name not in self.known_gone}
        is_known = newest[0] in self.known_to_run or newest[0] in self.taken_up
        if is_known and holders and holders.isdisjoint(decision.members):
            unseen = self.service.now - max(self.shown_at[name] for name in holders)
            assert unseen >= self.service.config.orphan_grace, (holders, decision)
            self.given_up |= holders

    def could_commit(self, generation: int, members: tuple[str, ...]) -> bool:
        """Whether a world's workers, all of them, may still train in it."""
        return generation not in self.left_at_boundary and all(
            (process := self.processes[name]).generation == generation
            and process.at in ("forming", "training")
            and not process.is_aborted
            for name in members
        )

    def tell(self, decision: Decision) -> None:
        state, world = self.service.state, self.service.state.world
        match decision:
            case Evict():
                for name in decision.workers:
                    self.hang_up(name)
            case EndWorld():
                assert world is not None
                self.send(world.members, Abort(generation=world.generation, reason=decision.reason))
            case AskRegroup():
                assert world is not None
                self.send(world.members, Regroup(generation=world.generation, reason=decision.reason))
            case FormWorld():
                assert world is not None
                assert world.generation > max(self.worlds, default=0)
                assert world.generation == state.generation
                self.worlds[world.generation] = world.members
                self.journal = world.generation, world.members
                self.seen_at[world.generation] = self.service.now
                form = Form(generation=world.generation, members=world.members, all_on_loopback=True, seconds=8)
                self.send(world.members, form)

    def send(self, names: tuple[str, ...], message: FromCoordinator) -> None:
        for name in names:
            wire = self.processes[name].wire
            if wire is not None and wire.is_known and not wire.is_broken:
                wire.down.append(message)

    def hang_up(self, name: str) -> None:
        wire = self.processes[name].wire
        if wire is not None and wire.is_known:
            wire.is_broken, wire.is_known = True, False

    def hear(self, process: Process) -> None:
        """The coordinator takes one message, or the end of the connection."""
        service, wire, name = self.service, process.wire, process.name
        assert wire is not None
        state, now = service.state, service.now
        if not wire.up:
            if wire.is_broken and wire.is_known:
                wire.is_known = False
                events.disconnected(state, now, name)
            return self.settle()
        match wire.up.popleft():
            case Hello() as hello:
                wire.is_known = True
                if hello.generation > state.generation or state.world is None:
                    self.taken_up.add(hello.generation)
                if not events.hello(state, now, name, hello.slot, hello.generation, hello.members):
                    self.send((name,), Abort(generation=hello.generation, reason="it is over"))
            case Ready() as ready if wire.is_known:
                events.ready(
                    state, now, name, after=ready.after, broken=ready.broken, num_micro_batches=ready.num_micro_batches
                )
            case Entered() as entered if wire.is_known:
                events.entered(state, now, name, entered.generation)
                if state.world is not None and state.world.phase is Phase.RUNNING:
                    self.journal_holders = state.holders.copy()
                    self.known_to_run.add(state.generation)
            case Beat() as beat if wire.is_known:
                events.beat(
                    state, now, name, stage="compute", update=1, busy=0, num_micro_batches=beat.num_micro_batches
                )
            case Leaving() if wire.is_known:
                events.leaving(state, name)
            case Bye() if wire.is_known:
                wire.is_known = False
                events.left(state, now, name)
        return self.settle()

    # The worker's side.

    def obey(self, process: Process) -> None:
        """The worker's session takes one message, or sees that the connection is broken."""
        wire = process.wire
        assert wire is not None
        if not wire.down:
            if wire.is_broken and not wire.is_known:
                process.wire = None
            return
        match wire.down.popleft():
            case Form() as form:
                assert process.at == "waiting", "it is told to be in two worlds"
                assert form.generation > process.generation
                process.at, process.generation, process.members = "forming", form.generation, form.members
                process.is_aborted = process.wants_regroup = False
            case Abort() as abort:
                process.is_aborted |= process.generation <= abort.generation and process.at != "waiting"
            case Regroup() as regroup:
                process.wants_regroup |= regroup.generation == process.generation

    def train(self, process: Process) -> None:
        """The worker's training thread does what it can."""
        if process.at not in ("forming", "training"):
            if process.leaves and process.at == "waiting":
                self.come_out(process, broken=False)
            return
        generation = process.generation
        others = [self.processes[name] for name in process.members]
        if process.is_aborted or (
            generation not in self.left_at_boundary
            and any(other.generation != generation or other.at in ("waiting", "gone") for other in others)
            and not any(other.generation < generation and other.lives for other in others)  # they may still come
        ):
            self.come_out(process, broken=True)
        elif process.at == "forming":
            if all(other.generation == generation for other in others):
                process.at = "training"
                process.state = max(other.state for other in others)
                self.given_up.discard(process.name)
                self.entered.setdefault(generation, set()).add(process.name)
                process.say(Entered(generation=generation))
        elif generation in self.left_at_boundary:
            self.come_out(process, broken=False)
        elif all(other.at == "training" and not other.is_stopped and not other.is_aborted for other in others) and any(
            other.leaves or other.wants_regroup for other in others
        ):
            self.left_at_boundary.add(generation)
            self.come_out(process, broken=False)
        elif all(other.at == "training" and not other.is_stopped and not other.is_aborted for other in others):
            committed = generation, process.state[1] + 1
            for other in others:
                other.state = committed

    def come_out(self, process: Process, *, broken: bool) -> None:
        process.come_out(broken=broken)
        if not process.lives:
            self.saved = max(self.saved, process.state)

    def some(self, number: int, *, lives: bool = True) -> Process | None:
        found = [process for process in self.processes.values() if process.lives == lives]
        return found[number % len(found)] if found else None

    # What may happen.

    @precondition(lambda self: sum(process.lives for process in self.processes.values()) < MOST_WORKERS)
    @rule()
    def start(self) -> None:
        self.num_started += 1
        name = f"w{self.num_started}"
        process = self.processes[name] = Process(name, f"slot-{self.num_started % SLOTS}")
        process.connect()

    @rule(number=st.integers(0, 9), count=st.integers(1, 4))
    def deliver_up(self, number: int, count: int) -> None:
        wired = [process for process in self.processes.values() if process.wire is not None]
        for _ in range(count if wired else 0):
            process = wired[number % len(wired)]
            if process.wire is not None:
                self.hear(process)

    @rule(number=st.integers(0, 9), count=st.integers(1, 3))
    def deliver_down_and_train(self, number: int, count: int) -> None:
        process = self.some(number)
        if process is None or process.is_stopped:
            return
        for _ in range(count):
            if process.wire is not None:
                self.obey(process)
        self.train(process)

    @rule(times=st.integers(1, 3))
    def all_go_on(self, times: int) -> None:
        for _ in range(times):
            self.all_do_what_they_can()

    def all_do_what_they_can(self) -> None:
        for process in [*self.processes.values()]:
            while process.wire is not None and (process.wire.up or (process.wire.is_broken and process.wire.is_known)):
                self.hear(process)
        for process in self.processes.values():
            if process.lives and not process.is_stopped:
                if process.wire is None:
                    process.connect()
                while process.wire is not None and (process.wire.down or process.wire.is_broken):
                    before = process.wire.is_known
                    self.obey(process)
                    if before and process.wire is not None and not process.wire.down:
                        break
                self.train(process)

    @rule(number=st.integers(0, 9), is_seen=st.booleans())
    def kill(self, number: int, is_seen: bool) -> None:
        if (process := self.some(number)) is not None:
            process.at = "gone"
            if process.wire is not None:
                process.wire.is_broken = True
                if not process.wire.is_known:
                    process.wire = None
            if is_seen:
                self.report_exit(process)

    @rule(number=st.integers(0, 9))
    def see_exit(self, number: int) -> None:
        if (process := self.some(number, lives=False)) is not None:
            self.report_exit(process)

    def report_exit(self, process: Process) -> None:
        process.wire = None
        self.known_gone.add(process.name)
        events.exited(self.service.state, self.service.now, process.name, self.service.config)
        self.settle()

    @rule(number=st.integers(0, 9))
    def cut(self, number: int) -> None:
        process = self.some(number)
        if process is not None and process.wire is not None:
            process.wire.is_broken = True
            process.wire.down.clear()

    @rule()
    def cut_all(self) -> None:
        for process in self.processes.values():
            if process.wire is not None:
                process.wire.is_broken = True
                process.wire.down.clear()

    @rule(number=st.integers(0, 9))
    def reconnect(self, number: int) -> None:
        process = self.some(number)
        if process is not None and process.wire is None and not process.is_stopped:
            process.connect()

    @rule(number=st.integers(0, 9))
    def stop_or_wake(self, number: int) -> None:
        if (process := self.some(number)) is not None:
            process.is_stopped = not process.is_stopped

    @rule(number=st.integers(0, 9))
    def tell_to_leave(self, number: int) -> None:
        process = self.some(number)
        if process is not None and not process.is_stopped:
            process.leaves = True
            process.say(Leaving())

    @rule(keeps_members=st.booleans())
    def restart_coordinator(self, keeps_members: bool) -> None:
        service = self.service
        for process in self.processes.values():
            process.wire = None
        generation, members = self.journal
        service.state = State(generation=generation, holders=self.journal_holders.copy())
        self.seen_at[generation] = service.now
        if generation and keeps_members:
            self.taken_up.add(generation)
            service.state.world = World(generation, members, Phase.RUNNING, service.now, out_of_sight=True)
            for name in members:
                service.state.workers[name] = Worker(
                    name, name, False, disconnected_at=service.now, generation=generation
                )
        elif generation:
            service.state.holders = service.state.holders or set(members)
            service.state.seen_at = service.now
        self.settle()

    @rule(seconds=st.sampled_from([0.01, 0.1, 1.0, 3.5, 12.0, 25.0]), hears=st.booleans())
    def wait(self, seconds: float, hears: bool) -> None:
        while seconds > 0:
            self.service.now += min(1.0, seconds)
            seconds -= 1.0
            for process in self.processes.values():
                if process.lives and not process.is_stopped:
                    process.say(Beat(update=1, position=1, stage="compute", num_micro_batches=NUM_MICRO_BATCHES))
                    while hears and process.wire is not None and process.wire.up:
                        self.hear(process)
            self.settle()

    # What must hold.

    @invariant()
    def a_running_world_was_entered_by_all(self) -> None:
        world = self.service.state.world
        if world is not None and world.phase is Phase.RUNNING and world.generation not in self.taken_up:
            assert self.entered.get(world.generation, set()) >= set(world.members)

    @invariant()
    def nobody_counts_twice(self) -> None:
        names = [worker.name for worker in events.inside(self.service.state)]
        assert len(names) == len(set(names))
        assert all(worker.generation <= self.service.state.generation for worker in self.service.state.workers.values())

    @invariant()
    def all_of_a_running_world_count_as_having_the_state(self) -> None:
        state = self.service.state
        world = state.world
        if world is not None and world.phase is Phase.RUNNING and world.generation not in self.taken_up:
            assert state.holders == events.unaccounted(world)

    def teardown(self) -> None:
        """When nothing more happens to them, the workers that live train, within the sum of the bounds."""
        for process in self.processes.values():
            process.is_stopped = False
        for _ in range(160):
            for _ in range(4):
                self.all_do_what_they_can()
            if self.is_settled():
                break
            self.wait(1.0, hears=True)
        else:
            raise AssertionError((self.service.reason, self.service.taken[-6:], self.service.state, self.processes))

    def is_settled(self) -> bool:
        state, config = self.service.state, self.service.config
        living = {process.name for process in self.processes.values() if process.lives}
        if len(living) < config.min_workers:
            return True
        world = state.world
        wanted = min(len(living), desired_workers(state, config))
        return (
            world is not None
            and world.phase is Phase.RUNNING
            and world.boundary_since is None
            and len(world.members) == wanted
            and living.issuperset(world.members)
            and all(
                self.processes[name].at == "training" and self.processes[name].generation == world.generation
                for name in world.members
            )
        )


TestMembership = Membership.TestCase
TestMembership.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(30))
def test_long_walks_among_faults_end_in_one_world(seed: int) -> None:
    chance = random.Random(seed)
    machine = Membership()
    machine.configure(
        least=chance.randint(1, 2), most=chance.randint(2, 4), spares=chance.randint(0, 1), num=3, calm=True
    )
    for _ in range(150):
        number = chance.randrange(10)
        match chance.randrange(24):
            case 0:
                machine.kill(number, chance.random() < 0.5)
            case 1:
                machine.see_exit(number)
            case 2:
                machine.cut(number)
            case 3 if chance.random() < 0.3:
                machine.cut_all()
            case 4:
                machine.stop_or_wake(number)
            case 5:
                machine.tell_to_leave(number)
            case 6 if chance.random() < 0.3:
                machine.restart_coordinator(chance.random() < 0.7)
            case 7 | 8:
                machine.wait(chance.choice([0.01, 0.1, 1.0, 3.5, 12.0, 25.0]), chance.random() < 0.8)
            case 9 | 10 if sum(process.lives for process in machine.processes.values()) < MOST_WORKERS:
                machine.start()
            case 11 | 12 | 13:
                machine.deliver_up(number, chance.randint(1, 4))
            case 14 | 15 | 16:
                machine.deliver_down_and_train(number, chance.randint(1, 3))
            case 17:
                machine.reconnect(number)
            case _:
                machine.all_go_on(1)
        machine.a_running_world_was_entered_by_all()
        machine.nobody_counts_twice()
        machine.all_of_a_running_world_count_as_having_the_state()
    machine.teardown()
