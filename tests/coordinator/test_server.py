"""A whole coordinator on real sockets, with workers that only speak."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from support.coordinators import PATIENCE_SECONDS, Serving, serving
from support.fake_worker import FakeWorker, connected, greeted
from websockets.exceptions import ConnectionClosed

from elastic_batch.coordinator.announcement import read_announcement
from elastic_batch.coordinator.journal import FILE, JournalUnusable
from elastic_batch.errors import InvalidSetting, NoWorkers
from elastic_batch.protocol import (
    Abort,
    End,
    Form,
    Leave,
    Leaving,
    Progress,
    Refused,
    Regroup,
    Stop,
    StoreReply,
    StoreRequest,
    Welcome,
)

RECORD = {"update": 5, "position": 40, "epoch": 0.1, "global_batch_size": 8, "num_micro_batches": 8, "world_size": 2}


async def _world(first: FakeWorker, second: FakeWorker) -> Form:
    """The world of two workers, running."""
    await asyncio.gather(first.ready(), second.ready())
    form = await first.enter()
    if len(form.members) == 1:  # the second one came later
        await first.hear(Regroup)
        await first.ready(form.generation)
        form = await first.enter()
    await second.enter()
    return form


@asynccontextmanager
async def _pair(run_dir: Path) -> AsyncIterator[tuple[Serving, Form, FakeWorker, FakeWorker]]:
    """A coordinator, a world of two that runs, its lead worker and the other one."""
    async with (
        serving(run_dir, max_workers=2) as coordinator,
        connected(run_dir, "a") as a,
        connected(run_dir, "b") as b,
    ):
        form = await _world(a, b)
        lead, other = (a, b) if form.members[0] == "a" else (b, a)
        yield coordinator, form, lead, other


@pytest.mark.parametrize(
    ("addresses", "all_on_loopback"),
    [(("10.0.0.1", "10.0.0.2"), False), (("127.0.0.1", "::1"), True)],
)
def test_two_workers_form_a_world_and_hear_whether_they_share_a_host(
    tmp_path: Path, addresses: tuple[str, str], all_on_loopback: bool
) -> None:
    async def scenario() -> None:
        async with (
            serving(tmp_path, min_workers=2) as coordinator,
            connected(tmp_path, "a", address=addresses[0]) as a,
            connected(tmp_path, "b", address=addresses[1]) as b,
        ):
            form = await _world(a, b)
            assert (sorted(form.members), form.all_on_loopback) == (["a", "b"], all_on_loopback)
            await a.beat(num_micro_batches=8)
            found = await coordinator.until(lambda status: status["phase"] == "running")
            assert (found["generation"], found["desired_workers"]) == (1, 8)
            assert [worker["state"] for worker in found["workers"]] == ["active", "active"]

    uvloop.run(scenario())


@pytest.mark.parametrize(
    ("address", "fields"),
    [
        ("127.0.0.1", {"address": "10.0.0.2"}),
        ("10.0.0.1", {"address": "127.0.0.1"}),
        ("127.0.0.1", {"address": "127.0.0.1", "host": "there"}),
    ],
)
@pytest.mark.parametrize("trains", [False, True])
def test_a_newcomer_is_refused_that_cannot_reach_the_others_and_they_go_on(
    tmp_path: Path, address: str, fields: dict[str, Any], trains: bool
) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, min_workers=1 if trains else 2), connected(tmp_path, "a", address=address) as a:
            await a.ready()
            if trains:
                await a.enter()
            async with connected(tmp_path, "b", **fields) as b:
                await b.ready()
                assert "ELASTIC_BATCH_ADDRESS must not be a loopback address" in (await b.hear(Refused)).reason
            async with connected(tmp_path, "c", address=address) as c:
                await c.ready()
                if trains:
                    await a.ready((await a.hear(Regroup)).generation)
                assert (await a.hear(Form)).members == ("a", "c")
                assert not [message for message in a.unheard if isinstance(message, Abort | Refused)]

    uvloop.run(scenario())


def test_a_restarted_coordinator_knows_that_a_joiner_has_no_state_yet(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as first, connected(tmp_path, "a") as a, connected(tmp_path, "b") as b:
            await a.ready()
            await a.enter()
            await first.until(lambda status: status["phase"] == "running")
            await b.ready()
            await a.ready((await a.hear(Regroup)).generation)
            form = await b.hear(Form)
        same: dict[str, Any] = {"generation": form.generation, "members": form.members}
        async with (
            serving(tmp_path, reconnect_grace=0.1, orphan_grace=1000.0) as second,
            connected(tmp_path, "b", **same) as b,
        ):
            await b.ready(form.generation, broken=True)
            await second.until(lambda status: "have the newest state" in status["reason"])
            async with connected(tmp_path, "a", **same) as a:
                await a.ready(form.generation, broken=True)
                assert (await b.hear(Form)).members == ("a", "b")

    uvloop.run(scenario())


def test_workers_that_wait_hear_that_no_world_started_in_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, min_workers=2, start=0.3) as coordinator:
            async with connected(tmp_path, "a") as a:
                await a.ready()
                assert (await a.hear(End)).reason.startswith("stopped: ")
                await a.bye("left")
            with pytest.raises(NoWorkers):
                await coordinator.outcome()

    with pytest.raises(NoWorkers):
        uvloop.run(scenario())


def test_the_others_hear_at_once_that_a_worker_died_and_go_on_without_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            serving(tmp_path, min_workers=1) as coordinator,
            connected(tmp_path, "a") as a,
            connected(tmp_path, "b") as b,
        ):
            form = await _world(a, b)
            started = asyncio.get_running_loop().time()
            b.socket.transport.abort()
            abort = await a.hear(Abort)
            assert asyncio.get_running_loop().time() - started < 1
            assert (abort.generation, abort.reason) == (form.generation, "worker b was lost")
            await a.ready(form.generation, broken=True)
            assert (await a.enter()).members == ("a",)
            metrics = (await coordinator.http.get("/metrics")).text
            assert 'elastic_batch_rescales_total{cause="loss"' in metrics
            assert f'elastic_batch_rescale_seconds_count{{run="{tmp_path.name}",step="agree"}}' in metrics

    uvloop.run(scenario())


def test_a_silent_worker_is_evicted_and_may_come_back_as_a_new_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, eviction=0.5), connected(tmp_path, "a") as a, connected(tmp_path, "b") as b:
            form = await _world(a, b)
            beating = asyncio.create_task(_keep_beating(a))
            with pytest.raises(ConnectionClosed, match="silent"):
                await b.hear(Abort)
            await a.hear(Abort)
            async with connected(tmp_path, "b", generation=form.generation, members=form.members) as again:
                assert (await again.hear(Abort)).generation == form.generation
            beating.cancel()

    async def _keep_beating(worker: FakeWorker) -> None:
        while True:
            await worker.beat()
            await asyncio.sleep(0.1)

    uvloop.run(scenario())


def test_a_drained_worker_leaves_and_the_rest_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            serving(tmp_path, min_workers=1) as coordinator,
            connected(tmp_path, "a") as a,
            connected(tmp_path, "b") as b,
        ):
            form = await _world(a, b)
            assert (await coordinator.http.post("/workers/b/drain")).status_code == 200
            await b.hear(Leave)
            await b.say(Leaving())
            assert "b leaves" in (await a.hear(Regroup)).reason
            await asyncio.gather(a.ready(form.generation), b.bye("left"))
            assert (await a.hear(Form)).members == ("a",)

    uvloop.run(scenario())


def test_a_drained_worker_that_was_out_of_sight_hears_of_it_when_it_is_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, settle=PATIENCE_SECONDS) as coordinator, connected(tmp_path, "a") as a:
            await a.ready()
            form = await a.enter()
            await coordinator.until(lambda status: status["phase"] == "running")
            await a.socket.close()
            await coordinator.until(lambda status: status["workers"][0]["state"] == "lost")
            assert (await coordinator.http.post("/workers/a/drain")).status_code == 200
            async with connected(tmp_path, "a", generation=form.generation, members=form.members) as back:
                await back.hear(Leave)

    uvloop.run(scenario())


def test_nobody_waits_for_a_worker_that_said_that_it_failed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, orphan_grace=1000.0), connected(tmp_path, "a") as a:
            await a.ready()
            await a.enter()
            await a.bye("failed")
            async with connected(tmp_path, "b") as b:
                await b.ready()
                assert (await b.hear(Form)).members == ("b",)

    uvloop.run(scenario())


def test_draining_an_unknown_worker_names_the_nearest(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as coordinator, connected(tmp_path, "local-1"):
            answer = await coordinator.http.post("/workers/lokal-1/drain")
            assert (answer.status_code, answer.json()["error"]) == (
                404,
                "there is no worker 'lokal-1'. Did you mean 'local-1'?",
            )

    uvloop.run(scenario())


def test_an_exit_that_was_seen_ends_the_world_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            serving(tmp_path, settle=60) as coordinator,
            connected(tmp_path, "a") as a,
            connected(tmp_path, "b") as b,
        ):
            await _world(a, b)
            assert (await coordinator.http.post("/workers/b/exited")).json() == {"known": True}
            await a.hear(Abort)
            assert (await coordinator.http.post("/workers/b/exited")).json() == {"known": False}

    uvloop.run(scenario())


def test_a_restarted_coordinator_adopts_the_world_and_its_counters(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as first, connected(tmp_path, "a") as a, connected(tmp_path, "b") as b:
            form = await _world(a, b)
            await a.say(Progress(generation=form.generation, record={**RECORD, "kind": "update", "seconds": 0.1}))
            await first.until(lambda status: status["update"] == 5)
        async with serving(tmp_path) as second:
            same = {"generation": form.generation, "members": form.members, "run_id": first.announcement.run_id}
            assert (second.announcement.run_id, second.announcement.token, second.announcement.url) == (
                first.announcement.run_id,
                first.announcement.token,
                first.announcement.url,
            )
            async with connected(tmp_path, "a", **same) as a, connected(tmp_path, "b", **same) as b:
                found = await second.until(lambda status: all(w["state"] == "active" for w in status["workers"]))
                assert (found["generation"], found["phase"], found["update"]) == (form.generation, "running", 5)
                assert (
                    f'elastic_batch_updates_total{{run="{tmp_path.name}"}} 5.0'
                    in (await second.http.get("/metrics")).text
                )
                await asyncio.sleep(0.7)  # past the grace for reconnecting
                assert (await second.status())["phase"] == "running"
                assert not [m for m in (*a.unheard, *b.unheard) if isinstance(m, Abort | Regroup | Form)]

    uvloop.run(scenario())


def test_a_worker_that_died_while_the_coordinator_was_away_is_missed_after_the_grace(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path), connected(tmp_path, "a") as a, connected(tmp_path, "b") as b:
            form = await _world(a, b)
        async with (
            serving(tmp_path),
            connected(tmp_path, "a", generation=form.generation, members=form.members) as a,
        ):
            assert "worker b was lost" in (await a.hear(Abort)).reason
            await a.ready(form.generation, broken=True)
            again = await a.hear(Form)
            assert (again.generation, again.members) == (form.generation + 1, ("a",))

    uvloop.run(scenario())


def test_a_lost_journal_is_made_anew_from_what_the_workers_report(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as first, connected(tmp_path, "a") as a, connected(tmp_path, "b") as b:
            form = await _world(a, b)
        (tmp_path / FILE).unlink()
        same: dict[str, Any] = {
            "generation": form.generation,
            "members": form.members,
            "run_id": first.announcement.run_id,
        }
        async with (
            serving(tmp_path) as second,
            connected(tmp_path, "a", **same),
            connected(tmp_path, "b", **same) as b,
        ):
            found = await second.until(lambda status: len(status["workers"]) == 2)
            assert (found["run_id"], found["generation"], found["phase"]) == (
                first.announcement.run_id,
                form.generation,
                "running",
            )
            assert second.coordinator.run.journal.last_world()[0] == form.generation

    uvloop.run(scenario())


def test_with_everything_lost_the_run_takes_its_name_from_a_worker(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as coordinator:
            async with connected(tmp_path, "a", run_id="0123456789abcdef"):
                assert (await coordinator.status())["run_id"] == "0123456789abcdef"
            async with greeted(tmp_path, "b", run_id="another") as b:
                assert "belongs to run another" in (await b.hear(Refused)).reason

    uvloop.run(scenario())


def test_a_stale_worker_is_told_to_leave_its_world(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path), connected(tmp_path, "a") as a:
            await a.ready()
            await a.enter()
            async with connected(tmp_path, "old", generation=0, members=("old", "older")) as old:
                assert (await old.hear(Abort)).generation == 0

    uvloop.run(scenario())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"package": "0.0.0"}, "the worker runs elastic-batch 0.0.0"),
        ({"version": 99}, "protocol 99"),
    ],
)
def test_another_version_is_refused_with_both_versions(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    async def scenario() -> None:
        async with serving(tmp_path), greeted(tmp_path, "a", **fields) as a:
            reason = (await a.hear(Refused)).reason
            assert words in reason
            assert "Install the same version" in reason

    uvloop.run(scenario())


def test_a_newer_version_that_says_unknown_things_is_told_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path), connected(tmp_path, "a") as a:
            await a.socket.send('{"kind": "future"}')
            with pytest.raises(ConnectionClosed, match="not understood"):
                await a.socket.recv()

    uvloop.run(scenario())


def test_another_job_is_refused_with_every_difference(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path), connected(tmp_path, "a") as a:
            await a.ready(job={"seed": 1, "schedule": {"factor": 2}, "end": 10})
            await a.enter()
            async with connected(tmp_path, "b") as b:
                await b.ready(job={"seed": 2, "schedule": {"factor": 5}, "end": 20})
                reason = (await b.hear(Refused)).reason
                assert "seed: 1 there, 2 now" in reason
                assert "schedule.factor: 2 there, 5 now" in reason
                assert "end: 10 there, 20 now" in reason

    uvloop.run(scenario())


def test_a_job_may_be_trained_further_when_nobody_trains(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as first, connected(tmp_path, "a") as a:
            await a.ready(job={"seed": 1, "end": 10})
            await a.enter()
            await a.bye("finished")
            assert await first.outcome() == "complete"
        async with serving(tmp_path), connected(tmp_path, "a") as a:
            await a.ready(job={"seed": 1, "end": 20})
            assert (await a.hear(Form)).generation == 2

    uvloop.run(scenario())


def test_a_job_may_be_trained_further_after_all_was_killed_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path), connected(tmp_path, "a") as a:
            await a.ready(job={"seed": 1, "end": 10, "schedule": {"so_far": "x"}})
            await a.enter()
        longer = {"seed": 1, "end": 20, "schedule": {"so_far": "y"}}
        async with serving(tmp_path, reconnect_grace=0.1, orphan_grace=0.1) as coordinator:
            async with connected(tmp_path, "b") as b:
                await b.ready(job=longer)
                assert (await b.hear(Form)).generation == 2
            assert (await coordinator.status())["ended"] is None

    uvloop.run(scenario())


def test_the_job_is_complete_when_the_lead_says_so_and_outsiders_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with _pair(tmp_path) as (coordinator, _, lead, other):
            async with connected(tmp_path, "c") as outsider:
                await outsider.ready()
                await other.bye("finished")
                assert (await outsider.hear(End)).reason == "the job is complete"
                assert not coordinator.task.done()  # the lead is still there
                await lead.bye("finished")
            assert await coordinator.outcome() == "complete"

    uvloop.run(scenario())


@pytest.mark.parametrize("lost", ["its connection breaks", "its process is seen to end", "it says that it failed"])
def test_the_end_stands_whatever_becomes_of_the_lead_after_it(tmp_path: Path, lost: str) -> None:
    """Whoever says that it has finished knows that the lead has saved the last state."""

    async def scenario() -> None:
        async with _pair(tmp_path) as (coordinator, _, lead, other):
            await other.bye("finished")
            await coordinator.until(lambda status: status["ended"] is not None)
            if lost == "its connection breaks":
                lead.socket.transport.abort()
            elif lost == "its process is seen to end":
                await coordinator.http.post(f"/workers/{lead.name}/exited")
            else:
                await lead.bye("failed")
            assert await coordinator.outcome() == "complete"

    uvloop.run(scenario())


def test_a_lead_that_lost_the_others_at_the_end_gets_a_world_to_save_it_in(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with _pair(tmp_path) as (coordinator, form, lead, other):
            await other.bye("finished")
            await lead.ready(form.generation, broken=True)
            assert (await lead.enter()).members == (lead.name,)
            assert not any(isinstance(message, End) for message in lead.unheard)
            await lead.bye("finished")
            assert await coordinator.outcome() == "complete"

    uvloop.run(scenario())


@pytest.mark.parametrize("enters", [False, True])
@pytest.mark.parametrize("is_seen", [False, True])
def test_the_end_stands_if_the_lead_dies_in_the_world_to_hear_of_it(
    tmp_path: Path, enters: bool, is_seen: bool
) -> None:
    async def scenario() -> None:
        async with _pair(tmp_path) as (coordinator, form, lead, other):
            await other.bye("finished")
            await lead.ready(form.generation, broken=True)
            if enters:
                await lead.enter()
            else:
                await lead.hear(Form)
            if is_seen:
                await coordinator.http.post(f"/workers/{lead.name}/exited")
            lead.socket.transport.abort()
            assert await coordinator.outcome() == "complete"

    uvloop.run(scenario())


@pytest.mark.parametrize("waits_first", [True, False])
def test_a_member_that_waits_when_the_job_is_complete_ends(tmp_path: Path, waits_first: bool) -> None:
    async def scenario() -> None:
        async with _pair(tmp_path) as (coordinator, form, lead, other):
            if waits_first:
                await other.ready(form.generation, broken=False)
                await lead.bye("finished")
            else:
                await lead.bye("finished")
                await coordinator.until(lambda status: status["ended"] is not None)
                await other.ready(form.generation, broken=True)
            assert (await other.hear(End)).reason == "the job is complete"
            await other.bye("left")
            assert await coordinator.outcome() == "complete"

    uvloop.run(scenario())


def test_a_stop_forms_a_world_of_fewer_than_the_least_workers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, min_workers=2) as coordinator, connected(tmp_path, "a") as a:
            async with connected(tmp_path, "b") as b:
                form = await _world(a, b)
            await a.hear(Abort)
            await a.ready(form.generation, broken=True)
            await coordinator.until(lambda status: "at least 2" in status["reason"])
            await coordinator.http.post("/stop", json={"reason": "enough"})
            assert (await a.enter()).members == ("a",)
            await a.hear(Stop)
            await a.bye("stopped")
            assert await coordinator.outcome() == "stopped"

    uvloop.run(scenario())


def test_worlds_are_newer_than_whoever_wrote_checkpoints(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path), connected(tmp_path, "a") as a:
            await a.ready(newest_writer=6)
            assert (await a.enter()).generation == 7
            async with connected(tmp_path, "b") as b:
                await b.ready(newest_writer=9)  # a world that trains is not changed by it
                await a.hear(Regroup)
                await a.ready(7)
                assert (await a.hear(Form)).generation == 8
        async with serving(tmp_path, reconnect_grace=0.1, orphan_grace=0.3), connected(tmp_path, "c") as c:
            await c.ready(newest_writer=11)  # while the last world's workers still count as about to return
            assert (await c.hear(Form)).generation == 12

    uvloop.run(scenario())


def test_a_stop_reaches_the_world_and_ends_the_run_resumably(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            serving(tmp_path) as coordinator,
            connected(tmp_path, "a") as a,
            connected(tmp_path, "b") as b,
        ):
            await _world(a, b)
            assert (await coordinator.http.post("/stop", json={"reason": "enough"})).status_code == 200
            assert (await a.hear(Stop)).reason == (await b.hear(Stop)).reason == "enough"
            await asyncio.gather(a.bye("stopped"), b.bye("stopped"))
            assert await coordinator.outcome() == "stopped"
        said = read_announcement(tmp_path)
        assert said is not None
        assert (said.ended, said.completed_end) == ("stopped: enough", None)
        # Nobody of the old world is waited for.
        async with serving(tmp_path) as coordinator, connected(tmp_path, "c") as again:
            assert coordinator.announcement.ended is None
            await again.ready()
            assert (await again.hear(Form)).members == ("c",)

    uvloop.run(scenario())


def test_a_stop_does_not_wait_for_ever_for_workers_out_of_sight(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, orphan_grace=0.2) as coordinator:
            async with connected(tmp_path, "a") as a:
                await a.ready()
                await a.enter()
                await coordinator.http.post("/stop", json={"reason": "enough"})
            assert await coordinator.outcome() == "stopped"

    uvloop.run(scenario())


def test_a_stop_without_workers_ends_the_run(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as coordinator:
            await coordinator.http.post("/stop", content=b"")
            assert await coordinator.outcome() == "stopped"

    uvloop.run(scenario())


def test_a_withdrawn_generation_fails_every_wait_in_its_store_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path), connected(tmp_path, "a") as a, connected(tmp_path, "b") as b:
            form = await _world(a, b)
            request = StoreRequest(request=1, generation=form.generation, operation="get", keys=("k",), wait_seconds=60)
            await a.say(request)
            await b.ask(form.generation, operation="set", keys=("other",), value="QQ==")
            b.socket.transport.abort()
            reply = await a.hear(StoreReply)
            assert f"generation {form.generation} is over" in (reply.error or "")

    uvloop.run(scenario())


def test_a_second_connection_of_a_worker_replaces_the_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as coordinator, connected(tmp_path, "a") as a:
            await a.ready()
            form = await a.enter()
            async with connected(tmp_path, "a", generation=form.generation, members=form.members):
                with pytest.raises(ConnectionClosed, match="connected again"):
                    await a.socket.recv()
                await asyncio.sleep(0.1)
                assert (await coordinator.status())["phase"] == "running"

    uvloop.run(scenario())


def test_a_message_that_is_too_long_ends_the_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as coordinator, connected(tmp_path, "a") as a:
            await a.socket.send(" " * (1 << 21))
            with pytest.raises(ConnectionClosed):
                await a.socket.recv()
            await coordinator.until(lambda status: not status["workers"])

    uvloop.run(scenario())


def test_a_full_disk_lets_no_world_form_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(coordinator: Serving) -> None:
        journal = coordinator.coordinator.run.journal

        def full(*_: object) -> None:
            raise JournalUnusable("cannot write the journal: disk full")

        with monkeypatch.context() as patch:
            patch.setattr(journal, "begin_world", full)
            async with connected(tmp_path, "a") as a:
                await a.ready()
                await coordinator.until(lambda status: "disk full" in status["reason"])
                patch.undo()
                assert (await a.hear(Form)).generation == 1

    async def main() -> None:
        async with serving(tmp_path) as coordinator:
            await scenario(coordinator)

    uvloop.run(main())


def test_a_second_coordinator_of_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_batch.coordinator.journal._BUSY_SECONDS", 0.05)

    async def scenario() -> None:
        async with serving(tmp_path):
            with pytest.raises(JournalUnusable, match="another coordinator"):
                async with serving(tmp_path):
                    pass

    uvloop.run(scenario())


def test_a_port_that_is_taken_is_one_clear_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(InvalidSetting, match=r"must be free on 127\.0\.0\.1"):
                async with serving(tmp_path, settings={"port": port}):
                    pass

    uvloop.run(scenario())


def test_the_welcome_names_the_run_and_the_beat(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, beat=0.25) as coordinator, greeted(tmp_path, "a") as a:
            welcome = await a.hear(Welcome)
            assert welcome == Welcome(run_id=coordinator.announcement.run_id, beat_seconds=0.25, generation=0)

    uvloop.run(scenario())
