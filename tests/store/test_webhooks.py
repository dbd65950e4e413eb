"""The outbox, on both databases."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from batchery.store import batches, webhooks
from batchery.store.database import Database
from batchery.store.ids import new_id
from batchery.store.schema import webhooks as table
from batchery.store.webhooks import WebhookRow
from batchery.wire.webhooks import Event
from tests.store.examples import NOW, add_batch

URL = "https://Hooks.Example.com.:8443/a?b=c"


async def rows(database: Database) -> list[WebhookRow]:
    """The whole outbox."""
    async with database.read() as connection:
        found = await connection.execute(sa.select(table).order_by(table.c.created_at, table.c.id))
        return [WebhookRow(**row._mapping) for row in found]


async def add(database: Database, *, next_at: float | None = NOW, **values: Any) -> str:
    """Put an event into the outbox; its id."""
    id = new_id()
    row = {
        "id": id,
        "batch_id": new_id(),
        "type": "batch.completed",
        "url": "https://a.example/",
        "host": "a.example",
        "secret": "s",
        "body": b"{}",
        "created_at": NOW,
        "next_at": next_at,
    }
    async with database.write() as connection:
        await connection.execute(sa.insert(table).values(**row | values))
    return id


async def claim(database: Database, now: float = NOW, **changes: Any) -> list[WebhookRow]:
    options: dict[str, Any] = {"limit": 10, "per_host": 10, "per_owner": 100, "busy": ()}
    async with database.write() as connection:
        return await webhooks.claim(connection, now, now + 20, **options | changes)


@pytest.mark.parametrize("status", ["completed", "failed", "expired", "cancelled"])
async def test_an_end_is_told(database: Database, status: str) -> None:
    async with database.write() as connection:
        batch = await add_batch(
            connection,
            status=status,
            completed=4,
            failed=2,
            error_file="e" * 32,
            input_tokens=5,
            webhook_url=URL,
            webhook_secret="the secret",
            metadata=batches.encode_metadata({"a": "ü"}),
        )
        await webhooks.tell(connection, batch, NOW + 7)
    (row,) = await rows(database)
    assert (row.batch_id, row.type, row.url, row.host, row.secret) == (
        batch,
        f"batch.{status}",
        URL,
        "hooks.example.com",
        "the secret",
    )
    assert (row.created_at, row.next_at, row.attempts, row.delivered_at, row.error) == (
        NOW + 7,
        NOW + 7,
        0,
        None,
        None,
    )
    event = msgspec.json.decode(row.body, type=Event)
    assert (event.id, event.created_at, event.type) == (f"evt_{row.id}", NOW + 7, f"batch.{status}")
    assert (event.data.id, event.data.status, event.data.metadata) == (f"batch_{batch}", status, {"a": "ü"})
    assert event.data.error_file_id == "file-" + "e" * 32
    assert msgspec.structs.asdict(event.data.request_counts) == {"total": 10, "completed": 4, "failed": 2}
    assert event.data.usage is not None
    assert event.data.usage.total_tokens == 5


async def test_nobody_to_tell(database: Database) -> None:
    async with database.write() as connection:
        await webhooks.tell(connection, await add_batch(connection, status="completed"), NOW)
        await webhooks.tell(connection, await add_batch(connection, status="completed", webhook_url=URL), NOW)
        await webhooks.tell(connection, new_id(), NOW)
        deleted = await add_batch(
            connection, status="cancelled", webhook_url=URL, webhook_secret="s", deleted_at=NOW - 1
        )
        await webhooks.tell(connection, deleted, NOW)
    assert await rows(database) == []


async def test_a_batch_that_has_not_ended(database: Database) -> None:
    async with database.write() as connection:
        batch = await add_batch(connection, status="finalizing", webhook_url=URL, webhook_secret="s")
        with pytest.raises(KeyError):
            await webhooks.tell(connection, batch, NOW)
    assert await rows(database) == []


async def test_the_end_and_its_event_come_together(database: Database) -> None:
    """What undoes the one undoes the other."""

    async def end_and_fail() -> None:
        async with database.write() as connection:
            batch = await add_batch(connection, status="completed", webhook_url=URL, webhook_secret="s")
            await webhooks.tell(connection, batch, NOW)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await end_and_fail()
    assert await rows(database) == []


async def test_a_claim_moves_on_and_lapses(database: Database) -> None:
    id = await add(database)
    async with database.read() as connection:
        assert not await webhooks.is_due(connection, NOW - 1)
        assert await webhooks.is_due(connection, NOW)
    assert await claim(database, NOW - 1) == []
    (row,) = await claim(database)
    assert (row.id, row.attempts, row.next_at) == (id, 1, NOW + 20)
    async with database.read() as connection:
        assert not await webhooks.is_due(connection, NOW + 19)
    assert await claim(database, NOW + 19) == []
    (again,) = await claim(database, NOW + 20)
    assert (again.id, again.attempts) == (id, 2)


async def test_the_longest_due_come_first(database: Database) -> None:
    ids = [await add(database, next_at=NOW - age) for age in (1, 3, 2)]
    assert [row.id for row in await claim(database, limit=2)] == [ids[1], ids[2]]
    assert [row.id for row in await claim(database, limit=2)] == [ids[0]]


async def test_one_host_does_not_take_all(database: Database) -> None:
    """However many events wait for a host, only some are sent at once, and those for others are found behind them."""
    slow = [await add(database, next_at=NOW - 100 + i) for i in range(20)]
    other = await add(database, host="b.example")
    first = await claim(database, limit=6, per_host=4)
    assert [row.id for row in first] == slow[:4]
    (behind,) = await claim(database, limit=2, per_host=4, busy=first)
    assert behind.id == other
    assert await claim(database, limit=1, per_host=4, busy=[*first, behind]) == []
    assert [row.id for row in await claim(database, limit=9, per_host=4, busy=first[:2])] == slow[4:6]


async def test_one_owner_does_not_take_all(database: Database) -> None:
    """However many hosts an owner names; a batch that is gone has none."""
    async with database.write() as connection:
        ann, ben = await add_batch(connection, owner="ann"), await add_batch(connection, owner="ben")
    many = [await add(database, next_at=NOW - 100 + i, host=f"{i}.example", batch_id=ann) for i in range(9)]
    others = [await add(database, batch_id=ben), await add(database)]
    first = await claim(database, limit=6, per_owner=4)
    assert ([row.id for row in first], {row.owner for row in first}) == (many[:4], {"ann"})
    second = await claim(database, limit=2, per_owner=4, busy=first)
    assert {row.id: row.owner for row in second} == dict(zip(others, ("ben", ""), strict=True))
    assert await claim(database, limit=2, per_owner=4, busy=[*first, *second]) == []
    assert [row.id for row in await claim(database, limit=9, per_owner=4, busy=first[:2])] == many[4:6]


async def test_workers_share(database: Database, database_url: str) -> None:
    """Claims at the same time never overlap."""
    ids = {await add(database) for _ in range(30)}
    other = Database(database_url)
    try:
        taken: list[str] = []
        while len(taken) < 30:
            got = await asyncio.gather(*(claim(side, limit=3) for side in (database, other) * 2))
            assert any(got)
            taken += [row.id for rows in got for row in rows]
        assert sorted(taken) == sorted(ids)
    finally:
        await other.close()


async def test_what_came_of_it(database: Database) -> None:
    """A failure sets the next attempt or none; one whose claim has lapsed and was taken by another changes nothing."""
    await add(database)
    (row,) = await claim(database)
    (later,) = await claim(database, NOW + 20)
    async with database.write() as connection:
        assert not await webhooks.failed(connection, row, "late", None)
        assert await webhooks.failed(connection, later, "HTTP 500", NOW + 50.5)
    (now,) = await rows(database)
    assert (now.attempts, now.error, now.next_at, now.delivered_at) == (2, "HTTP 500", NOW + 50.5, None)
    async with database.write() as connection:
        assert await webhooks.failed(connection, now, "HTTP 410", None)
    (now,) = await rows(database)
    assert (now.error, now.next_at) == ("HTTP 410", None)
    async with database.read() as connection:
        assert not await webhooks.is_due(connection, NOW * 2)


async def test_a_delivery_stands(database: Database) -> None:
    """It ends the matter, also when another had taken the event over, whose failure then says nothing."""
    await add(database)
    (row,) = await claim(database)
    (other,) = await claim(database, NOW + 20)
    async with database.write() as connection:
        await webhooks.delivered(connection, row.id, NOW + 21)
        assert not await webhooks.failed(connection, other, "HTTP 500", NOW + 50)
    (now,) = await rows(database)
    assert (now.delivered_at, now.next_at, now.error) == (NOW + 21, None, None)
    assert await claim(database, NOW + 1000) == []


async def test_sweep(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old events that are over go, some at a time; nothing that is still to be sent does."""
    monkeypatch.setattr(webhooks, "SWEEP_ROWS", 2)
    old = NOW - webhooks.KEPT - 1
    for _ in range(3):
        await add(database, created_at=old, next_at=None)
    kept = {
        await add(database, created_at=old, next_at=NOW + 5.0),
        await add(database, created_at=NOW - webhooks.KEPT, next_at=None, delivered_at=NOW),
    }
    counts = []
    for _ in range(3):
        async with database.write() as connection:
            counts.append(await webhooks.sweep(connection, NOW))
    assert counts == [2, 1, 0]
    assert {row.id for row in await rows(database)} == kept
