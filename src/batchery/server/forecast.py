"""When each batch is expected to be done, for every answer that shows one: a look at all running batches, at most once
in `FRESH` seconds, or a tenth of a younger run, however many ask. Only an estimate: nothing is decided by it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.engine.forecast import Group, Pace, Progress, ends, groups
from batchery.store import estimates, workers
from batchery.store.batches import BatchRow
from batchery.store.database import Database
from batchery.store.errors import StoreError

log = structlog.get_logger()

FRESH = 1.0
"""Seconds for which a look will do."""

NEW = 0.1
"""Seconds for which it will do when it does not know of a batch, and at least for which any will."""

BUSY = 0.1
"""The share of the time that may go into looking; where one look takes long, it will do for longer, up to `FRESH`."""

MANY = 100
"""Batches from which on their turns are followed beside the event loop."""

SILENT = 10.0
"""Seconds without a heartbeat after which a worker is not counted on."""

MIN_RATE = 1e-4
"""Requests a second below which the server stands still, and nobody can say when anything will be done."""


class Forecast:
    """Looks at what runs.

    Args:
        database: where.
        clock: Unix seconds.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._paces: dict[str, Pace] = {}  # by group
        self._looked_at = float("-inf")
        self._looks = 0
        self._took = 0.0
        self._running: set[str] = set()
        self._ends: dict[str, float] = {}
        self._looking = asyncio.Lock()

    async def of(self, row: BatchRow) -> int | None:
        """When a batch is expected to be done, Unix seconds; None while that is unknown, and where it has ended.

        Raises:
            StoreError: the database failed.
        """
        return (await self.of_all([row]))[0]

    async def of_committed(self, row: BatchRow) -> int | None:
        """The same for a batch that was just made or changed: None too where the database fails now, since an error
        would say that nothing has happened, and whoever tries again would make another."""
        try:
            return await self.of(row)
        except StoreError as error:
            log.warning("no estimate for a batch that was made or changed", batch=row.id, reason=str(error))
            return None

    async def of_all(self, rows: Sequence[BatchRow]) -> list[int | None]:
        """The same for several."""
        live = [row.id for row in rows if row.status in ("validating", "in_progress")]
        before = self._looks
        if live:
            async with self._looking:
                now = self._clock()
                age, least = now - self._looked_at, max(NEW, min(FRESH, self._took / BUSY))
                youngest = min((pace.measured(now) for pace in self._paces.values()), default=0.0)
                enough = max(least, min(FRESH, youngest / 10))
                if age >= enough or (age >= least and any(id not in self._ends for id in live)):
                    began = time.monotonic()
                    await self._look()
                    self._took = time.monotonic() - began
        # Whoever has had its last result since its row was read does not run any more.
        return [self._shown(row, has_ended=self._looks != before and row.id not in self._running) for row in rows]

    def _shown(self, row: BatchRow, has_ended: bool) -> int | None:
        has_ended = has_ended and row.status in ("validating", "in_progress")
        if row.status == "finalizing" or has_ended:  # the results are there, and their files nearly
            return math.ceil(self._clock())
        if row.status not in ("validating", "in_progress") or row.id not in self._ends:
            return None
        return max(math.ceil(self._ends[row.id]), int(self._clock()))

    async def _look(self) -> None:
        now = self._clock()
        found: dict[str, float] = {}
        async with self._database.read() as connection:
            batches = [Progress(*fields) for fields in await estimates.running(connection)]
            said = await workers.told(connection, now - SILENT)
            lists = [(rate, [frozenset(one.served or ()) for one in upstreams]) for rate, upstreams in said]
            by_name = groups(batches, {served for _, each in lists for served in each})
            self._paces = {name: self._paces.get(name, Pace()) for name in by_name}
            rates = {name: await self._rate(connection, now, name, group, lists) for name, group in by_name.items()}
        self._looked_at = now
        self._looks += 1
        self._running = {batch.id for batch in batches}
        for name, group in by_name.items():
            rate = rates[name]
            if rate is not None and rate >= MIN_RATE:
                many = len(group.batches) > MANY
                seconds = (
                    await asyncio.to_thread(ends, group.batches, rate, now) if many else ends(group.batches, rate, now)
                )
                found |= seconds
        self._ends = {id: now + seconds for id, seconds in found.items()}

    async def _rate(
        self,
        connection: AsyncConnection,
        now: float,
        name: str,
        group: Group,
        lists: Sequence[tuple[float, list[frozenset[str]]]],
    ) -> float | None:
        """Results a second of a group: those that came, or what its workers have done before, or what anybody has."""
        pace, running = self._paces[name], group.batches
        start = pace.begins(running)
        if start is not None:
            pace.observe(now, running, await estimates.done_since(connection, start, group.models))
        else:
            pace.observe(now, running, await estimates.done_of(connection, pace.vanished(running)))
        models = group.models
        before = sum(rate for rate, each in lists if models is None or all(served <= models for served in each))
        return pace.rate(now) or before or (await estimates.recent_rate(connection) if models is None else None)
