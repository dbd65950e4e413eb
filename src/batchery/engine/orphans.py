"""The sweep of orphans: removes blobs that nothing refers to, which crashes have left in the store.

It must never take what somebody still writes or what somebody else has put there. So it looks only at keys of our own
shape, only at what was last written before a moment that no write in progress can reach back to, and only in a store
that has carried this database's mark since before that moment: else a database that was pointed at another's bucket by
mistake would sweep away all of its files.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from batchery.store import identity, references
from batchery.store.blobs import KINDS, BlobStore
from batchery.store.database import Database
from batchery.store.errors import StoreError

log = structlog.get_logger()

MARK = "batchery-database"
"""The object in a store that says whose it is."""

AGE = 86_400.0
"""Seconds since its last write after which a blob without a reference is one that nobody will refer to."""

EVERY = 86_400.0
"""Seconds between sweeps."""

REMOVED_AT_ONCE = 100
PAUSE = 0.1
"""Seconds after each lot that was listed or removed, so that a sweep is never felt."""


class Orphans:
    """Sweeps one store.

    Args:
        database: the tables.
        blobs: the store.
        alone: whether no other process can write to this store, because this one holds the data folder's lock; then it
            needs no mark, but must not have another database's.
        pause: seconds, as `PAUSE`.
    """

    def __init__(self, database: Database, blobs: BlobStore, *, alone: bool, pause: float = PAUSE) -> None:
        self._database = database
        self._blobs = blobs
        self._alone = alone
        self._pause = pause

    async def run(self, started: float, clock: Callable[[], float] = time.time) -> None:
        """Sweep now and every day, until cancelled. What goes wrong is logged, and tried again at the next time.

        Args:
            started: when this process did, in Unix seconds. Alone on a store, nobody is still writing what is older.
            clock: Unix seconds.
        """
        before = started if self._alone else clock() - AGE
        while True:
            try:
                removed = await self.sweep(before)
            except (StoreError, OSError) as error:
                log.warning("blobs that nothing refers to could not be swept", reason=str(error))
            else:
                if removed:
                    log.info("blobs that nothing refers to were swept", blobs=removed)
            await asyncio.sleep(EVERY)
            before = clock() - AGE

    async def sweep(self, before: float) -> int:
        """Remove every blob without a reference that was last written before a moment.

        Args:
            before: Unix seconds; whoever wrote a blob before has long made or given up the reference to it.

        Returns:
            How many there were.

        Raises:
            StoreError, OSError: the database or the store failed; the next sweep goes on.
        """
        if not await self._is_ours(before):
            return 0
        removed = 0
        for kind in KINDS:
            async with self._database.read() as connection:
                wanted = await references.blobs(connection, kind)
            async for keys in self._blobs.older_than(before, kind):
                orphans = [key for key in keys if key not in wanted]
                for start in range(0, len(orphans), REMOVED_AT_ONCE):
                    await self._blobs.remove(orphans[start : start + REMOVED_AT_ONCE])
                    await asyncio.sleep(self._pause)
                removed += len(orphans)
                await asyncio.sleep(self._pause)
        return removed

    async def _is_ours(self, before: float) -> bool:
        async with self._database.write() as connection:
            ours = await identity.get(connection)
        mark = await self._blobs.peek(MARK)
        if mark is None and self._alone:
            return True
        if mark is None:
            await self._blobs.put_new(MARK, ours.encode())
            mark = await self._blobs.peek(MARK)
        if mark is None or mark.content == ours.encode():
            return mark is not None and mark.written_at < before
        log.warning(
            "the store belongs to another database, so blobs that nothing refers to are not swept; give each database "
            "a store or a prefix of its own, or delete the mark if the other database is gone",
            mark=MARK,
        )
        return False
