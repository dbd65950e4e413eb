"""A worker's database, which may not be there yet when the worker starts: a server brings it up to date."""

from __future__ import annotations

import asyncio
import time

import structlog

from batchery.store.database import REVISION, Database
from batchery.store.errors import StoreError

PAUSE = 1.0
"""Seconds between looks."""

REMINDER = 30.0
"""Seconds after which a reason to wait is told again."""

log = structlog.get_logger()


class NewerDatabaseError(Exception):
    """The database is of a later version than this code; the message says so, and what to do."""


async def wait_for_database(database: Database, stop: asyncio.Event) -> bool:
    """Wait until a database can be used: containers are started in any order, and a server is upgraded beside workers.

    Args:
        database: which.
        stop: set to end the wait.

    Returns:
        Whether it can be used; false when `stop` was set before.

    Raises:
        NewerDatabaseError: waiting would not help.
    """
    said, said_at, waited = "", 0.0, False
    while not stop.is_set():
        obstacle = await _obstacle(database)
        if obstacle is None:
            if waited:
                log.info("the database is there")
            return True
        now = time.monotonic()
        if obstacle != said or now - said_at > REMINDER:
            log.warning("waiting for the database", reason=obstacle)
            said, said_at, waited = obstacle, now, True
        try:
            async with asyncio.timeout(PAUSE):
                await stop.wait()
        except TimeoutError:
            pass
    return False


async def _obstacle(database: Database) -> str | None:
    """Why the database cannot be used just now."""
    try:
        await database.ping()
        found = await database.revision()
    except StoreError as error:
        return f"it does not answer: {str(error).partition(chr(10))[0]}"
    if found is None:
        return "it has no tables yet; batchery serve, started with the same database, makes them"
    if found < REVISION:
        return "it is of an earlier version; batchery serve of this version brings it up to date when it starts"
    if found > REVISION:
        raise NewerDatabaseError(
            f"the database is of a later version (at {found}, this worker knows {REVISION}); "
            "upgrade batchery here to the version of the server"
        )
    return None
