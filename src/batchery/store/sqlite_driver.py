"""The SQLite driver: aiosqlite's thread for each connection, with fewer ways to it.

aiosqlite goes to its thread and back for each call: to make a cursor, to execute, to fetch, to close. Each way wakes
two threads that want the interpreter, and together they cost ten times what the statement does. Here a statement with
all its rows is one call; a transaction that only reads begins with its first statement, and ends without the thread.

A task that is cancelled ends after its call has, not before: SQLAlchemy goes on to close the connection or to hand it
to others, and must not do so while its thread is at work for somebody who has gone.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Self

import aiosqlite
import msgspec
from sqlalchemy.connectors.asyncio import AsyncAdapt_dbapi_cursor
from sqlalchemy.dialects.sqlite.aiosqlite import AsyncAdapt_aiosqlite_connection, AsyncAdapt_aiosqlite_dbapi
from sqlalchemy.util import EMPTY_DICT, await_only

BEGIN = "BEGIN"
"""Begins a transaction that only reads."""


class _Done(msgspec.Struct):
    """What is left of a cursor once it has executed its statement: what SQLAlchemy asks it for."""

    description: Any = None
    rowcount: int = -1
    lastrowid: int | None = None
    arraysize: int = 1

    def close(self) -> None:
        """It is closed already."""


class _Cursor(AsyncAdapt_dbapi_cursor):
    __slots__ = ()

    _awaitable_cursor_close = False

    def __init__(self, connection: Connection) -> None:
        self._adapt_connection: Any = connection
        self._connection = connection._connection
        self._cursor: Any = _Done()
        self._soft_closed_memoized = EMPTY_DICT
        self._rows: deque[Any] = deque()

    async def _execute_async(self, operation: Any, parameters: Any) -> None:
        connection: Connection = self._adapt_connection
        if operation == BEGIN:
            connection.is_to_begin = True
            return
        begins, connection.is_to_begin = connection.is_to_begin, False
        driver = self._connection._conn
        self._cursor, self._rows = await connection.call(_execute, driver, begins, operation, parameters or ())

    async def _executemany_async(self, operation: Any, seq_of_parameters: Any) -> None:
        connection: Connection = self._adapt_connection
        driver = self._connection._conn
        self._cursor = await connection.call(_execute_many, driver, operation, seq_of_parameters)


def _execute(
    driver: sqlite3.Connection, begins: bool, operation: str, parameters: Sequence[Any]
) -> tuple[_Done, deque[Any]]:
    cursor = driver.cursor()
    try:
        if begins:
            cursor.execute(BEGIN)
        cursor.execute(operation, parameters)
        rows = deque(cursor.fetchall()) if cursor.description else deque()
        return _Done(cursor.description, cursor.rowcount, cursor.lastrowid), rows
    finally:
        cursor.close()


def _execute_many(driver: sqlite3.Connection, operation: str, parameters: Iterable[Sequence[Any]]) -> _Done:
    cursor = driver.cursor()
    try:
        cursor.executemany(operation, parameters)
        return _Done(cursor.description, cursor.rowcount, cursor.lastrowid)
    finally:
        cursor.close()


class Thread(aiosqlite.Connection):
    """A connection's thread. What it is called for is waited for to its end, also by a task that is cancelled.

    Args:
        connector: makes the connection, there; anything that has a `close`.
    """

    def __init__(self, connector: Callable[[], Any]) -> None:
        super().__init__(connector, iter_chunk_size=64)
        self._thread.daemon = True

    async def call(self, function: Callable[[Any], Any]) -> Any:
        """Call a function there with the connection.

        Raises:
            asyncio.CancelledError: this task was cancelled meanwhile; the function has ended all the same.
        """
        return await self._execute(lambda: function(self._connection))

    async def _execute(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function there.

        Raises:
            asyncio.CancelledError: this task was cancelled meanwhile, once or several times.
        """
        if not self._running or self._connection is None:
            raise ValueError("the connection is closed")
        return await self._ended(partial(fn, *args, **kwargs))

    async def _connect(self) -> Self:
        """Open it, or leave nothing open."""
        try:
            self._connection = await self._ended(self._connector)
        except BaseException:
            stopped = self.stop()
            if stopped is not None:
                await asyncio.wait((stopped,))
            raise
        return self

    async def _ended(self, function: Callable[[], Any]) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._tx.put_nowait((future, function))
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait((future,))
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            future.exception()  # so that nobody is told that it was never looked at
            raise cancelled
        return future.result()


class Connection(AsyncAdapt_aiosqlite_connection):
    """A connection.

    Attributes:
        is_to_begin: whether its next statement begins a transaction that only reads.
    """

    __slots__ = ("is_to_begin", "reads")

    _cursor_cls = _Cursor  # type: ignore[assignment]

    def __init__(self, dbapi: Any, connection: Any, reads: bool) -> None:
        super().__init__(dbapi, connection)
        self.reads = reads
        self.is_to_begin = False

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the thread."""
        async with self._execute_mutex:
            return await self._connection._execute(function, *arguments)

    def commit(self) -> None:
        """Commit; where nothing was written there is no disk to wait for."""
        if not self._ends_here():
            super().commit()

    def rollback(self) -> None:
        """Roll back what is begun."""
        if not self._ends_here():
            super().rollback()

    def _ends_here(self) -> bool:
        """End a transaction without the thread, which is at rest, if that does not wait for anything."""
        self.is_to_begin = False
        driver: sqlite3.Connection | None = self._connection._connection
        if driver is None:
            return False
        if driver.in_transaction:
            if not self.reads:
                return False
            driver.rollback()
        return True


class Driver(AsyncAdapt_aiosqlite_dbapi):
    """The driver, to be given to SQLAlchemy as `module`.

    Args:
        reads: whether its connections only read.
    """

    def __init__(self, *, reads: bool) -> None:
        super().__init__(aiosqlite, sqlite3)
        self.reads = reads

    def connect(self, *arguments: Any, **options: Any) -> Connection:
        """A new connection, which may be used by its thread and by the event loop's, one at a time."""
        connection = Thread(partial(sqlite3.connect, *arguments, **options))
        return Connection(self, await_only(connection), self.reads)
