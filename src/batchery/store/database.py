"""The database: engines, transactions, and bringing the schema up to date.

On SQLite there are two pools: one connection that writes, so that the writers of a process queue in Python instead of
failing in SQLite, and a few that read. WAL lets both go on at once; `synchronous=FULL` makes a commit survive a power
cut. Beside these pools there is a connection each for the two ways of doing something in one call
(`sqlite_at_once`). On PostgreSQL both pools are the same, and what only reads is `REPEATABLE READ`, or each of its
statements would see another moment.

What fails is logged by its callers, so no engine puts parameters into its errors: they hold secrets and results.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from batchery.store import sqlite_driver
from batchery.store.errors import StoreUnavailable, classify
from batchery.store.sqlite_at_once import Body, Looker, Transactions
from batchery.store.sqlite_driver import Driver
from batchery.store.turns import BEGIN, POLL_MS, TurnTaking

T = TypeVar("T")

REVISION = "0005"
"""The migration that this code needs; a test holds it to the newest in `migrations/`."""

BUSY_TIMEOUT_MS = 15_000
READERS = 4

PATIENCE = 60.0
"""Seconds to wait at most for a connection while others of this process use them."""

STATEMENT_TIMEOUT = 30.0
"""Seconds that PostgreSQL may take over a statement, but for migrations. After a failover, or with a connection that is
open at this end only, the answer would be waited for without end, and each such wait would hold a connection."""


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
        self._url = url
        self.is_sqlite = sa.make_url(url).get_backend_name() == "sqlite"
        # Users of an SQLite database do not queue at the pools, where whoever waits is not woken when a connection
        # could not be made because its task was cancelled meanwhile.
        self._write_turns, self._read_turns = asyncio.Semaphore(1), asyncio.Semaphore(readers)
        if self.is_sqlite:
            self._writer = _sqlite_engine(url, BEGIN, 1)
            self._reader = _sqlite_engine(url, sqlite_driver.BEGIN, readers)
            self._whole, self._looker = Transactions(_sync_engine(url, BEGIN)), Looker(_sync_engine(url, None))
        else:
            self._writer = create_async_engine(
                url,
                pool_size=readers + 2,
                max_overflow=4,
                pool_pre_ping=True,
                connect_args={"command_timeout": STATEMENT_TIMEOUT},
                hide_parameters=True,
            )
            self._reader = self._writer.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads: one consistent view.

        Raises:
            StoreUnavailable, StoreFull: the database failed.
        """
        async with self._turn(self._read_turns), self._connect(self._reader) as connection:
            yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that commits at the end of the block, and leaves nothing behind when the block raises.

        Raises:
            StoreUnavailable, StoreFull: the database failed; nothing of the block has happened.
        """
        async with self._turn(self._write_turns), self._connect(self._writer) as connection:
            yield connection

    async def write_at_once(self, body: Body[T]) -> T:
        """Do a transaction that writes, for which SQLite takes one way to a thread however many statements it has.

        Args:
            body: what is to be done with a connection; it waits for nothing else, and touches nothing that the event
                loop works on. It commits if this returns, and leaves nothing behind if it raises.

        Raises:
            StoreUnavailable, StoreFull: the database failed; nothing of the body has happened.
        """
        if not self.is_sqlite:
            async with self.write() as connection:
                return await body(connection)
        async with self._turn(self._write_turns):
            with _classified():
                return await self._whole.write(body)

    async def look(self, body: Body[T]) -> T:
        """Read a few rows by a key, in one statement; on SQLite in the event loop itself, where it takes least.

        Args:
            body: executes the statement, and takes all its rows.

        Raises:
            StoreUnavailable, StoreFull: the database failed.
        """
        if self.is_sqlite:
            try:
                return self._looker.look(body)
            except SQLAlchemyError:
                pass  # something is in the way that can be waited for elsewhere, or fails there too
        async with self.read() as connection:
            return await body(connection)

    @asynccontextmanager
    async def _turn(self, turns: asyncio.Semaphore) -> AsyncIterator[None]:
        if not self.is_sqlite:
            yield
            return
        try:
            async with asyncio.timeout(PATIENCE):
                await turns.acquire()
        except TimeoutError as error:
            raise StoreUnavailable("the database is busy: others have been at work for too long") from error
        try:
            yield
        finally:
            turns.release()

    @asynccontextmanager
    async def _connect(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        with _classified():
            async with engine.begin() as connection:
                yield connection

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

        if self.is_sqlite:
            async with self.write() as connection:
                await connection.run_sync(upgrade)
            return
        engine = create_async_engine(self._url, poolclass=sa.pool.NullPool, hide_parameters=True)
        async with self._connect(engine) as connection:
            await connection.run_sync(upgrade)

    async def close(self) -> None:
        """Close all connections."""
        await self._writer.dispose()
        if self.is_sqlite:
            await self._reader.dispose()
            await self._whole.close()
            self._looker.close()


@contextmanager
def _classified() -> Iterator[None]:
    """Raise what the database's failures are to the callers."""
    try:
        yield
    except DBAPIError as error:
        if _is_defect(error):
            raise
        raise classify(error) from error
    except (TimeoutError, OSError, sa.exc.TimeoutError) as error:
        raise StoreUnavailable(str(error)) from error


def _is_defect(error: DBAPIError) -> bool:
    """Whether the statement itself was wrong, which is ours to mend, and not the database's state."""
    return isinstance(error, sa.exc.ProgrammingError | sa.exc.IntegrityError | sa.exc.DataError)


def _sqlite_engine(url: str, begin: str, size: int) -> AsyncEngine:
    writes = begin == BEGIN
    engine = create_async_engine(
        url,
        poolclass=sa.pool.AsyncAdaptedQueuePool,
        pool_size=size,
        max_overflow=0,
        pool_timeout=PATIENCE,
        module=Driver(reads=not writes),
        connect_args={"factory": TurnTaking} if writes else {},
        hide_parameters=True,
    )
    _prepare(engine.sync_engine, begin, POLL_MS if writes else BUSY_TIMEOUT_MS)
    return engine


def _sync_engine(url: str, begin: str | None) -> sa.Engine:
    """An engine without a pool; without a `begin` it only looks, and waits for nothing."""
    factory = {"factory": TurnTaking} if begin is not None else {}
    engine = sa.create_engine(
        sa.make_url(url).set(drivername="sqlite"),
        poolclass=sa.pool.NullPool,
        connect_args={"check_same_thread": False} | factory,
        hide_parameters=True,
    )
    _prepare(engine, begin, POLL_MS if begin is not None else 0)
    return engine


def _prepare(engine: sa.Engine, begin: str | None, patience: int) -> None:
    """See to it that the connections of an engine are set up, and how their transactions begin.

    Args:
        patience: milliseconds that SQLite waits where the database is locked.
    """

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so, below
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS if patience else 0}")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA journal_size_limit=67108864")
        cursor.execute("PRAGMA cache_size=-8192")
        cursor.execute(f"PRAGMA busy_timeout={patience}")
        cursor.close()

    if begin is not None:

        @event.listens_for(engine, "begin")
        def begin_transaction(connection: sa.Connection) -> None:
            connection.exec_driver_sql(begin)


SQLITE_VERSION = sqlite3.sqlite_version_info
if SQLITE_VERSION < (3, 35):  # RETURNING and partial indexes
    raise ImportError(f"batchery needs SQLite 3.35 or later; this Python has {sqlite3.sqlite_version}")
