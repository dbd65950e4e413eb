"""The SQLite driver: as few ways to a connection's thread as are needed, and none too few."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from batchery.store import sqlite_driver
from batchery.store.database import Database, sqlite_url
from batchery.store.errors import StoreUnavailable
from tests.store.examples import add_file

SLOW = sa.text(
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000000) SELECT count(*) FROM n"
)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(sqlite_url(tmp_path / "one.db"), readers=1)
    await database.migrate()
    await database.ping()
    yield database
    await database.close()


@pytest.fixture
def calls(database: Database, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been called in the thread of any connection."""
    found: list[str] = []
    execute: Any = sqlite_driver.Thread._execute

    async def note(self: sqlite_driver.Thread, function: Any, *arguments: Any, **options: Any) -> Any:
        found.append(function.__name__)
        return await execute(self, function, *arguments, **options)

    monkeypatch.setattr(sqlite_driver.Thread, "_execute", note)
    return found


async def test_a_statement_with_its_rows_is_one_call(database: Database, calls: list[str]) -> None:
    async with database.read() as connection:
        found = await connection.execute(sa.text("SELECT 1 AS a, 'x' AS b UNION SELECT 2, 'y'"))
        assert [tuple(row) for row in found] == [(1, "x"), (2, "y")]
        assert list(found.keys()) == ["a", "b"]
        assert await connection.scalar(sa.text("SELECT 3")) == 3
    assert len(calls) == 2


async def test_what_writes_begins_and_commits_in_the_thread(database: Database, calls: list[str]) -> None:
    async with database.write() as connection:
        assert len(calls) == 1
        await add_file(connection)
    assert len(calls) == 3


async def test_reading_nothing_begins_nothing(database: Database, calls: list[str]) -> None:
    async with database.read():
        pass
    assert calls == []
    async with database.write() as connection:
        await add_file(connection)
    async with database.read() as connection:
        assert await connection.scalar(sa.text("SELECT count(*) FROM files")) == 1


async def test_a_statement_that_fails_ends_its_transaction(database: Database) -> None:
    async def fail() -> None:
        async with database.read() as connection:
            await connection.execute(sa.text("SELECT count(*) FROM files"))
            await connection.execute(sa.text("SELECT nonsense"))

    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="nonsense"):
            await fail()
        async with database.write() as connection:
            await add_file(connection)
    async with database.read() as connection:  # the one reader does not see an old state
        assert await connection.scalar(sa.text("SELECT count(*) FROM files")) == 3


async def test_a_cancelled_statement_is_waited_for_before_the_next_transaction(database: Database) -> None:
    """It runs on in the thread, and what is rolled back before it has ended would not be."""
    for _ in range(3):

        async def read_slowly() -> None:
            async with database.read() as connection:
                await connection.execute(SLOW)

        async def write_slowly() -> None:
            async with database.write() as connection:
                await add_file(connection)
                await connection.execute(SLOW)

        for slow in (read_slowly, write_slowly):
            task = asyncio.create_task(slow())
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        async with asyncio.timeout(20), database.write() as connection:
            await connection.execute(sa.text("DELETE FROM files WHERE filename = 'kept'"))
            await add_file(connection, filename="kept")
        async with asyncio.timeout(20), database.read() as connection:
            names = (await connection.execute(sa.text("SELECT filename FROM files"))).scalars().all()
            assert names == ["kept"]
