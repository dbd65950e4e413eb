"""The queries over idempotency keys: one object for a key, whoever asks at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store import idempotency
from batchery.store.database import Database
from batchery.store.idempotency import KEPT, Kind, Made, Use
from batchery.store.schema import idempotency_keys
from tests.store.examples import NOW

FIRST, SECOND, THIRD = "1" * 32, "2" * 32, "3" * 32


def use(key: str = "k", owner: str = "me", kind: Kind = "file", fingerprint: str = "a" * 64) -> Use:
    return Use(owner, kind, key, fingerprint)


async def claim(database: Database, wanted: Use, id: str, now: int = NOW) -> Made | None:
    async with database.write() as connection:
        return await idempotency.claim(connection, wanted, id, now)


async def test_a_key_makes_one_object_and_says_which(database: Database) -> None:
    assert await claim(database, use(), FIRST) is None
    assert await claim(database, use(), SECOND) == Made("a" * 64, FIRST)
    assert await claim(database, use(fingerprint="b" * 64), SECOND) == Made("a" * 64, FIRST)
    async with database.read() as connection:
        assert await idempotency.find(connection, "me", "file", "k", NOW) == Made("a" * 64, FIRST)


@pytest.mark.parametrize("other", [use(key="K"), use(key="k "), use(owner="you"), use(kind="batch")])
async def test_another_key_owner_or_kind_is_another_key(database: Database, other: Use) -> None:
    assert await claim(database, use(), FIRST) is None
    async with database.read() as connection:
        assert await idempotency.find(connection, other.owner, other.kind, other.key, NOW) is None
    assert await claim(database, other, SECOND) is None


async def test_a_key_is_free_again_after_a_day(database: Database) -> None:
    assert await claim(database, use(), FIRST) is None
    assert await claim(database, use(), SECOND, NOW + KEPT - 1) == Made("a" * 64, FIRST)
    async with database.read() as connection:
        assert await idempotency.find(connection, "me", "file", "k", NOW + KEPT - 1) is not None
        assert await idempotency.find(connection, "me", "file", "k", NOW + KEPT) is None
    assert await claim(database, use(fingerprint="b" * 64), SECOND, NOW + KEPT) is None
    assert await claim(database, use(), THIRD, NOW + KEPT) == Made("b" * 64, SECOND)


async def test_a_key_whose_object_is_gone_makes_another(database: Database) -> None:
    assert await claim(database, use(), FIRST) is None
    assert await claim(database, use(key="other"), SECOND) is None
    async with database.write() as connection:
        await idempotency.forget(connection, FIRST)
    assert await claim(database, use(), THIRD) is None
    assert await claim(database, use(key="other"), THIRD) == Made("a" * 64, SECOND)


async def test_what_is_rolled_back_is_not_remembered(database: Database) -> None:
    async with database.write() as connection:
        assert await idempotency.claim(connection, use(), FIRST, NOW) is None
        await connection.rollback()
    assert await claim(database, use(), SECOND) is None


async def test_a_key_that_is_forgotten_while_it_is_claimed_is_claimed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await claim(database, use(), FIRST) is None
    real = idempotency.find

    async def too_late(connection: AsyncConnection, *wanted: Any) -> Made | None:
        monkeypatch.setattr(idempotency, "find", real)
        await idempotency.forget(connection, FIRST)
        return await real(connection, *wanted)

    monkeypatch.setattr(idempotency, "find", too_late)
    assert await claim(database, use(), SECOND) is None
    assert await claim(database, use(), THIRD) == Made("a" * 64, SECOND)


async def test_of_many_at_once_one_makes_it(database: Database) -> None:
    ids = [f"{i:032x}" for i in range(8)]
    for expired in (False, True):  # also when all of them find a key that is to be replaced
        made = await asyncio.gather(*(claim(database, use(), id, NOW + KEPT * expired) for id in ids))
        assert made.count(None) == 1
        winner = ids[made.index(None)]
        assert {other.object_id for other in made if other is not None} == {winner}


async def test_a_second_claim_waits_for_the_first_to_end(database: Database) -> None:
    for commits in (True, False):
        key = use(key=str(commits))
        began, end = asyncio.Event(), asyncio.Event()

        async def first(
            key: Use = key, commits: bool = commits, began: asyncio.Event = began, end: asyncio.Event = end
        ) -> None:
            async with database.write() as connection:
                await idempotency.claim(connection, key, FIRST, NOW)
                began.set()
                await end.wait()
                if not commits:
                    await connection.rollback()

        holding = asyncio.create_task(first())
        await began.wait()
        waiting = asyncio.create_task(claim(database, key, SECOND))
        async with database.read() as connection:  # a round trip in which it could have ended
            await connection.execute(sa.select(1))
        assert not waiting.done()
        end.set()
        await holding
        assert await waiting == (Made("a" * 64, FIRST) if commits else None)


async def test_a_sweep_takes_the_old_ones_some_at_a_time(database: Database) -> None:
    for i in range(5):
        assert await claim(database, use(key=str(i)), FIRST, NOW - i) is None

    async def sweep(now: int) -> int:
        async with database.write() as connection:
            return await idempotency.sweep(connection, now, 2)

    assert [await sweep(NOW + KEPT - 2) for _ in range(3)] == [2, 1, 0]
    async with database.read() as connection:
        left = await connection.execute(sa.select(idempotency_keys.c.key).order_by(idempotency_keys.c.key))
        assert list(left.scalars()) == ["0", "1"]
