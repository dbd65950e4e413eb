"""SQLite in one call: a whole transaction that writes, in a thread; or a look at a few rows, in the event loop itself.

What is asked for is a coroutine over a connection, as for any other transaction, so the queries are the same. But here
it never waits: each statement is done when it has been asked for. So it can be run to its end from wherever we are.
Between the statements of a transaction nobody has to be woken, which costs several times what a statement does.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.sqlite_driver import Thread

T = TypeVar("T")
Body = Callable[[AsyncConnection], Coroutine[Any, Any, T]]
"""What is to be done in a transaction. It waits for nothing but the connection that it is given and, as it may run in a
thread, touches nothing that the event loop works on."""


class _AtOnce:
    """What a body is given as its connection."""

    __slots__ = ("_connection",)

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    @property
    def dialect(self) -> sa.Dialect:
        """Which SQL is spoken."""
        return self._connection.dialect

    async def execute(self, statement: Any, parameters: Any = None) -> sa.CursorResult[Any]:
        """Execute a statement, now."""
        return self._connection.execute(statement, parameters)


def run(body: Body[T], connection: sa.Connection) -> T:
    """Run a body to its end, here and now.

    Raises:
        RuntimeError: it waits for something else than its connection, which is a defect.
    """
    coroutine = body(cast(AsyncConnection, _AtOnce(connection)))
    try:
        coroutine.send(None)
    except StopIteration as done:
        return cast(T, done.value)
    coroutine.close()
    raise RuntimeError("a transaction that is to be done at once waits for something else than the database")


class Transactions:
    """Does whole transactions in a thread of its own, each in one call; the caller sees to it that there is one at a
    time.

    Args:
        engine: its transactions begin as they must; it has no pool, and its connections may change threads.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._thread: Thread | None = None

    async def write(self, body: Body[T]) -> T:
        """Do a transaction; it commits if the body returns. A task that is cancelled ends once the transaction has.

        Raises:
            SQLAlchemyError: the database failed.
        """
        if self._thread is None:
            thread = Thread(self._engine.connect)
            await thread
            self._thread = thread
        done: T = await self._thread.call(partial(_transact, body))
        return done

    async def close(self) -> None:
        """Close the connection, and end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await thread.close()


def _transact(body: Body[T], connection: sa.Connection) -> T:
    try:
        with connection.begin():
            return run(body, connection)
    except SQLAlchemyError:
        connection.invalidate()  # whatever state it is in: the next transaction opens it anew
        raise


class Looker:
    """Looks at rows in the event loop: only for what is found by a key, and never more than a few rows.

    That is some tens of microseconds, less than it takes to wake a thread. It never waits for a lock: readers need none
    from writers, and in the rare case that one is in the way, the look fails at once.

    Args:
        engine: its connections begin no transaction, so that each statement sees what is committed; it has no pool.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._connection: sa.Connection | None = None

    def look(self, body: Body[T]) -> T:
        """Run a body of one statement, whose rows it must take all.

        Raises:
            DBAPIError: it failed, and is to be tried in the ordinary way.
        """
        if self._connection is None:
            self._connection = self._engine.connect()
        try:
            return run(body, self._connection)
        except SQLAlchemyError:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; the next look opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(SQLAlchemyError):
                connection.close()
