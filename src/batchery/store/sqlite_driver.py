"""The SQLite driver: aiosqlite with one trip to its thread for each statement, where it makes four.

A trip costs two wake-ups and two fights for Python's lock, some ten times what a short statement itself takes. Here a
statement is run, its rows are fetched and its cursor is closed in one; `BEGIN` goes along with the first statement, and
there is no trip for a rollback where there is nothing to roll back. SQLAlchemy, which fetches all rows at once anyway,
sees no difference.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import aiosqlite

_Outcome = tuple[list[Any], Any, int, int | None]
"""Rows, description, number of rows changed, last row id."""


class Connection(aiosqlite.Connection):
    """A connection whose cursors make one trip for each statement.

    Attributes:
        begin: a statement to run before the next one; None once that has happened.
    """

    begin: str | None = None

    def cursor(self) -> Any:
        """A cursor; making it costs nothing."""
        return _Cursor(self)

    async def commit(self) -> None:
        """Commit, if there is anything to."""
        await self._end("COMMIT")

    async def rollback(self) -> None:
        """Roll back, if there is anything to."""
        await self._end("ROLLBACK")

    async def _end(self, statement: str) -> None:
        self.begin = None
        if self._conn.in_transaction:
            await self._trip(self._conn.execute, statement)

    async def run(self, many: bool, sql: str, parameters: Sequence[Any]) -> _Outcome:
        """Run a statement, after `begin`."""
        begin, self.begin = self.begin, None
        outcome: _Outcome = await self._trip(_run, self._conn, begin, many, sql, parameters)
        return outcome

    async def _trip(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the connection's thread."""
        return await self._execute(function, *arguments)  # type: ignore[no-untyped-call]


def _run(
    connection: sqlite3.Connection, begin: str | None, many: bool, sql: str, parameters: Sequence[Any]
) -> _Outcome:
    """What is done in the connection's thread."""
    if begin is not None:
        connection.execute(begin)
    cursor = connection.cursor()
    try:
        (cursor.executemany if many else cursor.execute)(sql, parameters)
        description = cursor.description
        rows = [] if description is None else cursor.fetchall()
        return rows, description, cursor.rowcount, cursor.lastrowid
    finally:
        cursor.close()


class _Cursor:
    """A statement's outcome, with what SQLAlchemy asks of a cursor."""

    __slots__ = ("_connection", "_rows", "arraysize", "description", "lastrowid", "rowcount")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rows: list[Any] = []
        self.arraysize = 1
        self.description: Any = None
        self.lastrowid: int | None = None
        self.rowcount = -1

    async def __aenter__(self) -> Self:
        return self

    async def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Self:
        self._take(await self._connection.run(False, sql, parameters))
        return self

    async def executemany(self, sql: str, parameters: Sequence[Any]) -> Self:
        self._take(await self._connection.run(True, sql, parameters))
        return self

    def _take(self, outcome: _Outcome) -> None:
        self._rows, self.description, self.rowcount, self.lastrowid = outcome

    async def fetchall(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return rows

    async def close(self) -> None:
        self._rows = []


def connect(*arguments: Any, **options: Any) -> Connection:
    """A connection to be opened, from what `sqlite3.connect` takes."""
    opener: Callable[[], sqlite3.Connection] = partial(sqlite3.connect, *arguments, **options)
    connection = Connection(opener, iter_chunk_size=64)
    connection._thread.daemon = True  # a program that is left without closing it must be able to end
    return connection
