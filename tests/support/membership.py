"""Carries decisions on membership out as the coordinator does, by a clock that tests turn."""

from __future__ import annotations

from dataclasses import dataclass, field

from elastic_batch.coordinator import events
from elastic_batch.coordinator.decide import AskRegroup, Decision, EndWorld, FormWorld, Wait, decide
from elastic_batch.coordinator.losses import Doubt, Evict, LoseSight, RegainSight
from elastic_batch.coordinator.state import MembershipConfig, Phase, State, World

MAX_DECISIONS = 200
"""More at one instant, and it will never say that there is nothing to do."""


@dataclass
class Service:
    """The loop around `decide`.

    Attributes:
        config: The rules' numbers.
        state: What is known.
        now: The clock.
        taken: Every decision so far but waits.
        reason: Why nothing more is done now.
    """

    config: MembershipConfig
    state: State = field(default_factory=State)
    now: float = 100.0
    taken: list[Decision] = field(default_factory=list)
    reason: str = ""

    def settle(self) -> list[Decision]:
        """Carry decisions out until there is none; returns them, but for doubts, which change nothing by themselves."""
        new: list[Decision] = []
        while True:
            decision = decide(self.now, self.state, self.config)
            assert decision.reason
            if isinstance(decision, Wait):
                self.reason = decision.reason
                return new
            if not isinstance(decision, Doubt):
                new.append(decision)
            self.taken.append(decision)
            assert len(new) < MAX_DECISIONS, new[-4:]
            self.carry_out(decision)

    def carry_out(self, decision: Decision) -> None:
        """Enter a decision into the state."""
        match decision:
            case Evict():
                events.lost(self.state, self.now, decision.workers, self.config)
            case Doubt():
                events.doubted(self.state, self.now, decision.workers)
            case LoseSight():
                events.sight_lost(self.state)
            case RegainSight():
                events.sight_regained(self.state)
            case EndWorld():
                events.world_ended(self.state, self.now)
            case AskRegroup():
                events.regroup_asked(self.state, decision.reason)
            case FormWorld():
                events.world_announced(self.state, self.now, decision.members)
            case Wait():
                raise AssertionError("a wait is not carried out")

    # What happens, for examples.

    @property
    def world(self) -> World:
        assert self.state.world is not None
        return self.state.world

    def after(self, seconds: float, *, beats: bool = True) -> list[Decision]:
        """Let time pass; unless `beats` is false, all connected workers are heard of at its end."""
        self.now += seconds
        if beats:
            for worker in self.state.workers.values():
                worker.heard_at = self.now if worker.connected else worker.heard_at
        return self.settle()

    def join(self, *names: str, slot: str | None = None, micro_batches: int = 8) -> list[Decision]:
        """New workers connect and are ready, one after the other."""
        for name in names:
            events.hello(self.state, self.now, name, slot or f"slot-{name}")
        for name in names:
            self.now += 0.001
            self.ready(name, after=-1, micro_batches=micro_batches)
        return self.settle()

    def ready(self, name: str, *, after: int | None = None, broken: bool = False, micro_batches: int = 8) -> None:
        """A worker waits; unless stated, after the newest world."""
        after = self.world.generation if after is None else after
        events.ready(self.state, self.now, name, after=after, broken=broken, num_micro_batches=micro_batches)

    def all_ready(self, *, broken: bool = False, micro_batches: int = 8) -> list[Decision]:
        """All workers that are left of the world wait."""
        for worker in events.inside(self.state):
            if worker.connected:
                self.ready(worker.name, broken=broken, micro_batches=micro_batches)
        return self.settle()

    def enter(self, *names: str) -> list[Decision]:
        """Workers (all, if none is named) enter the world that forms."""
        for name in names or self.world.members:
            events.entered(self.state, self.now, name, self.world.generation)
        return self.settle()

    def beat(
        self, name: str, stage: str = "compute", *, update: int = 1, micro_batches: int = 8, busy: float = 0
    ) -> None:
        """A worker gives a sign of life."""
        events.beat(self.state, self.now, name, stage=stage, update=update, busy=busy, num_micro_batches=micro_batches)

    def disconnect(self, *names: str) -> list[Decision]:
        """Connections break at once."""
        for name in names:
            events.disconnected(self.state, self.now, name)
        return self.settle()

    def exit(self, name: str) -> list[Decision]:
        """A process was seen to end."""
        events.exited(self.state, self.now, name, self.config)
        return self.settle()

    @property
    def runs(self) -> tuple[str, ...]:
        """The members of the world that runs; none if none does."""
        return self.world.members if self.world.phase is Phase.RUNNING else ()


def running(*names: str, micro_batches: int = 8, config: MembershipConfig | None = None) -> Service:
    """A service whose world of these workers runs."""
    service = Service(config or MembershipConfig(min_workers=len(names), max_workers=8))
    service.join(*names, micro_batches=micro_batches)
    service.enter()
    assert service.runs == names
    return service
