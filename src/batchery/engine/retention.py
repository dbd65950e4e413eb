"""Retention: takes away what is over, so that nothing piles up.

Files that have expired, batches that their owners deleted, remembered idempotency keys, uploads that were never
completed, webhooks that were told: each goes some rows at a time, so that no transaction is long, with a rest after
each, so that others get their turn. A blob is noted dead in the transaction that takes the last reference to it away,
and deleted from the store some time later; a crash between any two steps leaves the rest to the next sweep, of this
worker or another. Any number of workers may sweep at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store import batches, dead_blobs, files, idempotency, uploads, webhooks
from batchery.store.blobs import BlobStore
from batchery.store.database import Database
from batchery.store.errors import StoreError

log = structlog.get_logger()

GRACE = 60.0
"""Seconds between the end of the last reference to a blob and its deletion, so that a download that runs can end."""

FILES_AT_ONCE = 50
BATCHES_AT_ONCE = 20
ROWS_AT_ONCE = 200
BLOBS_AT_ONCE = 100

REST = 0.01
"""Least seconds between two transactions that have changed something; otherwise as long as the first took."""


class Retention:
    """Sweeps for one worker.

    Args:
        database: the tables.
        blobs: the store.
        grace: seconds, as `GRACE`.
    """

    def __init__(self, database: Database, blobs: BlobStore, *, grace: float = GRACE) -> None:
        self._database = database
        self._blobs = blobs
        self._grace = grace
        self._steps = (self._files, self._batches, self._keys, self._uploads, self._webhooks, self._dead_blobs)
        self._unfinished: list[Callable[[float], Awaitable[bool]]] = []

    async def sweep(self, now: float) -> bool:
        """Take away some of each of what is over, or only of that of which the call before has found some.

        Args:
            now: Unix seconds.

        Returns:
            Whether there may be more: a look at everything has found something.

        Raises:
            StoreError: the database failed.
        """
        steps = self._unfinished or self._steps
        self._unfinished = [step for step in steps if await step(now)]
        return bool(self._unfinished) or steps is not self._steps

    async def _some(self, do: Callable[[AsyncConnection], Awaitable[int]]) -> int:
        began = time.monotonic()
        async with self._database.write() as connection:
            count = await do(connection)
        if count:
            await asyncio.sleep(max(REST, time.monotonic() - began))
        return count

    async def _files(self, now: float) -> bool:
        async def expire(connection: AsyncConnection) -> int:
            gone = await files.delete_expired(connection, now, FILES_AT_ONCE)
            await idempotency.forget(connection, *gone.ids)
            return len(gone.ids)

        count = await self._some(expire)
        if count:
            log.info("files have expired", files=count)
        return count > 0

    async def _batches(self, now: float) -> bool:
        async def drop(connection: AsyncConnection) -> int:
            dropped = await batches.delete_ended(connection, BATCHES_AT_ONCE)
            await dead_blobs.note(connection, dropped.values(), now)
            for batch in dropped:
                await files.delete_empty(connection, batch, now)
            return len(dropped)

        return await self._some(drop) > 0

    async def _keys(self, now: float) -> bool:
        return await self._some(lambda connection: idempotency.sweep(connection, int(now), ROWS_AT_ONCE)) > 0

    async def _uploads(self, now: float) -> bool:
        return await self._some(lambda connection: uploads.sweep(connection, int(now), ROWS_AT_ONCE)) > 0

    async def _webhooks(self, now: float) -> bool:
        return await self._some(lambda connection: webhooks.sweep(connection, now)) > 0

    async def _dead_blobs(self, now: float) -> bool:
        keys: list[str] = []

        async def claim(connection: AsyncConnection) -> int:
            keys.extend(await dead_blobs.claim(connection, now, self._grace, BLOBS_AT_ONCE))
            return len(keys)

        async def forget(connection: AsyncConnection) -> int:
            await dead_blobs.forget(connection, keys)
            return len(keys)

        if not await self._some(claim):
            return False
        try:
            await self._blobs.delete(keys)
        except StoreError as error:
            log.warning("blobs could not be deleted; trying again later", blobs=len(keys), reason=str(error))
            return False
        return await self._some(forget) > 0
