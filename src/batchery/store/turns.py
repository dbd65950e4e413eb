"""Turns at writing, for the processes that share an SQLite database.

SQLite lets one connection write at a time, and whoever finds it taken looks again after sleeps that grow to 100 ms.
Beside a process that writes all the time, that may be never. So whoever wants to write takes the turn first, a lock on
a file beside the database, and gives it on once it writes: while one writes the next one waits with the turn, and the
first has to queue behind it for its next transaction.

Waiting for the turn and for the database is one call in a connection's own thread, and the turn is given on before it
returns. So no task that is cancelled, and no process that is killed, can keep it.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

BEGIN = "BEGIN IMMEDIATE"

PATIENCE = 15.0
"""Seconds to wait at most."""

POLL = 0.001
"""Seconds between looks for whether the turn is free; only where three want to write is it ever taken for long."""

POLL_MS = 1
"""Milliseconds between looks for whether the database is free, to be set as `busy_timeout`."""


class TurnTaking(sqlite3.Connection):
    """A connection whose cursors wait for their turn wherever they are told to `BEGIN`."""

    def __init__(self, database: str, *arguments: Any, **options: Any) -> None:
        super().__init__(database, *arguments, **options)
        self.turn = os.open(f"{database}-turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def cursor(self, *_: Any) -> sqlite3.Cursor:  # type: ignore[override]
        """A cursor that takes turns."""
        return super().cursor(_Cursor)

    def close(self) -> None:
        """Close it."""
        if self.turn >= 0:
            os.close(self.turn)
            self.turn = -1
        super().close()


class _Cursor(sqlite3.Cursor):
    def execute(self, sql: str, parameters: Any = (), /) -> Self:
        """As the base class's, but for `BEGIN`.

        Raises:
            sqlite3.OperationalError: others write for longer than anybody should have to.
        """
        if sql != BEGIN:
            return super().execute(sql, parameters)
        deadline = time.monotonic() + PATIENCE
        assert isinstance(self.connection, TurnTaking)
        with _taken(self.connection.turn, deadline):
            while True:
                try:
                    return super().execute(sql)
                except sqlite3.OperationalError as error:
                    if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                        raise


@contextmanager
def _taken(turn: int, deadline: float) -> Iterator[None]:
    """Hold the turn; past the deadline go on without, since whoever stands still with it need not be writing."""
    while True:
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                break
            time.sleep(POLL)
    try:
        yield
    finally:
        fcntl.flock(turn, fcntl.LOCK_UN)
