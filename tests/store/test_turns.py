"""Writers of several processes take turns at an SQLite database; nobody who is cancelled or stands still keeps one."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from batchery.store import turns
from batchery.store.database import Database, sqlite_url
from batchery.store.errors import StoreUnavailable
from tests.store.examples import add_file


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Database, Database]]:
    """Two that share a file, as a server and its worker do."""
    both = Database(sqlite_url(tmp_path / "shared.db")), Database(sqlite_url(tmp_path / "shared.db"))
    await both[0].migrate()
    yield both
    for one in both:
        await one.close()


async def write(database: Database, seconds: float = 0.0) -> None:
    async with database.write() as connection:
        await add_file(connection)
        await asyncio.sleep(seconds)


async def test_one_that_writes_all_the_time_lets_others_have_their_turns(pair: tuple[Database, Database]) -> None:
    busy, other = pair
    turns_of_busy = itertools.count()

    async def write_all_the_time() -> None:
        while True:
            await write(busy, 0.02)
            next(turns_of_busy)

    writing = asyncio.create_task(write_all_the_time())
    async with asyncio.timeout(30):
        for _ in range(20):
            await write(other)
    writing.cancel()
    with suppress(asyncio.CancelledError):
        await writing
    # One at each of the 20 times was ahead, and one or two more where the other did not ask at once for its next turn.
    assert next(turns_of_busy) <= 60


async def test_whoever_is_cancelled_leaves_neither_the_turn_nor_the_database_taken(
    pair: tuple[Database, Database],
) -> None:
    draw = random.Random(5)
    for _ in range(60):
        tasks = [asyncio.create_task(write(draw.choice(pair), 0.002)) for _ in range(4)]
        await asyncio.sleep(draw.random() * 0.02)
        for task in tasks[:3]:
            task.cancel()
        async with asyncio.timeout(20):
            await asyncio.gather(*tasks, return_exceptions=True)
    for one in pair:
        async with asyncio.timeout(10):
            await write(one)


@pytest.mark.parametrize("steps", range(12))
async def test_the_next_one_is_not_kept_waiting_by_one_that_is_cancelled_while_it_connects(
    tmp_path: Path, steps: int
) -> None:
    first, second = Database(sqlite_url(tmp_path / "new.db")), Database(sqlite_url(tmp_path / "new.db"))
    await first.migrate()
    cancelled = asyncio.create_task(write(second))
    waiting = asyncio.create_task(write(second))
    for _ in range(steps):
        await asyncio.sleep(0)
    cancelled.cancel()
    async with asyncio.timeout(20):  # the pool would let it wait for 60
        await waiting
    await first.close()
    await second.close()


async def test_a_turn_that_somebody_stands_still_with_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.3)
    database = Database(sqlite_url(tmp_path / "held.db"))
    await database.migrate()
    held = os.open(tmp_path / "held.db-turn", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    await write(database)
    os.close(held)
    await database.close()


async def test_a_database_that_is_taken_for_too_long_is_an_outage(
    pair: tuple[Database, Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.3)
    async with pair[0].write():
        with pytest.raises(StoreUnavailable, match="locked"):
            await write(pair[1])
    await write(pair[1])
