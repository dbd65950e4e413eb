"""The hub, and `Prefer: wait`: that every change is seen, by few queries, whatever the database does meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.server import auth, watch
from batchery.server.watch import Hub, Watch
from batchery.store import batches
from batchery.store.batches import BatchRow, Progress
from batchery.store.database import Database
from batchery.store.errors import StoreUnavailable
from batchery.store.ids import new_id
from batchery.store.schema import ENDED, LIVE
from batchery.wire.objects import BatchError
from tests.server.following import Life, Watched, watched
from tests.server.keys import bearing, make_key, revoke
from tests.server.rig import until
from tests.store.examples import NOW, add_batch

SOON = 20.0
"""Seconds after which a test gives up on what should come at once."""


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, so that tests are quick, and always, also where a look takes long."""
    monkeypatch.setattr(watch, "INTERVAL", 0.01)
    monkeypatch.setattr(watch, "RETRY", 0.01)
    monkeypatch.setattr(watch, "BUSY", 1.0)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    await database.migrate()
    yield database
    await database.close()


@pytest.fixture
async def served(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    """A server, once over each kind of database."""
    async with watched(database_url, tmp_path, monkeypatch) as served:
        yield served


async def add_some(database: Database, count: int) -> list[BatchRow]:
    """Some batches."""
    async with database.write() as connection:
        ids = [await add_batch(connection) for _ in range(count)]
        rows = await batches.get_many(connection, ids)
    return [rows[id] for id in ids]


async def change(database: Database, id: str, **values: Any) -> None:
    async with database.write() as connection:
        await batches.change_many(connection, [{"id": id} | values])


class Looks:
    """Counts the statements that looks are made of."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        real = batches.progress

        async def counted(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, Progress]:
            self.sizes.append(len(ids))
            return await real(connection, ids)

        patch.setattr(batches, "progress", counted)


# The hub.


async def test_all_watches_cost_one_statement_a_look(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch)
    whole: list[int] = []
    real = batches.get_many

    async def counted(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, BatchRow]:
        whole.append(len(ids))
        return await real(connection, ids)

    rows = await add_some(database, 20)
    hub = Hub(database, asyncio.Event())
    monkeypatch.setattr(batches, "get_many", counted)
    async with contextlib.AsyncExitStack() as stack:
        watches = [await stack.enter_async_context(hub.watch(row)) for row in rows for _ in range(5)]
        assert hub.watching == 100
        await until(lambda: len(looks.sizes) >= 3)
        assert set(looks.sizes) == {20}
        assert whole == []
        assert not any([await one.changed(0) for one in watches])
        await change(database, rows[3].id, completed=4)
        await asyncio.wait_for(asyncio.gather(*(one.changed(SOON) for one in watches[15:20])), SOON)
        assert [one.row and one.row.completed for one in watches[14:21]] == [0, 4, 4, 4, 4, 4, 0]
        assert whole == []
        await change(database, rows[3].id, status="cancelling", cancelling_at=NOW)
        await asyncio.wait_for(asyncio.gather(*(one.changed(SOON) for one in watches[15:20])), SOON)
        assert [one.row and one.row.cancelling_at for one in watches[14:21]] == [None, NOW, NOW, NOW, NOW, NOW, None]
        assert whole == [1]
        assert not any([await one.changed(0) for one in watches])
    assert hub.watching == 0


async def test_a_look_at_many_is_made_in_pieces(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "CHUNK", 3)
    looks = Looks(monkeypatch)
    rows = await add_some(database, 7)
    hub = Hub(database, asyncio.Event())
    async with contextlib.AsyncExitStack() as stack:
        watches = [await stack.enter_async_context(hub.watch(row)) for row in rows]
        async with database.write() as connection:
            await batches.change_many(connection, [{"id": row.id, "status": "finalizing"} for row in rows])
        await asyncio.wait_for(asyncio.gather(*(one.changed(SOON) for one in watches)), SOON)
        assert [one.row and one.row.status for one in watches] == ["finalizing"] * 7
    assert looks.sizes[:3] == [3, 3, 1]


COUNT = st.integers(0, 3)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("total", "completed", "failed", "output_lines", "error_lines", "input_tokens"), COUNT),
        **dict.fromkeys(("cached_tokens", "output_tokens", "reasoning_tokens"), COUNT),
        "error_file": st.sampled_from([None, "e" * 32, "f" * 32]),
        "expires_at": st.integers(NOW, NOW + 1),
        # A status comes with a stamp and perhaps with errors, which are looked at for its sake alone.
        "status": st.tuples(st.sampled_from(LIVE + ENDED), st.none() | COUNT, st.booleans()),
    },
)


def _is(seen: Watch, stored: BatchRow) -> bool:
    return seen.row == stored


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(changes=st.lists(CHANGES, max_size=6))
async def test_what_is_watched_is_what_is_stored(database: Database, changes: list[dict[str, Any]]) -> None:
    (row,) = await add_some(database, 1)
    hub = Hub(database, asyncio.Event())
    async with hub.watch(row) as seen:
        for each in changes:
            values = dict(each)
            if "status" in values:
                status, stamp, wrong = values["status"]
                assert seen.row is not None
                if status != seen.row.status:
                    errors = batches.encode_errors([BatchError(code="c", message="m")]) if wrong else None
                    values |= {"status": status, "failed_at": stamp, "errors": errors}
                else:
                    del values["status"]
            if not values:
                continue
            await change(database, row.id, **values)
            async with database.read() as connection:
                stored = await batches.get(connection, row.id)
            assert stored is not None
            await until(partial(_is, seen, stored))
        await change(database, row.id, deleted_at=NOW)
        await until(lambda: seen.row is None)


async def test_a_look_that_began_earlier_does_not_take_a_newcomer_back(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has read may be older than what the newcomer has."""
    begun, go_on = asyncio.Event(), asyncio.Event()
    real = batches.progress

    async def slow(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, Progress]:
        found = await real(connection, ids)
        begun.set()
        await go_on.wait()
        return found

    rows = await add_some(database, 2)
    hub = Hub(database, asyncio.Event())
    monkeypatch.setattr(batches, "progress", slow)
    async with hub.watch(rows[0]) as early:
        await asyncio.wait_for(begun.wait(), SOON)
        for row in rows:
            await change(database, row.id, completed=1)
        async with database.read() as connection:
            newer = await batches.get_many(connection, [row.id for row in rows])
        async with hub.watch(newer[rows[0].id]) as same, hub.watch(newer[rows[1].id]) as other:
            seen: set[int] = set()

            def note() -> bool:
                seen.update(each.row.completed for each in (same, other) if each.row is not None)
                return early.row is not None and early.row.completed == 1

            go_on.set()
            await until(note)
            assert seen == {1}


async def test_nothing_is_left_when_nobody_waits(database: Database) -> None:
    (row,) = await add_some(database, 1)
    hub = Hub(database, asyncio.Event())
    before = asyncio.all_tasks()
    for turns in range(6):
        async with hub.watch(row) as one, hub.watch(row) as other:
            await other.changed(turns * 0.004)
            assert one.row == row
        for _ in range(3):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == before
    # One that comes while another leaves is looked after.
    async with hub.watch(row) as one:
        await change(database, row.id, completed=1)
        assert await one.changed(SOON)


async def test_those_who_leave_let_go_of_the_database(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = 0
    begun = asyncio.Event()
    real = batches.progress

    async def noted(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, Progress]:
        nonlocal reading
        reading += 1
        begun.set()
        for _ in range(20):
            await asyncio.sleep(0)
        found = await real(connection, ids)
        reading -= 1
        return found

    monkeypatch.setattr(batches, "progress", noted)
    (row,) = await add_some(database, 1)
    hub = Hub(database, asyncio.Event())
    async with hub.watch(row):
        await asyncio.wait_for(begun.wait(), SOON)
    assert reading == 0


async def test_a_stop_ends_every_wait(database: Database) -> None:
    rows = await add_some(database, 2)
    stopping = asyncio.Event()
    hub = Hub(database, stopping)
    before = asyncio.all_tasks()
    async with hub.watch(rows[0]) as one, hub.watch(rows[1]) as other:
        waits = [asyncio.create_task(each.changed(3600)) for each in (one, other)]
        await asyncio.sleep(0)
        stopping.set()
        await asyncio.wait_for(asyncio.gather(*waits), SOON)
        async with hub.watch(rows[0]) as late:
            assert await asyncio.wait_for(late.changed(3600), SOON)
    await until(lambda: asyncio.all_tasks() == before)


async def test_a_database_that_fails_for_a_while_is_survived(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0
    real = batches.progress

    async def failing(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, Progress]:
        nonlocal failures
        failures += 1
        if failures <= 3:
            raise OperationalError("SELECT", {}, Exception("the server closed the connection unexpectedly"))
        return await real(connection, ids)

    monkeypatch.setattr(batches, "progress", failing)
    (row,) = await add_some(database, 1)
    hub = Hub(database, asyncio.Event())
    async with hub.watch(row) as one:
        await until(lambda: failures == 1)
        await change(database, row.id, completed=1)
        assert await one.changed(SOON)
        assert one.row is not None
        assert one.row.completed == 1
        assert failures > 3
        assert hub.trouble is None


@pytest.mark.parametrize("how", ["fails", "hangs", "is defective"])
async def test_a_database_that_stays_away_is_told(
    database: Database, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(watch, "PATIENCE", 0.05)

    async def broken(*_: Any) -> Any:
        if how == "fails":
            raise OperationalError("SELECT", {}, Exception("no route to host"))
        if how == "is defective":
            raise ZeroDivisionError
        await asyncio.sleep(3600)

    rows = await add_some(database, 1)
    hub = Hub(database, asyncio.Event())
    with monkeypatch.context() as patch:
        patch.setattr(batches, "progress", broken)
        async with hub.watch(rows[0]) as one:
            assert await asyncio.wait_for(one.changed(3600), SOON)
            assert one.row == rows[0]
            assert isinstance(hub.trouble, ZeroDivisionError if how == "is defective" else StoreUnavailable)
            patch.undo()
            await change(database, rows[0].id, completed=1)
            await until(lambda: one.row is not None and one.row.completed == 1)
            assert hub.trouble is None


# `Prefer: wait`.


def holding(served: Watched, life: Life, wait: str = "wait=60") -> asyncio.Task[Any]:
    """A request that waits."""
    return asyncio.create_task(served.rig.ask("GET", life.path, headers={"Prefer": wait}))


@pytest.mark.parametrize(
    "change",
    [
        {"status": "cancelling", "cancelling_at": 5},
        {"status": "failed", "failed_at": 5, "errors": batches.encode_errors([BatchError(code="c", message="m")])},
        {"completed": 1},
        {"failed": 1},
        {"error_file": "e" * 32},
        {"input_tokens": 1},
        {"output_tokens": 1, "reasoning_tokens": 1},
    ],
    ids=",".join,
)
async def test_an_answer_is_held_until_something_visible_changes(served: Watched, change: dict[str, Any]) -> None:
    life = await Life(served.rig.context).begin()
    asked = holding(served, life)
    await until(lambda: served.hub.watching == 1)
    await life.set(**change)
    answer = await asyncio.wait_for(asked, SOON)
    plain = await served.rig.ask("GET", life.path)
    assert (answer.status, answer.json) == (200, plain.json)
    assert (answer.headers["preference-applied"], answer.headers["vary"]) == ("wait=60", "Prefer")
    assert "preference-applied" not in plain.headers
    assert plain.headers["vary"] == "Prefer"
    assert served.hub.watching == 0


async def test_it_is_not_held_for_what_cannot_be_seen(served: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch)
    life = await Life(served.rig.context).begin()
    asked = holding(served, life)
    await until(lambda: served.hub.watching == 1)
    await life.set(lease_owner=new_id(), lease_until=5.0)
    await until(lambda: len(looks.sizes) > 5)
    assert not asked.done()
    await life.set(completed=1)
    assert (await asyncio.wait_for(asked, SOON)).json["request_counts"]["completed"] == 1


@pytest.mark.parametrize("status", ENDED)
async def test_a_batch_that_has_ended_is_answered_at_once(served: Watched, status: str) -> None:
    life = await Life(served.rig.context).begin()
    await life.set(status=status)
    answer = await asyncio.wait_for(holding(served, life, "respond-async, wait=100000"), SOON)
    assert (answer.status, answer.json["status"]) == (200, status)
    assert answer.headers["preference-applied"] == "wait=60"


@pytest.mark.parametrize("wait", ["wait=0", "wait=1"])
async def test_a_wait_ends_when_its_time_is_over(served: Watched, wait: str) -> None:
    life = await Life(served.rig.context).begin()
    answer = await asyncio.wait_for(holding(served, life, wait), SOON)
    assert (answer.status, answer.json["status"]) == (200, "in_progress")
    assert answer.headers["preference-applied"] == wait


@pytest.mark.parametrize("wait", ["wait=-1", "wait", "wait=soon", "return=minimal", 'wait="', "wait=1.5"])
async def test_what_is_no_wait_is_passed_over(served: Watched, wait: str) -> None:
    life = await Life(served.rig.context).begin()
    answer = await asyncio.wait_for(holding(served, life, wait), SOON)
    assert answer.status == 200
    assert "preference-applied" not in answer.headers


async def test_a_batch_that_is_deleted_meanwhile_is_gone(served: Watched) -> None:
    life = await Life(served.rig.context).begin()
    asked = holding(served, life)
    await until(lambda: served.hub.watching == 1)
    await life.set(deleted_at=NOW)
    answer = await asyncio.wait_for(asked, SOON)
    later = await served.rig.ask("GET", life.path)
    assert answer.status == 404
    assert answer.error() == later.error()


async def test_nobody_waits_for_what_is_not_his(served: Watched) -> None:
    life = await Life(served.rig.context).begin("somebody")
    assert (await asyncio.wait_for(holding(served, life), SOON)).status == 404


async def test_a_client_that_goes_away_waits_no_longer(served: Watched) -> None:
    life = await Life(served.rig.context).begin()
    before = asyncio.all_tasks()
    asked = holding(served, life)
    await until(lambda: served.hub.watching == 1)
    asked.cancel()
    await until(lambda: served.hub.watching == 0)
    await until(lambda: len(asyncio.all_tasks()) <= len(before))


async def test_two_who_wait_for_the_same_are_both_answered(served: Watched) -> None:
    life = await Life(served.rig.context).begin()
    asked = [holding(served, life) for _ in range(5)]
    await until(lambda: served.hub.watching == 5)
    await life.grow([b"{}"])
    answers = await asyncio.wait_for(asyncio.gather(*asked), SOON)
    assert {answer.json["request_counts"]["completed"] for answer in answers} == {1}


async def test_a_busy_batch_is_not_asked_for_in_a_hot_loop(served: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the batch changes, an answer that waits takes a look of its own."""
    looks = Looks(monkeypatch)
    life = await Life(served.rig.context).begin()
    ended = False

    async def work() -> None:
        while not ended:
            await life.grow([b"{}"])

    working = asyncio.create_task(work())
    seen = []
    for _ in range(10):
        seen.append((await asyncio.wait_for(holding(served, life), SOON)).json["request_counts"]["completed"])
    ended = True
    await working
    assert seen == sorted(set(seen))
    assert len(looks.sizes) >= 10


async def test_where_too_many_wait_the_next_is_answered_at_once(
    served: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "MAX_WATCHES", 2)
    life = await Life(served.rig.context).begin()
    asked = [holding(served, life) for _ in range(2)]
    await until(lambda: served.hub.watching == 2)
    answer = await asyncio.wait_for(holding(served, life), SOON)
    assert answer.status == 200
    assert "preference-applied" not in answer.headers
    await life.set(completed=1)
    await asyncio.gather(*asked)


async def test_a_database_that_stays_away_is_a_503(served: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PATIENCE", 0.05)

    async def failing(*_: Any) -> Any:
        raise OperationalError("SELECT", {}, Exception("no route to host"))

    life = await Life(served.rig.context).begin()
    with monkeypatch.context() as patch:
        patch.setattr(batches, "progress", failing)
        answer = await asyncio.wait_for(holding(served, life), SOON)
    assert answer.status == 503
    assert answer.error()["code"] == "storage_unavailable"
    assert "route" not in answer.error()["message"]


async def test_a_key_that_is_revoked_meanwhile_gets_no_answer(served: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_AGE", 0.0)
    context = served.rig.context
    key, life = await make_key(context, "ann"), await Life(context).begin("ann")
    headers = {"Prefer": "wait=60"} | bearing(key)
    asked = asyncio.create_task(served.rig.ask("GET", life.path, headers=headers))
    await until(lambda: served.hub.watching == 1)
    await revoke(context, key)
    await life.set(completed=1)
    answer = await asyncio.wait_for(asked, SOON)
    assert answer.status == 401
    answer.error()


async def test_a_stop_answers_those_who_wait(served: Watched) -> None:
    life = await Life(served.rig.context).begin()
    asked = [holding(served, life) for _ in range(3)]
    await until(lambda: served.hub.watching == 3)
    served.rig.context.stopping.set()
    for answer in await asyncio.wait_for(asyncio.gather(*asked), SOON):
        assert (answer.status, answer.json["status"]) == (200, "in_progress")
