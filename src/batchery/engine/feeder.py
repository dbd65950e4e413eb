"""The feeder: leases shards, reads their lines, offers them to the pool, and lets go of what is to run no more.

It is the only one that knows what of a worker's shards is where. It must never read more than is soon to be sent, nor
give a shard back of which something is still in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

from batchery.engine.copies import Copies
from batchery.engine.fleet import Fleet
from batchery.engine.planner import SHARD_REQUESTS
from batchery.engine.pool import AHEAD, Pool
from batchery.engine.reader import PIECE_REQUESTS, Reader
from batchery.engine.recorder import Recorder
from batchery.engine.scheduler import Scheduler, held_back
from batchery.engine.work import LeasedShard, Work
from batchery.store import batches, shards
from batchery.store.database import Database
from batchery.store.errors import StoreError

OPEN_BYTES, MOST_OPEN_BYTES = 32 * 1024 * 1024, 256 * 1024 * 1024
"""Bytes of request bodies that may be read and not yet recorded. Beyond the first nothing is read ahead, but what can
be sent at once: requests with images, of a megabyte each, would else leave most of an upstream idle."""

SOON = 0.25
"""Seconds before which shards should not have to be leased again: where they do, more are leased at a time."""

MOST_AHEAD = 8
"""Times as many requests are leased ahead as where they take long, at most."""

UNREADABLE = 5.0
"""Seconds before the lines of a shard are read again that could not be read; the others go first."""


class Feeder:
    """Feeds the upstreams of one worker.

    Args:
        database: the tables.
        reader: for the lines.
        worker: the worker's id, who leases.
        lease: seconds for which it does.
        fleet: says what is for other workers.
        to_feed, to_watch, to_finish: set when there may be something to do in that role.

    Attributes:
        scheduler: the shards that are leased, and what is next.
        open_bytes: of request bodies that are read and not yet recorded.
    """

    _pool: Pool
    _recorder: Recorder
    _copies: Copies

    def __init__(
        self,
        database: Database,
        reader: Reader,
        worker: str,
        lease: float,
        fleet: Fleet,
        to_feed: asyncio.Event,
        to_watch: asyncio.Event,
        to_finish: asyncio.Event,
    ) -> None:
        self.scheduler = Scheduler()
        self.open_bytes = 0
        self._database = database
        self._reader = reader
        self._worker = worker
        self._lease_seconds = lease
        self._fleet = fleet
        self._to_feed = to_feed
        self._to_watch = to_watch
        self._to_finish = to_finish
        self._shard_size = float(SHARD_REQUESTS)
        self._ahead = 1
        self._leased_at = 0.0
        self._stopping_since: dict[LeasedShard, float] = {}
        self._left: list[Work] = []  # requests that were sent, and are for other workers

    def attach(self, pool: Pool, recorder: Recorder, copies: Copies) -> None:
        """Say who sends, records and copies; they in turn call `settle` and `recorded`."""
        self._pool, self._recorder, self._copies = pool, recorder, copies

    async def feed(self) -> bool:
        """Offer the pool more requests, if an upstream runs low and there are any for it."""
        pool, scheduler = self._pool, self.scheduler
        self._leave_to_others()
        self._make_way()
        if self._has_enough():
            return False
        held = held_back(pool.waiting_of, pool.limit, full=pool.waiting_bytes >= OPEN_BYTES)
        full = self._fleet.elsewhere
        if not pool.is_single:
            full = full | pool.full(scheduler.models(), ahead=self._may_read_ahead)
        again = await self._lease(AHEAD * pool.limit, held, full)
        read = 0
        # Of small shards several, or each of them would take the transaction of a lease.
        while read < PIECE_REQUESTS and not (read and self._has_enough()):
            shard = scheduler.next(time.time(), time.monotonic(), held, full)
            if shard is None:
                break
            read += await self._read(shard)
        return again or read > 0

    def _has_enough(self) -> bool:
        """Whether nothing more is to be read for now."""
        pool = self._pool
        return (
            pool.is_fed
            or not (self._may_read_ahead or (pool.has_free_slots and self._open_unless_waiting < MOST_OPEN_BYTES))
            or not self._recorder.has_room
            or self._copies.is_full
        )

    @property
    def _open_unless_waiting(self) -> int:
        """Bytes of request bodies that are open, but for those that wait for another try."""
        return self.open_bytes - self._pool.waiting_bytes

    @property
    def _may_read_ahead(self) -> bool:
        """Whether more may be read than can be sent at once."""
        return self._open_unless_waiting < OPEN_BYTES

    async def _read(self, shard: LeasedShard) -> int:
        """Offer the pool a shard's next requests; how many there are."""
        pool = self._pool
        try:
            works = await self._reader.take(shard, alike=self.scheduler.has_choice, keyed=not pool.is_single)
        except StoreError:
            shard.unreadable_until = time.monotonic() + UNREADABLE
            raise
        shard.open += len(works)
        if shard.copies is not None:
            shard.open += sum(len(work.copies) for work in works)
        self.open_bytes += sum(len(work.body) for work in works)
        if shard.stopping:
            for work in works:
                self.settle(work)
        else:
            pool.offer(works)
        return len(works)

    async def _lease(self, target: int, held: set[str], full: Collection[str] = ()) -> bool:
        """Lease more shards, if fewer requests are at hand than there should be; none for models that are full, or for
        other workers.

        Returns:
            Whether none came, because of such models: there may be others behind those.
        """
        now = time.time()
        wanted = self.scheduler.wanted(self._ahead * target, now, size=self._shard_size, held_back=held, full=full)
        if not wanted:
            return False
        # Each time costs a transaction, whose time the requests must not be waited for.
        passed, self._leased_at = time.monotonic() - self._leased_at, time.monotonic()
        if passed < SOON and sum(item.size for item in wanted.values()) >= target:
            self._ahead = min(2 * self._ahead, MOST_AHEAD)
        elif passed > 4 * SOON:
            self._ahead = max(1, self._ahead // 2)
        leased: list[LeasedShard] = []
        try:
            counts = {batch: item.shards for batch, item in wanted.items()}
            holding = [shard.id for shard in self.scheduler if shard.batch_id in counts]
            until = now + self._lease_seconds
            without = full if full and self.scheduler.is_mixed(wanted) else ()
            rows = await self._database.write_at_once(
                lambda connection: shards.claim(
                    connection, self._worker, counts, now, until, holding=holding, without=without
                )
            )
            leased = [LeasedShard(row) for row in rows]  # only now: what cannot be committed is not leased
        finally:
            self.scheduler.leased(wanted, leased, full, now)
        await self._reader.note_prefixes(leased)
        for shard in leased:
            self._shard_size = 0.7 * self._shard_size + 0.3 * shard.size
        return bool(full) and not leased

    def _make_way(self) -> None:
        """Give back what is unsent of shards that would keep something more urgent waiting."""
        overtaken = set(self.scheduler.overtaken(time.time(), self._fleet.elsewhere))
        if not overtaken:
            return
        for shard in overtaken:
            shard.returning = True
        for work in self._pool.withdraw(overtaken, unsent=True):
            work.shard.unread.append((work.place, work.request))
        for shard in overtaken:
            self.scheduler.given_back(shard, len(shard.unread))
        self._to_watch.set()

    # What is for other workers.

    def leaves(self, work: Work, refused: bool) -> bool:
        """Take back a request that has failed at the upstream, if it is for another worker.

        Args:
            refused: whether it has failed because there is no such model.
        """
        if work.shard.stopping or not self._fleet.leaves(work.shard.model, refused=refused):
            return False
        work.body = b""
        self._left.append(work)  # not at once: its shard may be being read
        self._to_feed.set()
        return True

    def _leave_to_others(self) -> None:
        """Give back the shards that are for other workers, but for what is in flight of them."""
        elsewhere = self._fleet.elsewhere
        if not (elsewhere or self._left):
            return
        left, self._left = self._left, []
        known = {shard for shard in self.scheduler if shard.stopping or shard.returning}
        leaving = {shard for shard in self.scheduler if shard.model in elsewhere} | {work.shard for work in left}
        leaving -= known
        for shard in leaving:
            shard.returning = True
        for work in (*left, *self._pool.stop_shards(leaving)):
            if not work.shard.stopping:
                work.shard.unread.append((work.place, work.request))
        for shard in leaving:
            self.scheduler.given_back(shard, len(shard.unread))
        for work in left:
            if work.shard in known and work.shard.returning:
                self.scheduler.given_back(work.shard, 1)
            self.settle(work)
        if leaving:
            self._to_watch.set()

    # Settling: requests leave in one of two ways, recorded or given up.

    def recorded(self, works: list[Work]) -> None:
        """These have their results on disk."""
        # Only with the last of a shard's there may be something to do.
        lasts = {work.shard: work for work in works}
        for work in works:
            if work is not lasts[work.shard]:
                work.shard.open -= 1 + len(work.copies)
                self.open_bytes -= work.size
        for work in lasts.values():
            self.settle(work)

    def settle(self, work: Work) -> None:
        """A request is recorded, or given up."""
        shard = work.shard
        shard.open -= 1 + len(work.copies)
        self.open_bytes -= work.size
        if shard.open == 0 and (shard.returning or not shard.unread):
            if shard.stopping or shard.returning:
                self._to_watch.set()
            else:
                self.scheduler.remove(shard)
        if self._pool.is_hungry:
            self._to_feed.set()

    # Watching: a batch that was cancelled or has expired is taken off the upstream.

    async def watch(self, grace: float) -> bool:
        """Stop what is no longer to run, break it off after its grace, and give its shards back.

        Args:
            grace: seconds that what is in flight may take.
        """
        running = {shard.batch_id for shard in self.scheduler if not shard.stopping}
        statuses: dict[str, str] = {}
        if running:
            async with self._database.read() as connection:
                statuses = await batches.statuses(connection, sorted(running))
        now = time.monotonic()
        ended_batches = {id for id in running if statuses.get(id) != "in_progress"}
        fresh = {shard for shard in self.scheduler if not shard.stopping and shard.batch_id in ended_batches}
        for shard in fresh:
            shard.stopping = True
            shard.unread.clear()
            self._stopping_since[shard] = now
        if fresh:
            self._pool.stop_shards(fresh)
        late = {shard for shard, since in self._stopping_since.items() if shard.open and now - since >= grace}
        if late:
            self._pool.abort(late)
        ended = [shard for shard in self.scheduler if (shard.stopping or shard.returning) and not shard.open]
        if ended:
            async with self._database.write() as connection:
                await shards.release_some(connection, self._worker, [shard.id for shard in ended])
            for shard in ended:
                self._stopping_since.pop(shard, None)
                self.scheduler.remove(shard)
            self._to_finish.set()
            self._to_feed.set()
        return False

    def drop_lost(self, lost: set[LeasedShard]) -> None:
        """Stop work on shards whose lease has lapsed: this process stood still for too long, and others have them."""
        for shard in lost:
            shard.stopping = True
            shard.unread.clear()
            self._stopping_since.setdefault(shard, float("-inf"))
        if lost:
            self._pool.stop_shards(lost)
            self._pool.abort(lost)
            self._to_watch.set()
