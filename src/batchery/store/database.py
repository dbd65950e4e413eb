"""The database: engines, transactions, and bringing the schema up to date.

On SQLite there are two pools: one connection that writes, so that the writers of a process queue in Python instead of
failing in SQLite, and a few that read. WAL lets both go on at once; `synchronous=FULL` makes a commit survive a power
cut. On PostgreSQL both are the same pool, and what only reads is `REPEATABLE READ`, or each of its statements would see
another moment.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from batchery.store.errors import StoreUnavailable, classify

REVISION = "0004"
"""The migration that this code needs; a test holds it to the newest in `migrations/`."""

BUSY_TIMEOUT_MS = 15_000
READERS = 4


def sqlite_url(path: Path) -> str:
    """The database URL of an SQLite file."""
    return f"sqlite+aiosqlite:///{path}"


def async_url(url: str) -> str:
    """A database URL with the driver that batchery uses, from one that users write.

    Args:
        url: `sqlite:///path`, `postgresql://user@host/name`, or either with a driver named.

    Raises:
        ValueError: another kind of database.
    """
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise ValueError(f"{url!r} is not a database URL, such as postgresql://user@host/name") from error
    backend = parsed.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
    if backend == "sqlite":
        return parsed.set(drivername="sqlite+aiosqlite").render_as_string(hide_password=False)
    raise ValueError(f"{backend!r} is not supported as a database; use sqlite or postgresql")


class Database:
    """Connections to one database.

    Args:
        url: as from `async_url` or `sqlite_url`.
        readers: connections that may read at the same time.
    """

    def __init__(self, url: str, *, readers: int = READERS) -> None:
        self.is_sqlite = sa.make_url(url).get_backend_name() == "sqlite"
        if self.is_sqlite:
            self._writer = _sqlite_engine(url, "BEGIN IMMEDIATE", 1)
            self._reader = _sqlite_engine(url, "BEGIN", readers)
        else:
            self._writer = create_async_engine(url, pool_size=readers + 2, max_overflow=4, pool_pre_ping=True)
            self._reader = self._writer.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads: one consistent view.

        Raises:
            StoreUnavailable, StoreFull: the database failed.
        """
        async with self._connect(self._reader) as connection:
            yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that commits at the end of the block, and leaves nothing behind when the block raises.

        Raises:
            StoreUnavailable, StoreFull: the database failed; nothing of the block has happened.
        """
        async with self._connect(self._writer) as connection:
            yield connection

    @asynccontextmanager
    async def _connect(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        try:
            async with engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            if _is_defect(error):
                raise
            raise classify(error) from error
        except (TimeoutError, OSError, sa.exc.TimeoutError) as error:
            raise StoreUnavailable(str(error)) from error

    async def ping(self) -> None:
        """Ask for nothing, to learn whether the database answers.

        Raises:
            StoreUnavailable: it does not.
        """
        async with self.read() as connection:
            await connection.execute(sa.select(1))

    async def revision(self) -> str | None:
        """The migration that the database is at; None for an empty one."""
        try:
            async with self.read() as connection:
                found = await connection.execute(sa.text("SELECT version_num FROM alembic_version"))
                return found.scalar()
        except (StoreUnavailable, SQLAlchemyError):
            return None

    async def migrate(self) -> None:
        """Bring the schema up to date. Does nothing, quickly, when it is.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        if await self.revision() == REVISION:
            return
        from batchery.store.migrations import upgrade  # noqa: PLC0415  (alembic is slow to import, and rarely needed)

        async with self.write() as connection:
            await connection.run_sync(upgrade)

    async def close(self) -> None:
        """Close all connections."""
        await self._writer.dispose()
        if self.is_sqlite:
            await self._reader.dispose()


def _is_defect(error: DBAPIError) -> bool:
    """Whether the statement itself was wrong, which is ours to mend, and not the database's state."""
    return isinstance(error, sa.exc.ProgrammingError | sa.exc.IntegrityError | sa.exc.DataError)


def _sqlite_engine(url: str, begin: str, size: int) -> AsyncEngine:
    engine = create_async_engine(
        url, poolclass=sa.pool.AsyncAdaptedQueuePool, pool_size=size, max_overflow=0, pool_timeout=60
    )

    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so, below
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA journal_size_limit=67108864")
        cursor.execute("PRAGMA cache_size=-8192")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin_transaction(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


SQLITE_VERSION = sqlite3.sqlite_version_info
if SQLITE_VERSION < (3, 35):  # RETURNING and partial indexes
    raise ImportError(f"batchery needs SQLite 3.35 or later; this Python has {sqlite3.sqlite_version}")
