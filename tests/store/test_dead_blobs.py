"""Blobs that nothing refers to any more: noted once, claimed by one at a time, forgotten when they are gone."""

from __future__ import annotations

import asyncio

import sqlalchemy as sa

from batchery.store import dead_blobs, schema
from batchery.store.database import Database
from tests.store.examples import NOW


async def left(database: Database) -> dict[str, float]:
    async with database.read() as connection:
        return {row.key: row.since for row in await connection.execute(sa.select(schema.dead_blobs))}


async def test_a_blob_is_due_after_its_grace_and_claimed_once(database: Database) -> None:
    async with database.write() as connection:
        await dead_blobs.note(connection, ["a", None, "b"], NOW)
        await dead_blobs.note(connection, [], NOW)
        await dead_blobs.note(connection, [None], NOW)
        await dead_blobs.note(connection, ["c"], NOW + 5)
    for moment, found in ((NOW + 9.9, []), (NOW + 10, ["a", "b"]), (NOW + 19.9, ["c"]), (NOW + 20, ["a", "b"])):
        async with database.write() as connection:
            assert sorted(await dead_blobs.claim(connection, moment, 10, 99)) == found
    async with database.write() as connection:
        await dead_blobs.forget(connection, ["a", "c", "none"])
    assert set(await left(database)) == {"b"}


async def test_a_blob_that_is_noted_twice_keeps_its_first_moment(database: Database) -> None:
    async with database.write() as connection:
        await dead_blobs.note(connection, ["a"], NOW)
        await dead_blobs.note(connection, ["a", "a", "b"], NOW + 5)
    assert await left(database) == {"a": NOW, "b": NOW + 5}


async def test_the_oldest_come_first_and_no_more_than_asked_for(database: Database) -> None:
    async with database.write() as connection:
        for place, key in enumerate("dbca"):
            await dead_blobs.note(connection, [key], NOW + place)
        assert await dead_blobs.claim(connection, NOW + 100, 50, 2) == ["d", "b"]
        assert await dead_blobs.claim(connection, NOW + 100, 50, 9) == ["c", "a"]


async def test_two_at_once_never_get_the_same(database_url: str) -> None:
    one, other = Database(database_url), Database(database_url)
    await one.migrate()
    async with one.write() as connection:
        await dead_blobs.note(connection, [f"{i:03}" for i in range(200)], NOW)

    async def take(database: Database) -> list[str]:
        taken: list[str] = []
        while True:
            async with database.write() as connection:
                some = await dead_blobs.claim(connection, NOW + 1000, 60, 7)
            if not some:
                return taken
            taken += some

    taken = [key for keys in await asyncio.gather(take(one), take(other), take(one), take(other)) for key in keys]
    assert sorted(taken) == [f"{i:03}" for i in range(200)]
    await one.close()
    await other.close()
