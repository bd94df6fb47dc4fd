"""What the coordinator knows: workers and the world. Plain data; `events` change it, `decide` reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

WorkerState = Literal["joining", "standby", "spare", "active", "draining", "gone", "lost", "cooling down"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipConfig:
    """How membership is decided. Times in seconds.

    Args:
        min_workers: A world starts with at least so many.
        max_workers: And never has more.
        spares: Workers beyond the number of micro-batches that are wanted in the world.
        beat: Between a worker's signs of life.
        eviction: Silence after which a worker counts as lost.
        gather: How long the workers of an ended world have to come to the next one.
        form: How long forming a world and agreeing on its state may take.
        reconnect_grace: How long workers are waited for when most of them go out of sight together, or after a
            restart.
        return_grace: The same while others wait for the next world: a little more than a worker's longest pause
            between two tries to connect.
        doubt: How long a broken connection is not yet a loss while the world trains on and no worker finds it broken:
            perhaps it is the way to the coordinator that broke, and more connections will.
        settle: The same where the world is known to be broken, forms, or is left at a boundary, so that many losses are
            seen together.
        orphan_grace: How long the workers that have the newest state are waited for before a world starts without
            any of them.
        stall: How long a worker may keep all others waiting, at least; beyond, ten median updates.
        start: How long the first world is waited for; beyond, the job fails.
        crashes: So many losses of one slot within `crash_window` cool it down. So many worlds in a row that fail to
            form hold a newcomer off.
        crash_window: See `crashes`.
        cool_down: The first time; each further one is twice as long, up to sixteen times. After as long without one it
            starts over.
    """

    min_workers: int = 1
    max_workers: int = 1
    spares: int = 0
    beat: float = 1.0
    eviction: float = 3.0
    gather: float = 10.0
    form: float = 30.0
    reconnect_grace: float = 5.0
    return_grace: float = 1.5
    doubt: float = 0.5
    settle: float = 0.02
    orphan_grace: float = 60.0
    stall: float = 30.0
    start: float = math.inf
    crashes: int = 3
    crash_window: float = 60.0
    cool_down: float = 30.0


@dataclass(slots=True)
class Worker:
    """One process.

    Attributes:
        name: As in its `Hello`.
        slot: What is started again when it dies.
        connected: Whether its connection stands.
        heard_at: When it last said anything.
        disconnected_at: When its connection broke.
        doubted: Whether its fellows were asked since if they miss it too.
        ready: Whether it waits for a world.
        ready_at: Since when; joiners are taken in that order.
        generation: The world that it is in, or waits after; -1: none.
        broken: Whether that one broke.
        leaving: Whether it is to leave at the next boundary.
        stage: What it is at, and since when.
        busy_until: Until then its stage is no stall.
        update: Updates committed, as it last said.
        failed_formings: How many worlds in a row failed to form, perhaps by its fault, though nobody was lost.
    """

    name: str
    slot: str
    connected: bool = True
    heard_at: float = 0.0
    disconnected_at: float = 0.0
    doubted: bool = False
    ready: bool = False
    ready_at: float = 0.0
    generation: int = -1
    broken: bool = False
    leaving: bool = False
    stage: str = "wait"
    stage_since: float = 0.0
    busy_until: float = 0.0
    update: int = 0
    failed_formings: int = 0


class Phase(Enum):
    """Where a world is in its life."""

    FORMING = "forming"
    RUNNING = "running"
    ENDING = "ending"
    """Its workers come out of it; the next one waits for them."""


@dataclass(slots=True)
class World:
    """The newest world.

    Attributes:
        generation: Its number.
        members: Its workers by rank.
        phase: Where it is in its life.
        since: When that began.
        entered: Those that are in, while it forms.
        regroup: Why its workers were asked to leave it at a boundary; None: they were not.
        boundary_since: When the first of them did.
        left: Workers that left it in good order.
        certainly_gone: Workers that said goodbye, or whose processes were seen to end.
        probed_at: When its workers were last asked whether they miss others.
        out_of_sight: Whether most of its workers went out of sight together, perhaps since a coordinator before this
            one: those that are missing may still come back.
        update: The newest update that one of its workers reported.
    """

    generation: int
    members: tuple[str, ...]
    phase: Phase
    since: float
    entered: set[str] = field(default_factory=set)
    regroup: str | None = None
    boundary_since: float | None = None
    left: set[str] = field(default_factory=set)
    certainly_gone: set[str] = field(default_factory=set)
    probed_at: float = -math.inf
    out_of_sight: bool = False
    update: int = 0


@dataclass(slots=True)
class State:
    """Everything that decisions are made of.

    Attributes:
        workers: By name; those that said goodbye or were lost are no longer here.
        world: The newest world; None before the first, and after one of which nobody is left.
        generation: The greatest number that any world had.
        num_micro_batches: Of the next update; 0: not known yet.
        ended: Why the job is over; None: it is not.
        holders: Workers that have the newest state, unseen ones included.
        seen_at: When one of them or of the newest world's workers last came or went.
        crashes: Slot -> times of its losses within the window.
        cooling: Slot -> until when it is held off.
        cool_downs: Slot -> how often in a row it was held off.
        median_update: Seconds of an update.
    """

    workers: dict[str, Worker] = field(default_factory=dict)
    world: World | None = None
    generation: int = 0
    num_micro_batches: int = 0
    ended: str | None = None
    holders: set[str] = field(default_factory=set)
    seen_at: float = -math.inf
    crashes: dict[str, list[float]] = field(default_factory=dict)
    cooling: dict[str, float] = field(default_factory=dict)
    cool_downs: dict[str, int] = field(default_factory=dict)
    median_update: float = 0.0
