"""Transactions done in one call, and looks from the event loop; on PostgreSQL they are ordinary transactions."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from batchery.store import files, sqlite_driver
from batchery.store.database import Database, sqlite_url
from batchery.store.errors import StoreUnavailable
from tests.store.examples import add_file

SLOW = sa.text(
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000000) SELECT count(*) FROM n"
)


async def names(database: Database) -> set[str]:
    async with database.read() as connection:
        return {row.filename for row in await files.page(connection, "local", limit=1000)}


@pytest.fixture
async def one(tmp_path: Path) -> Any:
    database = Database(sqlite_url(tmp_path / "one.db"))
    await database.migrate()
    yield database
    await database.close()


async def test_what_is_written_at_once_is_there_at_the_end(database: Database) -> None:
    async def add(connection: Any) -> str:
        await add_file(connection, filename="a")
        return await add_file(connection, filename="b")

    id = await database.write_at_once(add)
    row = await database.look(lambda connection: files.get(connection, id))
    assert row is not None
    assert row.filename == "b"
    assert await names(database) == {"a", "b"}


async def test_a_body_that_raises_leaves_nothing(database: Database) -> None:
    async def add_and_fail(connection: Any) -> None:
        await add_file(connection, filename="gone")
        raise KeyError("gone")

    async def add_twice(connection: Any) -> None:
        await add_file(connection, id="a" * 32)
        await add_file(connection, id="a" * 32)

    for _ in range(2):
        with pytest.raises(KeyError):
            await database.write_at_once(add_and_fail)
        with pytest.raises(sa.exc.IntegrityError):
            await database.write_at_once(add_twice)
    assert await names(database) == set()
    await database.write_at_once(lambda connection: add_file(connection, filename="kept"))
    assert await names(database) == {"kept"}


async def test_many_write_at_once_beside_others(database: Database) -> None:
    async def in_steps(number: int) -> None:
        async with database.write() as connection:
            await add_file(connection, filename=f"steps-{number}")

    def at_once(number: int) -> Any:
        return database.write_at_once(lambda connection: add_file(connection, filename=f"once-{number}"))

    await asyncio.gather(*(in_steps(number) for number in range(20)), *(at_once(number) for number in range(20)))
    assert len(await names(database)) == 40


async def test_a_look_sees_each_commit_before_it(database: Database) -> None:
    id = await database.write_at_once(lambda connection: add_file(connection, bytes=0))
    for size in range(1, 20):
        async with database.write() as connection:
            await connection.execute(sa.text("UPDATE files SET bytes = :size"), {"size": size})
        row = await database.look(lambda connection: files.get(connection, id))
        assert row is not None
        assert row.size == size


async def test_on_sqlite_it_is_one_call_and_a_look_is_none(one: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    id = await one.write_at_once(add_file)
    calls: list[object] = []
    execute: Any = sqlite_driver.Thread._execute

    async def note(self: sqlite_driver.Thread, function: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(function)
        return await execute(self, function, *arguments, **options)

    async def add(connection: Any) -> int:
        await add_file(connection)
        await add_file(connection)
        return threading.get_ident()

    async def where(connection: Any) -> int:
        assert await files.get(connection, id) is not None
        return threading.get_ident()

    monkeypatch.setattr(sqlite_driver.Thread, "_execute", note)
    assert await one.write_at_once(add) != threading.get_ident()
    assert len(calls) == 1
    assert await one.look(where) == threading.get_ident()
    assert len(calls) == 1


async def test_waiting_for_something_else_is_a_defect_and_leaves_nothing(one: Database) -> None:
    async def add_and_wait(connection: Any) -> None:
        await add_file(connection)
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="waits for something else"):
        await one.write_at_once(add_and_wait)
    assert await names(one) == set()


async def test_whoever_is_cancelled_ends_once_the_transaction_has(one: Database) -> None:
    begun = threading.Event()

    async def add_slowly(connection: Any) -> None:
        await add_file(connection, filename="slow")
        begun.set()
        await connection.execute(SLOW)

    task = asyncio.create_task(one.write_at_once(add_slowly))
    assert await asyncio.to_thread(begun.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await names(one) == {"slow"}  # it was too late to break it off, and nothing is half done
    async with asyncio.timeout(20):
        await one.write_at_once(lambda connection: add_file(connection, filename="next"))


async def test_a_look_that_finds_the_database_locked_waits_elsewhere(one: Database, tmp_path: Path) -> None:
    """As it may be while it is recovered; the event loop goes on meanwhile."""
    id = await one.write_at_once(add_file)
    await one.close()  # or SQLite does not give anybody the whole of it
    other = sqlite3.connect(tmp_path / "one.db", isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN IMMEDIATE")
    looking = asyncio.create_task(one.look(lambda connection: files.get(connection, id)))
    for _ in range(10):
        await asyncio.sleep(0.01)
    assert not looking.done()
    other.execute("COMMIT")
    other.close()
    async with asyncio.timeout(30):
        assert await looking is not None


async def test_what_cannot_be_begun_or_looked_at_is_the_stores_error(one: Database) -> None:
    async with one.write() as connection:
        await connection.execute(sa.text("DROP TABLE idempotency_keys"))
    nonsense = sa.text("SELECT * FROM idempotency_keys")
    for ask in (one.look, one.write_at_once):
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="no such table"):
                await ask(lambda connection: connection.execute(nonsense))
    await one.write_at_once(add_file)
