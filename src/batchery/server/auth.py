"""Who sends a request: the keys, held in memory, and the guard in front of every route of the API.

The keyring is read again when a request finds it older than `MAX_AGE`, and never used beyond that: a key that was
revoked is refused from then on, and a server that was open is closed. There is one reading at a time, whoever waits for
it. A well-formed key that is not in the ring may have been made a moment ago, so it forces a reading too, but not more
often than every `MIN_PAUSE`: invented keys cost the database a few small queries a second, however many there are.

When the ring is too old and cannot be read, nobody is let in: the answer is 503, never a guess.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from batchery.server.context import Caller
from batchery.store import api_keys
from batchery.store.api_keys import KeyRow
from batchery.store.database import Database
from batchery.store.errors import StoreUnavailable
from batchery.wire.errors import Unauthorized

MAX_AGE = 2.0
"""Seconds for which the keys are used without looking whether they still hold."""

MIN_PAUSE = 0.25
"""Seconds between two readings that unknown keys forced."""

PATIENCE = 5.0
"""Seconds after which a database that has not answered is out of reach."""

_BEARER = re.compile(r"bearer[ \t]+([^ \t]+)", re.IGNORECASE | re.ASCII)
_NOBODY: tuple[str, None] = ("0" * 64, None)


def unauthorized() -> Unauthorized:
    """The one answer to a missing, a malformed, an unknown and a revoked key: it must not tell which."""
    return Unauthorized(
        "This server needs a valid API key: send the header 'Authorization: Bearer sk-...' with a key that was made "
        "by 'batchery keys create' and is not revoked."
    )


class Keyring:
    """The keys that are let in.

    Args:
        database: where they are.
        may_be_open: whether anybody is let in as long as no key was ever made.
        clock: seconds that never go back.
    """

    def __init__(self, database: Database, *, may_be_open: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._may_be_open = may_be_open
        self._clock = clock
        self._callers: dict[str, tuple[str, Caller]] = {}
        self._open = False
        self._read_at = float("-inf")
        self._tried_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def caller(self, headers: Sequence[str]) -> Caller:
        """Who sends a request.

        Args:
            headers: its `Authorization` headers.

        Raises:
            Unauthorized: nobody who is known.
            StoreUnavailable, StoreFull: the keys cannot be read.
        """
        came = self._clock()
        if came - self._read_at > MAX_AGE:
            await self._read_since(came - MAX_AGE)
        if self._open:
            return Caller(owner=api_keys.LOCAL_OWNER)
        key = _key(headers)
        found = self._find(key)
        if found is None and api_keys.FORM.fullmatch(key):
            await self._look_again(came)
            found = self._find(key)
        if found is None:
            raise unauthorized()
        return found

    def _find(self, key: str) -> Caller | None:
        wanted = api_keys.digest(key)
        known, caller = self._callers.get(wanted, _NOBODY)
        return caller if hmac.compare_digest(known, wanted) else None

    async def _look_again(self, came: float) -> None:
        """Read the keys as they are after `came`, when a key is not among those that are known."""
        pause = self._tried_at + MIN_PAUSE - self._clock()
        if pause > 0 and self._tried_at < came:
            await asyncio.sleep(pause)
        await self._read_since(came)

    async def _read_since(self, moment: float) -> None:
        """Make sure that the keys are as they were at `moment`, or later."""
        while self._read_at < moment:
            if self._reading is None:
                self._reading = asyncio.create_task(self._read())
                self._reading.add_done_callback(_seen)
            reading = self._reading
            # The reading is nobody's own: whoever gives up leaves it to the others.
            await asyncio.wait({reading}, timeout=PATIENCE)
            if not reading.done():
                raise StoreUnavailable(f"the API keys could not be read within {PATIENCE:g} seconds")
            reading.result()

    async def _read(self) -> None:
        self._tried_at = began = self._clock()
        try:
            async with asyncio.timeout(PATIENCE), self._database.read() as connection:
                rows = await api_keys.active(connection)
                made = bool(rows) or not self._may_be_open or await api_keys.were_made(connection)
            self._callers = {row.hash: (row.hash, _caller(row)) for row in rows}
            self._open = not made
            self._read_at = began
        except TimeoutError:  # it would keep the next reading, over another connection, from being begun
            raise StoreUnavailable(f"the API keys could not be read within {PATIENCE:g} seconds") from None
        finally:
            self._reading = None


def _seen(reading: asyncio.Task[None]) -> None:
    """Its failure has been looked at, also when everybody who waited for it has gone away."""
    if not reading.cancelled():
        reading.exception()


def _key(headers: Sequence[str]) -> str:
    """The key that a request brings; one that nobody can have when there is none, or there are several."""
    match = _BEARER.fullmatch(headers[0].strip(" \t")) if len(headers) == 1 else None
    return match[1] if match is not None else ""


def _caller(row: KeyRow) -> Caller:
    return Caller(
        owner=row.owner,
        key=row.id,
        max_queued_requests=row.max_queued_requests,
        max_live_batches=row.max_live_batches,
        max_upload_bytes=row.max_upload_bytes,
        webhook_url=row.webhook_url,
        webhook_secret=row.webhook_secret,
    )


async def require_key(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """The guard: finds out who sends a request, before anything of its body is read.

    Raises:
        Unauthorized: nobody who is known.
    """
    keyring: Keyring = connection.app.state.keyring
    connection.scope["state"]["caller"] = await keyring.caller(connection.headers.getall("authorization", []))
