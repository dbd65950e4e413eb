"""The worker: the process that plans, sends, records and finishes. Any number of them share the work of one database.

It owns a task for each role and gives them what they need; the roles themselves are in the modules of their names.
When its process ends, by whatever means, everything it has recorded stays, and everything else is still in the plan.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog

from batchery import __version__
from batchery.engine.dispatcher import Dispatcher
from batchery.engine.finaliser import Finaliser
from batchery.engine.planner import SHARD_REQUESTS, Planner
from batchery.engine.reader import Reader
from batchery.engine.reaper import Reaper
from batchery.engine.recorder import Recorder
from batchery.engine.scheduler import Scheduler, shards_wanted
from batchery.engine.work import LeasedShard, Work
from batchery.store import batches, shards, workers
from batchery.store.blobs import BlobStore
from batchery.store.database import Database
from batchery.store.errors import StoreError
from batchery.store.ids import new_id
from batchery.upstreams.base import Upstream

log = structlog.get_logger()

LEASE = 10.0
"""Seconds that a shard stays leased without renewal: how long others wait for a worker that has died."""

BEAT = 2.0
POLL = 0.25
"""Seconds between looks at the database when nobody says that there is something new."""

SILENCE = 2.0
"""Seconds between looks for workers that have died, and for logs that are left."""

OPEN_BYTES = 32 * 1024 * 1024
"""Bytes of request bodies that may be read and not yet recorded."""

STEP_PATIENCE = 5.0
"""Seconds that a role may take to finish its step when the worker stops."""

UNREADABLE = 5.0
"""Seconds before the lines of a shard are read again that could not be read; the others go first."""

PAUSE = 0.5
"""Seconds before a role tries again after the database or the store has failed."""


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker works.

    Attributes:
        max_in_flight: requests at the upstream at once.
        cancel_grace: seconds that requests in flight may take after their batch was cancelled or has expired.
        stop_grace: the same after the worker was asked to stop.
        alone: whether no other worker can be alive on this database.
    """

    max_in_flight: int = 256
    cancel_grace: float = 10.0
    stop_grace: float = 10.0
    alone: bool = False


class Worker:
    """Runs requests until it is stopped.

    Args:
        database: the tables, migrated.
        blobs: the blob store.
        upstream: the inference server.
        settings: how.
    """

    def __init__(self, database: Database, blobs: BlobStore, upstream: Upstream, settings: WorkerSettings) -> None:
        self.id = new_id()
        self._stop = asyncio.Event()
        self._to_beat = asyncio.Event()
        self._to_look = asyncio.Event()
        self._to_plan = asyncio.Event()
        self._to_feed = asyncio.Event()
        self._to_watch = asyncio.Event()
        self._to_finish = asyncio.Event()
        self._to_reap = asyncio.Event()
        self._database = database
        self._settings = settings
        self._reader = Reader(database, blobs)
        self._recorder = Recorder(database, self.id, self._recorded, self._batch_done)
        self._dispatcher = Dispatcher(upstream, self._recorder, settings.max_in_flight, self._to_feed.set, self._settle)
        self._planner = Planner(database, self._reader, self.id, LEASE)
        self._finaliser = Finaliser(database, blobs, self._reader, self.id, LEASE)
        self._host = machine()
        self._reaper = Reaper(database, self._finaliser, self.id, self._host)
        self._scheduler = Scheduler()
        self._shard_size = float(SHARD_REQUESTS)
        self._open_bytes = 0
        self._stopping_since: dict[LeasedShard, float] = {}
        self._no_shards_until = 0.0
        self._overtaken = False  # whether a batch is due sooner than what is leased
        self._stop_grace = settings.stop_grace
        self.ended = asyncio.Event()  # after `abandon`: that everything answered is recorded
        self._abandoned = False
        self._winding_down = False
        self._heart_stops = False  # it beats until the last request has ended, so that no lease lapses before

    def wake(self) -> None:
        """There may be something new: a batch, or a cancellation."""
        self._to_look.set()

    def stop(self) -> None:
        """Ask `run` to end: requests in flight get their grace, and everything that is held is given back."""
        self._stop.set()

    def abandon(self) -> None:
        """Ask `run` to end at once, because the server is gone: only what has been answered is still recorded.

        Nothing is given back; whoever comes next sees that this worker is dead. Tasks may be left, so the process is
        to end.
        """
        self._abandoned = True
        self._stop_grace = 0.0
        self._stop.set()

    async def run(self) -> None:
        """Work until `stop`, then record what is still coming in and give everything back.

        Raises:
            StoreError: the database failed at the very start.
        """
        await self._enter()
        self._dispatcher.start()
        recording = asyncio.create_task(self._recorder.run())
        heart = asyncio.create_task(self._forever(self._beat, self._to_beat, BEAT))
        roles = [
            heart,
            asyncio.create_task(self._forever(self._look, self._to_look, POLL)),
            asyncio.create_task(self._forever(self._plan, self._to_plan, None)),
            asyncio.create_task(self._forever(self._feed, self._to_feed, None)),
            asyncio.create_task(self._forever(self._watch, self._to_watch, POLL)),
            asyncio.create_task(self._forever(self._finish, self._to_finish, None)),
            asyncio.create_task(self._forever(self._reap, self._to_reap, SILENCE)),
        ]
        stopping = asyncio.create_task(self._stop.wait())
        failing = asyncio.create_task(self._dispatcher.failed())
        everything = [*roles, recording, stopping, failing]
        try:
            # All but `stopping` end only by a defect.
            await asyncio.wait([*roles, recording, stopping, failing], return_when=asyncio.FIRST_COMPLETED)
            await self._wind_down(recording, roles)
        finally:
            for task in everything:
                task.cancel()
        if self._abandoned:
            self.ended.set()
            return
        for outcome in await asyncio.gather(*everything, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        await self._leave()

    async def _wind_down(self, recording: asyncio.Task[None], roles: list[asyncio.Task[None]]) -> None:
        """Let requests in flight end, record what they gave, and let each role finish the step that it is at.

        A step is not cancelled while it may be inside a transaction, unless it takes too long.
        """
        self._winding_down = True
        heart, *others = roles
        for event in (self._to_look, self._to_plan, self._to_feed, self._to_watch, self._to_finish, self._to_reap):
            event.set()
        await self._dispatcher.close(self._stop_grace)
        self._recorder.close()
        await asyncio.wait([recording])
        if self._abandoned:
            return
        await asyncio.wait(others, timeout=STEP_PATIENCE)
        self._heart_stops = True
        self._to_beat.set()
        await asyncio.wait([heart], timeout=STEP_PATIENCE)

    async def _enter(self) -> None:
        now = time.time()
        dead = await self._reaper.bury(alone=self._settings.alone)
        async with self._database.write() as connection:
            await workers.insert(
                connection,
                workers.WorkerRow(
                    id=self.id,
                    host=self._host,
                    pid=os.getpid(),
                    version=__version__,
                    started_at=now,
                    heartbeat_at=now,
                ),
            )
        log.info("worker started", worker=self.id, max_in_flight=self._settings.max_in_flight, dead_before=dead)

    async def _leave(self) -> None:
        try:
            async with self._database.write() as connection:
                await shards.release(connection, [self.id])
                await batches.release(connection, [self.id])
                await workers.remove(connection, [self.id])
        except StoreError as error:
            log.warning("leases could not be given back; they lapse by themselves", reason=str(error))
        log.info("worker stopped", worker=self.id)

    async def _forever(self, role: Callable[[], Awaitable[bool]], event: asyncio.Event, pause: float | None) -> None:
        """Play a role: again at once while it finds something to do, else when woken or after a pause."""
        while not (self._heart_stops if role == self._beat else self._winding_down):
            event.clear()
            try:
                again = await role()
            except StoreError as error:
                log.error("the database or the store failed; trying again", role=role.__name__, reason=str(error))
                await asyncio.sleep(PAUSE)
                continue
            if not again and not self._winding_down:
                try:
                    async with asyncio.timeout(pause):
                        await event.wait()
                except TimeoutError:
                    pass

    async def _look(self) -> bool:
        """See what there is to do, and wake whoever does it: one query, however many roles and batches there are."""
        async with self._database.read() as connection:
            demand = await batches.demand(connection, time.time())
        self._no_shards_until = 0.0
        for event, wanted in (
            (self._to_plan, demand.to_plan),
            (self._to_feed, demand.running),
            (self._to_finish, demand.to_finish),
            (self._to_reap, demand.overdue),
            (self._to_watch, len(self._scheduler) > 0),
        ):
            if wanted:
                event.set()
        return False

    async def _plan(self) -> bool:
        planned = await self._planner.plan_one()
        if planned is None:
            return False
        self._no_shards_until = 0.0
        last = self._scheduler.last_deadline()
        self._overtaken = self._overtaken or (last is not None and planned.expires_at < last)
        self._to_feed.set()
        return True

    async def _finish(self) -> bool:
        return await self._finaliser.finish_one()

    async def _reap(self) -> bool:
        if await self._reaper.reap():
            self._to_watch.set()
            self._to_finish.set()
        await self._reaper.drop_old_logs()
        return False

    async def _beat(self) -> bool:
        now = time.time()
        mine = list(self._scheduler)
        ids = [shard.id for shard in mine]
        leases = (self._planner.lease, self._finaliser.lease)
        async with self._database.write() as connection:
            await workers.beat(connection, self.id, now)
            held = await shards.held(connection, self.id, ids)
            await shards.renew(connection, self.id, ids, now + LEASE)
            await batches.renew(connection, self.id, [lease.batch for lease in leases if lease.batch], now + LEASE)
        self._drop_lost({shard for shard in mine if not _holds(held.get(shard.id), shard)} & set(self._scheduler))
        return False

    def _drop_lost(self, lost: set[LeasedShard]) -> None:
        """Stop work on shards whose lease has lapsed: this process stood still for too long, and others have them."""
        for shard in lost:
            shard.stopping = True
            shard.unread.clear()
            self._stopping_since.setdefault(shard, float("-inf"))
        if lost:
            self._dispatcher.stop_shards(lost)
            self._dispatcher.abort(lost)
            self._to_watch.set()

    # Feeding: lease shards, read their lines, offer them to the dispatcher.

    async def _feed(self) -> bool:
        """Offer the dispatcher more requests, if it runs low and there are any."""
        dispatcher = self._dispatcher
        target = 2 * dispatcher.limit
        if (
            dispatcher.ready >= target
            or self._open_bytes >= OPEN_BYTES
            or dispatcher.waiting >= max(1000, 4 * dispatcher.limit)
            or not self._recorder.has_room
        ):
            return False
        await self._lease(target)
        shard = self._scheduler.next(time.monotonic())
        if shard is None:
            return False
        try:
            works = await self._reader.take(shard)
        except StoreError:
            shard.unreadable_until = time.monotonic() + UNREADABLE
            raise
        shard.open += len(works)
        self._open_bytes += sum(len(work.body) for work in works)
        if shard.stopping:
            for work in works:
                self._settle(work)
        else:
            dispatcher.offer(works)
        return True

    async def _lease(self, target: int) -> None:
        wanted = shards_wanted(self._scheduler.unread(), target, self._shard_size)
        if self._overtaken:
            wanted = max(1, wanted)
        if wanted == 0 or time.monotonic() < self._no_shards_until:
            return
        self._overtaken = False
        now = time.time()
        async with self._database.write() as connection:
            rows = await shards.claim(
                connection, self.id, wanted, now, now + LEASE, holding=[shard.id for shard in self._scheduler]
            )
        if len(rows) < wanted:
            # Every request that ends asks for more; the table is asked again when there can be something new.
            self._no_shards_until = time.monotonic() + POLL
        for row in rows:
            shard = LeasedShard(row)
            self._shard_size = 0.7 * self._shard_size + 0.3 * shard.size
            self._scheduler.add(shard)

    # Settling: requests leave in one of two ways, recorded or given up.

    def _recorded(self, works: list[Work]) -> None:
        for work in works:
            self._settle(work)

    def _settle(self, work: Work) -> None:
        shard = work.shard
        shard.open -= 1
        self._open_bytes -= work.size
        if shard.open == 0 and not shard.unread:
            if shard.stopping:
                self._to_watch.set()
            else:
                self._scheduler.remove(shard)
        if self._dispatcher.ready < self._dispatcher.limit:
            self._to_feed.set()

    def _batch_done(self) -> None:
        self._to_finish.set()

    # Watching: a batch that was cancelled or has expired is taken off the upstream.

    async def _watch(self) -> bool:
        """Stop what is no longer to run, break it off after its grace, and give its shards back."""
        running = {shard.batch_id for shard in self._scheduler if not shard.stopping}
        statuses: dict[str, str] = {}
        if running:
            async with self._database.read() as connection:
                statuses = await batches.statuses(connection, sorted(running))
        now = time.monotonic()
        ended_batches = {id for id in running if statuses.get(id) != "in_progress"}
        fresh = {shard for shard in self._scheduler if not shard.stopping and shard.batch_id in ended_batches}
        for shard in fresh:
            shard.stopping = True
            shard.unread.clear()
            self._stopping_since[shard] = now
        if fresh:
            self._dispatcher.stop_shards(fresh)
        grace = self._settings.cancel_grace
        late = {shard for shard, since in self._stopping_since.items() if shard.open and now - since >= grace}
        if late:
            self._dispatcher.abort(late)
        ended = [shard for shard in self._stopping_since if not shard.open]
        if ended:
            async with self._database.write() as connection:
                await shards.release_some(connection, self.id, [shard.id for shard in ended])
            for shard in ended:
                del self._stopping_since[shard]
                self._scheduler.remove(shard)
            self._to_finish.set()
        return False


def _holds(row: shards.Held | None, shard: LeasedShard) -> bool:
    return row is not None and row.epoch == shard.epoch


def machine() -> str:
    """What process ids are to be read against: this machine's name, and on Linux its namespace of processes, since
    containers may share a name."""
    try:
        return f"{platform.node()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return platform.node()
