"""Waiting for batches to change, for any number of requests at the price of one small query every `INTERVAL`.

Workers are other processes, perhaps on other machines, so a change is only seen by looking. Requests that wait join the
hub; as long as there are any, a task looks at all watched batches together, and wakes those whose batch has changed.
No waiting request holds a connection to the database, and a watch remembers the latest state only, so that a slow
reader costs no memory. The interval is also what keeps a client from asking for every group commit of a busy batch: no
answer that waits for a change comes sooner than the next look.

A database that fails is looked at again until it answers; those who wait learn of it once that has taken `PATIENCE`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import structlog

from batchery.server.auth import Keyring
from batchery.server.context import AnyRequest
from batchery.store import batches
from batchery.store.batches import BatchRow, Progress
from batchery.store.database import Database
from batchery.store.errors import StoreError, StoreUnavailable

INTERVAL = 0.25
"""Seconds between two looks."""

BUSY = 0.1
"""The share of the time that may go into looking; where one look takes long, the next is later."""

RETRY = 1.0
"""Seconds until the next look after one that failed."""

PATIENCE = 10.0
"""Seconds that one look may take, and for which looks may fail before those who wait learn of it."""

CHUNK = 1_000
"""Batches in one statement."""

MAX_WATCHES = 8_192
"""How many requests may wait at a time: half of the connections, so that there is always room for the others."""

log = structlog.get_logger()


class Watch:
    """One request's look at a batch.

    Args:
        row: the batch as the request has read it, before it joined.

    Attributes:
        row: the batch as last seen; None once it has been deleted.
    """

    def __init__(self, row: BatchRow) -> None:
        self.row: BatchRow | None = row
        self._seen = batches.progress_of(row)
        self._woken = asyncio.Event()

    async def changed(self, timeout: float) -> bool:
        """Wait until the batch has changed since the last call, the hub has trouble, or the server stops.

        Args:
            timeout: seconds after which the wait ends all the same.

        Returns:
            Whether there was a reason other than the timeout.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._woken.wait()
        except TimeoutError:
            return False
        self._woken.clear()
        return True

    def wake(self) -> None:
        """End the wait."""
        self._woken.set()

    def needs_row(self, now: Progress) -> bool:
        """Whether more has changed than what `Progress` has: a status comes with its stamps and errors."""
        seen = self._seen
        return now is not seen and (now.status, now.expires_at, now.error_file) != (
            seen.status,
            seen.expires_at,
            seen.error_file,
        )

    def take(self, now: Progress | None, row: BatchRow | None) -> None:
        """Take what a look has found.

        Args:
            now: the batch's progress; None if it is gone.
            row: all of it, if any watch needs that.
        """
        if now is None:
            self.row = None
            self.wake()
        elif self.row is not None and now != self._seen:
            self._seen = now
            self.row = row or msgspec.structs.replace(self.row, **msgspec.structs.asdict(now))
            self.wake()


class Hub:
    """Looks at batches for those who wait.

    Args:
        database: where.
        stopping: set when the server is told to stop; every wait ends then.

    Attributes:
        trouble: why the latest look failed; None when it did not.
    """

    def __init__(self, database: Database, stopping: asyncio.Event) -> None:
        self._database = database
        self._stopping = stopping
        self._watches: dict[str, set[Watch]] = {}
        self._count = 0
        self._task: asyncio.Task[None] | None = None
        self._sleeping = False
        self._looking = asyncio.Lock()
        self._failing_since = 0.0
        self.trouble: Exception | None = None

    @property
    def stopping(self) -> bool:
        """Whether the server has been told to stop."""
        return self._stopping.is_set()

    @property
    def is_full(self) -> bool:
        """Whether as many wait as may."""
        return self._count >= MAX_WATCHES

    @property
    def watching(self) -> int:
        """How many wait."""
        return self._count

    @asynccontextmanager
    async def watch(self, row: BatchRow) -> AsyncIterator[Watch]:
        """Watch a batch for the length of a block.

        Args:
            row: the batch as the caller has just read it.
        """
        watch = Watch(row)
        self._watches.setdefault(row.id, set()).add(watch)
        self._count += 1
        if self.stopping:
            watch.wake()
        elif self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            yield watch
        finally:
            await self._leave(row.id, watch)

    async def _leave(self, id: str, watch: Watch) -> None:
        self._count -= 1
        self._watches[id].discard(watch)
        if not self._watches[id]:
            del self._watches[id]
        if self._watches or self._task is None:
            return
        if self._sleeping:
            self._task.cancel()
            self._task = None
        else:
            async with self._looking:  # whoever leaves last sees to it that the database is let go of
                pass

    async def _run(self) -> None:
        pause = INTERVAL
        while self._watches and not self.stopping:
            await self._sleep(pause)
            if not self._watches or self.stopping:
                break
            began = time.monotonic()
            async with self._looking:
                await self._try_to_look()
            took = time.monotonic() - began
            pause = max(INTERVAL, took / BUSY) if self.trouble is None else RETRY
        self._wake_all()

    async def _sleep(self, seconds: float) -> None:
        self._sleeping = True
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._stopping.wait()
        finally:
            self._sleeping = False

    async def _try_to_look(self) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE):
                await self._look()
        except TimeoutError:
            self._failed(StoreUnavailable(f"the database has not answered for {PATIENCE:g} s"), began)
        except Exception as error:  # given to those who wait; the task must outlive it
            self._failed(error, began)
        else:
            if self.trouble is not None:
                log.info("batches are watched again")
            self.trouble = None

    def _failed(self, error: Exception, began: float) -> None:
        if self.trouble is None:
            self._failing_since = began
            defect = None if isinstance(error, StoreError) else error
            log.error("batches cannot be watched just now", waiting=self._count, cause=str(error), exc_info=defect)
        self.trouble = error
        if time.monotonic() - self._failing_since >= PATIENCE:
            self._wake_all()

    async def _look(self) -> None:
        # Those who join from here on have read their batch later than this look does.
        watched = {id: tuple(watches) for id, watches in self._watches.items()}
        ids = list(watched)
        rows: dict[str, BatchRow] = {}
        found: dict[str, Progress] = {}
        async with self._database.read() as connection:
            for some in _chunks(ids):
                found |= await batches.progress(connection, some)
            whole = [id for id, now in found.items() if any(watch.needs_row(now) for watch in watched[id])]
            for some in _chunks(whole):
                rows |= await batches.get_many(connection, some)
        for id, watches in watched.items():
            for watch in watches:
                watch.take(found.get(id), rows.get(id))

    def _wake_all(self) -> None:
        for watches in self._watches.values():
            for watch in watches:
                watch.wake()


def _chunks(ids: Sequence[str]) -> list[Sequence[str]]:
    return [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]


async def gone(receive: Any) -> None:
    """Wait until the client goes away.

    Args:
        receive: the request's; what still comes of a body is thrown away.
    """
    while (await receive())["type"] != "http.disconnect":
        pass


async def check_key(request: AnyRequest) -> None:
    """Make sure that a request may still be answered after it has waited.

    Raises:
        Unauthorized: its key has been revoked meanwhile.
        StoreUnavailable, StoreFull: the keys cannot be read.
    """
    keyring: Keyring = request.app.state.keyring
    await keyring.caller(request.headers.getall("authorization", []))


def hub_of(request: AnyRequest) -> Hub:
    """The hub of the app that this request came to."""
    hub: Hub = request.app.state.hub
    return hub
