"""Transactions, migrations and the classification of failures, on both databases."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import traceback
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store import database as database_module
from batchery.store import files, identity, migrations
from batchery.store.database import REVISION, Database, async_url, sqlite_url
from batchery.store.errors import StoreFull, StoreUnavailable
from batchery.store.ids import new_id
from batchery.store.schema import metadata
from tests.store.examples import add_batch, add_file


async def names(database: Database) -> set[str]:
    async with database.read() as connection:
        return {row.filename for row in await files.page(connection, "local", limit=1000)}


# The schema.


def test_the_revision_is_the_newest_migration() -> None:
    assert ScriptDirectory.from_config(migrations.config()).get_heads() == [REVISION]


async def test_migrations_give_the_tables_of_the_schema(database: Database) -> None:
    def differences(connection: sa.Connection) -> Any:
        return compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata)

    async with database.write() as connection:
        assert await connection.run_sync(differences) == []


async def test_migrating_again_changes_nothing(database: Database) -> None:
    async with database.write() as connection:
        await add_file(connection, filename="kept")
    assert await database.revision() == REVISION
    await database.migrate()
    assert await names(database) == {"kept"}


async def test_an_empty_database_has_no_revision(database_url: str) -> None:
    database = Database(database_url)
    assert await database.revision() is None
    await database.close()


async def test_several_processes_may_migrate_at_once(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(3)]
    await asyncio.gather(*(database.migrate() for database in databases))
    for database in databases:
        assert await database.revision() == REVISION
        await database.close()


async def test_a_failed_migration_leaves_nothing(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(database_url)

    def fail(connection: sa.Connection) -> None:
        upgrade(connection)
        raise StoreUnavailable("the power went")

    upgrade = migrations.upgrade
    monkeypatch.setattr(migrations, "upgrade", fail)
    with pytest.raises(StoreUnavailable):
        await database.migrate()
    assert await database.revision() is None
    monkeypatch.undo()
    await database.migrate()
    assert await database.revision() == REVISION
    await database.close()


# Transactions.


async def test_a_write_that_raises_leaves_nothing(database: Database) -> None:
    async def write_and_fail() -> None:
        async with database.write() as connection:
            await add_file(connection, filename="gone")
            raise KeyError

    with pytest.raises(KeyError):
        await write_and_fail()
    assert await names(database) == set()


async def test_a_defect_is_not_taken_for_an_outage(database: Database) -> None:
    async def insert_twice() -> None:
        async with database.write() as connection:
            await add_file(connection, id="a" * 32)
            await add_file(connection, id="a" * 32)

    with pytest.raises(sa.exc.IntegrityError):
        await insert_twice()
    assert await names(database) == set()


async def test_no_error_has_what_a_statement_was_given(database: Database) -> None:
    """It is logged, and there are secrets of webhooks and results among it."""
    secret = new_id()

    async def fail(connection: AsyncConnection) -> None:
        await connection.execute(sa.text("SELECT :given FROM nowhere"), {"given": secret})

    async def in_a_block(begin: Callable[[], AbstractAsyncContextManager[AsyncConnection]]) -> None:
        async with begin() as connection:
            await fail(connection)

    for failing in (
        in_a_block(database.read),
        in_a_block(database.write),
        database.write_at_once(fail),
        database.look(fail),
    ):
        with pytest.raises((StoreUnavailable, sa.exc.ProgrammingError)) as raised:
            await failing
        assert "nowhere" in str(raised.value)
        assert secret not in "".join(traceback.format_exception(raised.value))


async def test_a_read_is_one_view(database: Database) -> None:
    async with database.write() as connection:
        await add_file(connection, filename="before")
    async with database.read() as connection:
        first = await files.page(connection, "local", limit=10)
        async with database.write() as other:
            await add_file(other, filename="after")
        second = await files.page(connection, "local", limit=10)
    assert [row.id for row in first] == [row.id for row in second]
    assert await names(database) == {"before", "after"}


async def test_writers_of_one_process_wait_for_each_other(database: Database) -> None:
    async with database.write() as connection:
        batch = await add_batch(connection, total=0)

    async def add_one() -> None:
        async with database.write() as connection:
            await connection.execute(
                sa.text("UPDATE batches SET total = total + 1 WHERE id = :id").bindparams(id=batch)
            )

    await asyncio.gather(*(add_one() for _ in range(50)))
    async with database.read() as connection:
        assert await connection.scalar(sa.text("SELECT total FROM batches")) == 50


async def test_two_processes_write_at_once(database_url: str) -> None:
    first, second = Database(database_url), Database(database_url)
    await first.migrate()

    async def add(database: Database, name: str) -> None:
        async with database.write() as connection:
            await add_file(connection, filename=name)

    await asyncio.gather(*(add((first, second)[i % 2], str(i)) for i in range(40)))
    assert await names(first) == {str(i) for i in range(40)}
    await first.close()
    await second.close()


async def test_cancelled_writes_leave_neither_rows_nor_locks(database: Database) -> None:
    random.seed(1)
    written: set[str] = set()

    async def write(name: str) -> None:
        async with database.write() as connection:
            await add_file(connection, filename=name + "a")
            await add_file(connection, filename=name + "b")
        written.add(name)

    for i in range(40):
        task = asyncio.create_task(write(str(i)))
        await asyncio.sleep(random.uniform(0, 0.005))  # any moment, also inside a statement or the commit
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    async with asyncio.timeout(5):
        await write("last")
    found = await names(database)
    assert {name + letter for name in written for letter in "ab"} <= found
    assert len([name for name in found if name[-1] == "a"]) == len([name for name in found if name[-1] == "b"])


# Failures.


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+asyncpg://nobody@127.0.0.1:1/nothing",
        "postgresql+asyncpg://nobody@no-such-host.invalid/nothing",
        "sqlite+aiosqlite:////no/such/folder/batchery.db",
    ],
)
async def test_a_database_that_is_not_there_is_unavailable(url: str) -> None:
    database = Database(url)
    with pytest.raises(StoreUnavailable):
        await database.ping()
    with pytest.raises(StoreUnavailable):
        await database.migrate()
    assert await database.revision() is None
    await database.close()


async def test_a_server_that_does_not_know_the_database_is_unavailable(postgres_server: str) -> None:
    database = Database(sa.make_url(postgres_server).set(database="missing").render_as_string(hide_password=False))
    with pytest.raises(StoreUnavailable):
        await database.ping()
    await database.close()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_cut_connection_is_unavailable_and_then_replaced(database: Database, postgres_server: str) -> None:
    killer = Database(postgres_server)

    async def lose() -> None:
        async with database.write() as connection:
            await add_file(connection, filename="gone")
            pid = await connection.scalar(sa.text("SELECT pg_backend_pid()"))
            async with killer.write() as other:
                await other.execute(sa.text("SELECT pg_terminate_backend(:pid)").bindparams(pid=pid))
            await add_file(connection, filename="gone too")

    with pytest.raises(StoreUnavailable):
        await lose()
    assert await names(database) == set()
    await killer.close()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_statement_without_an_answer_is_unavailable_but_in_a_migration(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "STATEMENT_TIMEOUT", 0.1)
    database = Database(database_url)
    upgrade = migrations.upgrade

    def slowly(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SELECT pg_sleep(0.3)")
        upgrade(connection)

    monkeypatch.setattr(migrations, "upgrade", slowly)
    await database.migrate()
    for begin in (database.read, database.write):
        with pytest.raises(StoreUnavailable):
            async with asyncio.timeout(20), begin() as connection:
                await connection.execute(sa.text("SELECT pg_sleep(60)"))
    assert await names(database) == set()
    await database.close()


async def test_waiting_too_long_for_a_connection_is_unavailable(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "PATIENCE", 0.05)
    pool = database._writer.sync_engine.pool
    assert isinstance(pool, sa.pool.QueuePool)
    pool._timeout = 0.05
    async with asyncio.timeout(10), AsyncExitStack() as held:

        async def take_all() -> None:
            for _ in range(20):
                await held.enter_async_context(database.write())

        with pytest.raises(StoreUnavailable):
            await take_all()
    await database.ping()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_full_disk_is_full_and_then_not(database: Database) -> None:
    async def fill() -> None:
        async with database.write() as connection:
            for i in range(100):
                await add_file(connection, filename=f"big{i}", problems=b"x" * 100_000)

    async def pages(most: int) -> None:
        async with database.write() as connection:
            await connection.exec_driver_sql(f"PRAGMA max_page_count={most}")

    async with database.write() as connection:
        await add_file(connection, filename="before")
    await pages(200)
    with pytest.raises(StoreFull):
        await fill()
    assert await names(database) == {"before"}
    await pages(1_000_000)
    await fill()
    assert len(await names(database)) == 101


async def test_a_locked_database_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchery.store.turns.PATIENCE", 0.05)
    database = Database(sqlite_url(tmp_path / "a.db"))
    await database.migrate()
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    async def add() -> None:
        async with database.write() as connection:
            await add_file(connection, filename="a")

    with pytest.raises(StoreUnavailable, match="locked"):
        await add()
    assert await names(database) == set()  # readers are not held up
    other.execute("ROLLBACK")
    await add()
    other.close()
    await database.close()


async def test_sqlite_survives_a_power_cut(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / "a.db"))
    async with database.write() as connection:
        settings = {
            name: (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    await database.close()


# URLs.


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("sqlite:////data/a.db", "sqlite+aiosqlite:////data/a.db"),
        ("sqlite+aiosqlite:////data/a.db", "sqlite+aiosqlite:////data/a.db"),
        ("sqlite+pysqlite:///a.db", "sqlite+aiosqlite:///a.db"),
        ("postgresql://u:p%40w@h:1/d", "postgresql+asyncpg://u:p%40w@h:1/d"),
        ("postgres://u@h/d", "postgresql+asyncpg://u@h/d"),
        ("postgresql+psycopg2://u@h/d", "postgresql+asyncpg://u@h/d"),
        ("postgresql://u@/d?host=/run/pg", "postgresql+asyncpg://u@/d?host=%2Frun%2Fpg"),
    ],
)
def test_async_url(given: str, used: str) -> None:
    assert async_url(given) == used


@pytest.mark.parametrize("url", ["", "batchery.db", "mysql://u@h/d", "http://h/d", "postgresql://u@h:port/d"])
def test_async_url_refuses_what_is_no_database(url: str) -> None:
    with pytest.raises(ValueError, match="database"):
        async_url(url)


def test_sqlite_url(tmp_path: Path) -> None:
    assert sa.make_url(sqlite_url(tmp_path / "a.db")).database == str(tmp_path / "a.db")


@pytest.mark.parametrize("cancels", [1, 2, 3])
@pytest.mark.parametrize("mode", ["read", "write"])
async def test_a_transaction_that_is_cancelled_at_any_moment_leaves_nothing_behind(
    tmp_path: Path, cancels: int, mode: str
) -> None:
    """However often: as by a client that leaves, while the server stops."""
    database = Database(sqlite_url(tmp_path / "db"), readers=1)
    await database.migrate()

    async def work() -> None:
        while True:
            async with getattr(database, mode)() as connection:
                await identity.get(connection)

    for i in range(60):
        task = asyncio.create_task(work())
        await asyncio.sleep(0.0002 * i)
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0.0001 * (i % 7))
        async with asyncio.timeout(10):
            await asyncio.wait([task])
            assert task.cancelled()
            async with database.write() as connection:  # as the only connection is free, and nobody holds the lock
                assert await identity.get(connection)
            async with database.read() as connection:
                assert await identity.get(connection)
    async with asyncio.timeout(10):
        await database.close()


async def test_one_that_is_cancelled_while_it_waits_for_another_process(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / "db"))
    await database.migrate()
    other = sqlite3.connect(tmp_path / "db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    async def work() -> None:
        async with database.write() as connection:
            await identity.get(connection)

    task = asyncio.create_task(work())
    async with asyncio.timeout(10):
        while not database._write_turns.locked():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.001)
    other.execute("COMMIT")
    other.close()
    async with asyncio.timeout(10):
        await asyncio.wait([task])
        assert task.cancelled()
        await work()
        await database.close()
