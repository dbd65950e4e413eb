"""The queries over uploads in parts: what they hold, how they end, and what a sweep leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store import uploads
from batchery.store.database import Database
from batchery.store.ids import new_id
from batchery.store.schema import dead_blobs, upload_parts
from tests.store.examples import NOW

HOUR = 3_600


async def add_upload(connection: AsyncConnection, **values: Any) -> str:
    """Insert a pending upload that expires an hour after `NOW`; its id."""
    row: dict[str, Any] = {
        "id": new_id(),
        "owner": "local",
        "filename": "input.jsonl",
        "mime_type": "application/jsonl",
        "bytes": 100,
        "status": "pending",
        "created_at": NOW,
        "expires_at": NOW + HOUR,
    }
    row |= values
    await uploads.insert(connection, **row)
    return str(row["id"])


async def add_part(connection: AsyncConnection, upload: str, size: int = 10) -> str:
    """Insert a part; its blob's key."""
    id = new_id()
    key = f"parts/{id[:2]}/{id}"
    await uploads.insert_part(
        connection, id=id, upload_id=upload, bytes=size, md5="0" * 32, blob_key=key, created_at=NOW
    )
    return key


async def dead(connection: AsyncConnection) -> dict[str, float]:
    """The blobs that are noted dead, and since when."""
    found = await connection.execute(sa.select(dead_blobs.c.key, dead_blobs.c.since))
    return {row.key: row.since for row in found}


async def count_parts(connection: AsyncConnection) -> int:
    found = await connection.execute(sa.select(sa.func.count()).select_from(upload_parts))
    return int(found.scalar_one())


async def test_an_upload_holds_its_own_parts_in_the_order_they_came(database: Database) -> None:
    async with database.write() as connection:
        mine, other = await add_upload(connection, api_key="k" * 32), await add_upload(connection)
        assert await uploads.held(connection, mine) == uploads.Held(0, 0)
        keys = [await add_part(connection, mine, size) for size in (3_000_000_000, 0, 7)]
        await add_part(connection, other, 1)
        parts = await uploads.parts(connection, mine)
        assert [part.blob_key for part in parts] == keys
        assert [part.bytes for part in parts] == [3_000_000_000, 0, 7]
        assert await uploads.get_part(connection, parts[1].id) == parts[1]
        assert await uploads.get_part(connection, new_id()) is None
        assert await uploads.held(connection, mine) == uploads.Held(3, 3_000_000_007)
        assert await uploads.bytes_of_key(connection, "k" * 32) == 3_000_000_007
        assert await uploads.bytes_of_key(connection, "x" * 32) == 0
        assert await uploads.get(connection, new_id(), lock=True) is None


@pytest.mark.parametrize(
    ("status", "now", "shown"),
    [
        ("pending", NOW + HOUR - 1, "pending"),
        ("pending", NOW + HOUR, "expired"),
        ("completed", NOW + HOUR, "completed"),
        ("cancelled", NOW + HOUR, "cancelled"),
        ("expired", NOW, "expired"),
    ],
)
async def test_what_is_pending_has_expired_once_its_hour_is_over(
    database: Database, status: str, now: int, shown: str
) -> None:
    async with database.write() as connection:
        row = await uploads.get(connection, await add_upload(connection, status=status))
    assert row is not None
    assert row.status_at(now) == shown


@pytest.mark.parametrize(("status", "file"), [("completed", "f" * 32), ("cancelled", None)])
async def test_an_end_takes_the_parts_along(database: Database, status: str, file: str | None) -> None:
    async with database.write() as connection:
        mine, other = await add_upload(connection), await add_upload(connection)
        keys = {await add_part(connection, mine) for _ in range(3)}
        await add_part(connection, other)
        await uploads.end(connection, mine, status, NOW + 0.5, file=file)
        row = await uploads.get(connection, mine)
        assert row is not None
        assert (row.status, row.file_id) == (status, file)
        assert await uploads.parts(connection, mine) == []
        assert len(await uploads.parts(connection, other)) == 1
        assert await dead(connection) == dict.fromkeys(keys, NOW + 0.5)


async def sweep(database: Database, now: int, limit: int) -> list[int]:
    """Sweep until there is nothing left; what each call has found."""
    found = []
    while True:
        async with database.write() as connection:
            found.append(await uploads.sweep(connection, now, limit))
        if found[-1] == 0:
            return found


async def test_a_sweep_ends_what_has_expired_and_nothing_else(database: Database) -> None:
    async with database.write() as connection:
        old = [await add_upload(connection, expires_at=NOW - i) for i in range(3)]
        keys = {await add_part(connection, id) for id in old for _ in range(4)}
        young = await add_upload(connection, expires_at=NOW + 1)
        kept = await add_part(connection, young)
    found = await sweep(database, NOW, limit=2)
    assert max(found) <= 3 * 2, "one call does more than it may"
    async with database.read() as connection:
        assert [row.status for id in old if (row := await uploads.get(connection, id))] == ["expired"] * 3
        row = await uploads.get(connection, young)
        assert row is not None
        assert row.status == "pending"
        assert [part.blob_key for part in await uploads.parts(connection, young)] == [kept]
        assert await count_parts(connection) == 1
        assert set(await dead(connection)) == keys


async def test_a_sweep_forgets_what_ended_a_day_ago(database: Database) -> None:
    async with database.write() as connection:
        gone = [await add_upload(connection, status=status) for status in ("completed", "cancelled", "expired")]
        gone.append(await add_upload(connection))
        await add_part(connection, gone[-1])
    await sweep(database, NOW + HOUR + uploads.KEPT - 1, limit=10)
    async with database.read() as connection:
        assert None not in [await uploads.get(connection, id) for id in gone]
    await sweep(database, NOW + HOUR + uploads.KEPT, limit=10)
    async with database.read() as connection:
        assert [await uploads.get(connection, id) for id in gone] == [None] * 4
        assert len(await dead(connection)) == 1


async def test_sweeps_at_the_same_time_do_each_thing_once(database: Database) -> None:
    async with database.write() as connection:
        for _ in range(20):
            id = await add_upload(connection, expires_at=NOW)
            for _ in range(5):
                await add_part(connection, id)
    await asyncio.gather(*(sweep(database, NOW, limit=7) for _ in range(4)))
    assert await sweep(database, NOW, limit=7) == [0]
    async with database.read() as connection:
        assert await count_parts(connection) == 0
        assert len(await dead(connection)) == 100
