"""Workers on one database whose upstreams serve different models: each request goes to one that can answer it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence

import pytest

from batchery.engine import fleet as fleet_module
from batchery.engine import retry
from batchery.engine import worker as worker_module
from batchery.engine.breaker import GONE_AFTER, ROW
from batchery.engine.fleet import MAX_MODELS, REMEMBERED, SETTLING, Fleet
from batchery.engine.pool import MAX_NAME, MAX_TOLD, Destination, Pool
from batchery.engine.worker import Worker
from batchery.store.batches import decode_errors
from batchery.store.workers import Snapshot, UpstreamSnapshot, WorkerRow, encode_snapshot
from batchery.upstreams.http import HttpUpstream
from batchery.upstreams.simulator import Behaviour, RunningSimulator
from batchery.wire.objects import Model
from tests.engine.rig import Rig
from tests.engine.test_dispatcher import Results
from tests.engine.test_pool import Server, destinations, lines, simulators, until

NOW = 1_000_000.0


def other(
    *served: Sequence[str] | None, id: str = "b", heartbeat: float = NOW, started: float = NOW - 100, told: bool = True
) -> WorkerRow:
    """The row of another worker, with what each of its upstreams lists."""
    said = Snapshot(upstreams=[UpstreamSnapshot(served=None if one is None else list(one)) for one in served])
    return WorkerRow(
        id=id,
        host="h",
        pid=1,
        version="1",
        started_at=started,
        heartbeat_at=heartbeat,
        snapshot=encode_snapshot(said) if told else None,
    )


def settled(*rows: WorkerRow, mine: Sequence[str] = ("x",), takes_any: bool = False) -> Fleet:
    """What a worker knows that has run for long."""
    fleet = Fleet("a")
    fleet.look([], NOW - 1_000)
    fleet.serves(mine, takes_any=takes_any)
    fleet.look(rows, NOW - SETTLING)
    fleet.look(rows, NOW)
    return fleet


def test_what_another_lists_is_left_to_it() -> None:
    assert settled().elsewhere == frozenset()
    assert settled(other(["x", "y"], ["z"])).elsewhere == {"y", "z"}
    assert settled(other(["y"]), other(["z"], id="c")).elsewhere == {"y", "z"}
    assert settled(other(["x"])).elsewhere == frozenset()
    assert settled(other(["y"], id="a")).elsewhere == frozenset(), "it is no other"
    # Until its own upstream has been there it leaves to others what they list; one without a list may serve anything.
    assert settled(other(["y"]), mine=()).elsewhere == {"y"}
    assert settled(other(["y"]), mine=(), takes_any=True).elsewhere == frozenset()
    fleet = settled(other(["x", "y"]))
    fleet.serves(["y"], takes_any=False)
    assert fleet.elsewhere == {"x"}
    many = settled(other([f"m{i}" for i in range(MAX_MODELS)], [f"n{i}" for i in range(1_000)]))
    assert len(many.elsewhere) == MAX_MODELS
    assert many.leaves("n999", refused=True)  # what is not among them is found out, and then is
    assert len(many.elsewhere) == MAX_MODELS + 1


def test_one_that_has_died_counts_until_it_might_have_come_back() -> None:
    fleet = settled(other(["y"]))
    fleet.look([], NOW + REMEMBERED - 1)  # its row is gone: it has ended, or others have found it dead
    assert fleet.elsewhere == {"y"}
    fleet.look([other(["z"], id="c", heartbeat=NOW + REMEMBERED)], NOW + REMEMBERED)
    assert fleet.elsewhere == {"z"}
    silent = settled(other(["y"], heartbeat=NOW - REMEMBERED))
    assert silent.elsewhere == frozenset()


def test_who_was_silent_only_because_the_database_was_away_is_waited_for() -> None:
    fleet = settled(other(["y"]))
    later = NOW + 300
    fleet.look([other(["y"])], later)  # nobody could show itself, and this is the first to look
    assert fleet.leaves("y", refused=True)
    fleet.look([other(["y"], heartbeat=later + 1)], later + 2)
    assert fleet.elsewhere == {"y"}
    fleet.look([other(["y"], heartbeat=later + 11)], later + 12)
    assert fleet.elsewhere == {"y"}
    assert not fleet.leaves("z", refused=True), "it has settled again"


def test_what_is_refused_is_left_only_to_who_may_serve_it() -> None:
    fleet = settled(other(["y"]))
    assert fleet.leaves("y", refused=False)  # whatever it failed for, it is not for here
    assert not fleet.leaves("x", refused=True)
    assert not fleet.leaves("typo", refused=True)
    # A server without a list is asked, and once it has refused a model that another lists, no more.
    unlisted = settled(other(["y"]), mine=(), takes_any=True)
    assert not unlisted.leaves("y", refused=False)
    assert unlisted.leaves("y", refused=True)
    assert unlisted.elsewhere == {"y"}
    unlisted.look([other(["y"], heartbeat=NOW + 10)], NOW + 10)
    assert unlisted.elsewhere == {"y"}
    unlisted.look([other(["z"], heartbeat=NOW + 20)], NOW + 20)
    assert unlisted.elsewhere == frozenset()


@pytest.mark.parametrize(
    ("row", "open_for"),
    [
        (other(told=False, started=NOW), GONE_AFTER),  # it has only just come
        (other(None, started=NOW), GONE_AFTER),  # its server is still loading the model
        (other([], started=NOW), 0),  # its server has no list
        (other(["z"], started=NOW), 0),
        (other(None, started=NOW - GONE_AFTER), 0),
    ],
)
def test_what_is_refused_waits_while_it_is_open_who_serves_it(row: WorkerRow, open_for: float) -> None:
    fleet = settled(row)
    assert fleet.leaves("typo", refused=True) == (open_for > 0)
    assert not fleet.leaves("typo", refused=False) or open_for
    if open_for:
        assert fleet.elsewhere == {"typo"}
        assert not fleet.leaves("x", refused=True)
        for passed in (*range(0, int(open_for), 20), open_for - 1):
            fleet.look([other(None, started=NOW, heartbeat=NOW + passed)], NOW + passed)
            assert fleet.elsewhere == {"typo"}
        fleet.look([other(None, started=NOW, heartbeat=NOW + open_for)], NOW + open_for)
        assert fleet.elsewhere == set()
        assert not fleet.leaves("typo", refused=True)


def test_a_worker_that_has_just_started_does_not_know_all_others() -> None:
    fleet = Fleet("a")
    fleet.look([], NOW)
    fleet.serves(["x"], takes_any=False)
    assert fleet.leaves("y", refused=True)
    assert not fleet.leaves("x", refused=True)
    fleet.look([], NOW + SETTLING - 1)
    assert fleet.elsewhere == {"y"}
    fleet.look([], NOW + SETTLING)
    assert fleet.elsewhere == frozenset()
    assert not fleet.leaves("y", refused=True)
    alone = Fleet("a", alone=True)
    assert not alone.leaves("y", refused=True)
    alone.look([], NOW)
    assert not alone.leaves("y", refused=True)


async def test_what_others_are_told_of_an_upstream() -> None:
    class Away(Server):
        async def models(self) -> list[Model] | None:  # type: ignore[override]
            return [Model(id=id) for id in self.served] if self.served else None

    server = Away()
    pool = Pool([Destination(upstream=server, max_in_flight=1)], Results(), lambda: None, lambda _: None)
    assert (pool.snapshots()[0].served, pool.takes_any, pool.is_surveyed) == (None, False, False)
    assert pool.listed == set()
    assert not await pool.survey()
    assert pool.snapshots()[0].served is None
    names = [f"m{i:03}" for i in range(MAX_TOLD + 10)]
    server.served = [*names[::-1], "l" * (MAX_NAME + 1), "a\0b"]
    assert await pool.survey()
    assert pool.snapshots()[0].served == names[:MAX_TOLD]
    assert pool.listed == set(server.served)
    server.served = []
    assert not await pool.survey()  # it is away for a moment
    assert pool.snapshots()[0].served == names[:MAX_TOLD]
    without = Pool([Destination(upstream=Server(), max_in_flight=1)], Results(), lambda: None, lambda _: None)
    assert await without.survey()
    assert (without.snapshots()[0].served, without.takes_any, without.is_surveyed) == ([], True, True)


# With workers, a database, and servers that refuse what they do not serve.


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BEAT", "SILENCE", "POLL", "SURVEY", "SURVEY_AGAIN"):
        monkeypatch.setattr(worker_module, name, 0.05)
    monkeypatch.setattr(fleet_module, "SETTLING", 60.0)  # a slow machine is no reason to be sure sooner
    monkeypatch.setattr(retry, "BASE", 0.02)
    monkeypatch.setattr(retry, "UNREACHABLE_CEILING", 0.05)


def serving(*models: str) -> Behaviour:
    return Behaviour(latency=0.005, models=models)


def refused(server: RunningSimulator) -> int:
    return server.stats().by_status.get(404, 0)


def knows(worker: Worker, *elsewhere: str) -> Callable[[], bool]:
    return lambda: worker._fleet.elsewhere == set(elsewhere)


@pytest.mark.usefixtures("_quick")
async def test_each_worker_takes_what_its_upstream_serves(rig: Rig) -> None:
    """Whether it has one or several; a batch may be for both."""
    async with simulators(serving("w"), serving("x"), serving("y")) as (servers, upstreams):
        async with (
            rig.working(destinations(upstreams[:2], 8)) as first,
            rig.working(destinations(upstreams[2:], 8)) as second,
        ):
            await until(lambda: knows(first, "y")() and knows(second, "w", "x")())
            parts = [lines(200, model) for model in "wxy"]
            mixed = [
                line for each in zip(*(lines(200, model, f"m{model}") for model in "wxy"), strict=True) for line in each
            ]
            ids = [await rig.create(await rig.upload(some)) for some in (*parts, mixed)]
            for id, count in zip(ids, (200, 200, 200, 600), strict=True):
                row = await rig.ended(id)
                assert (row.status, row.completed, row.failed) == ("completed", count, 0)
        for server in servers:
            assert (refused(server), server.stats().received) == (0, 400)


@pytest.mark.usefixtures("_quick")
async def test_what_was_sent_to_the_wrong_server_before_the_other_came_is_given_back(rig: Rig) -> None:
    """With a breaker's worth of refusals, and with a batch of which only a part is for the other."""
    async with simulators(serving("x"), serving("y")) as (servers, upstreams):
        async with rig.working(destinations(upstreams[:1], 64)) as first:
            ids = [await rig.create(await rig.upload(some)) for some in (lines(2_000, "y"), lines(50, "x"))]
            ids.append(await rig.create(await rig.upload(lines(20, "x", "mx") + lines(20, "y", "my"))))
            await until(knows(first, "y"))
            assert (await rig.ended(ids[1])).completed == 50
            await until(lambda: not len(first._scheduler))  # nothing of the other model is held
            assert first._feeder.open_bytes == 0
            wrong = refused(servers[0])
            assert 0 < wrong <= 64 + ROW
            async with rig.working(destinations(upstreams[1:], 64)):
                for id in ids:
                    row = await rig.ended(id)
                    assert (row.status, row.failed) == ("completed", 0)
        assert refused(servers[0]) == wrong
        assert servers[1].stats().received == 2_020


@pytest.mark.usefixtures("_quick")
async def test_what_waits_for_a_server_that_is_away_goes_to_who_serves_it(rig: Rig) -> None:
    """A worker whose server is not up yet may hold anything; it lets go once another lists it."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        away = HttpUpstream(f"http://127.0.0.1:{one.getsockname()[1]}")
    async with (
        simulators(serving("y")) as (servers, upstreams),
        rig.working([Destination(upstream=away, max_in_flight=8)]) as first,
    ):
        id = await rig.create(await rig.upload(lines(400, "y")))
        await until(lambda: first._pool.waiting > 0)
        async with rig.working(destinations(upstreams, 64)):
            row = await rig.ended(id)
        assert first._feeder.open_bytes == 0
    await away.close()
    assert (row.status, row.completed) == ("completed", 400)
    assert servers[0].stats().received == 400


@pytest.mark.usefixtures("_quick")
async def test_what_no_worker_serves_is_failed_once_all_have_told(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "SETTLING", 0.3)
    async with (
        simulators(serving("x"), serving("y")) as (_, upstreams),
        rig.working(destinations(upstreams[:1], 8)),
        rig.working(destinations(upstreams[1:], 8)),
    ):
        row = await rig.ended(await rig.create(await rig.upload(lines(200, "typo"))))
    assert (row.status, row.failed) == ("failed", 200)
    assert row.errors is not None
    assert "typo" in decode_errors(row.errors)[0].message


async def test_a_list_that_is_slow_to_come_holds_nothing_up(rig: Rig) -> None:
    class Silent(Server):
        async def models(self) -> list[Model]:
            await asyncio.Event().wait()
            return []

    async with rig.working([Destination(upstream=Silent(), max_in_flight=4)]):
        row = await rig.ended(await rig.create(await rig.upload(lines(20, "m"))), timeout=5)
    assert row.completed == 20
