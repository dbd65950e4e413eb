"""The worker: the process that plans, sends, records and finishes. Any number of them share the work of one database.

It owns a task for each role and gives them what they need; the roles themselves are in the modules of their names.
When its process ends, by whatever means, everything it has recorded stays, and everything else is still in the plan.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from batchery import __version__
from batchery.engine.copies import Copies
from batchery.engine.egress import Network
from batchery.engine.feeder import Feeder
from batchery.engine.finaliser import Finaliser
from batchery.engine.fleet import Fleet
from batchery.engine.planner import Planner
from batchery.engine.pool import Destination, Pool
from batchery.engine.reader import Reader
from batchery.engine.reaper import Reaper
from batchery.engine.recorder import Recorder
from batchery.engine.retention import Retention
from batchery.engine.small_batches import SmallBatches, is_small
from batchery.engine.throughput import Throughput
from batchery.engine.webhooks import Deliverer
from batchery.engine.work import LeasedShard, Result
from batchery.engine.yielding import LOOK
from batchery.store import agenda, batch_sums, batches, shards, workers
from batchery.store.batches import BatchRow
from batchery.store.blobs import BlobStore
from batchery.store.database import Database
from batchery.store.errors import StoreError
from batchery.store.ids import new_id

log = structlog.get_logger()

LEASE = 10.0
"""Seconds that a shard stays leased without renewal: how long others wait for a worker that has died."""

BEAT = 2.0
POLL = 0.25
"""Seconds between looks at the database when nobody says that there is something new."""

WAKING = 0.03
"""Seconds after being woken before everything else is looked at than what waits to be planned."""

LOOK_SPACING = 0.25
PLAN_SPACING = 0.1
FINISH_SPACING = 0.15
TELL_SPACING = 0.25
"""Seconds between steps of these roles at least, however often they are woken: where batches come one after the other,
some are planned at a time, and looking at all of them is not done for each."""

TELL = 1.0
"""Seconds between looks for webhooks to send, while no batch ends here."""

SILENCE = 2.0
"""Seconds between looks for workers that have died, and for logs that are left."""

SURVEY = 15.0
"""Seconds between looks at which upstream serves what."""

SURVEY_AGAIN = 2.0
"""The same while one has not been there yet."""

LOGGED = 20
"""Models of others that the log names at most."""

RETENTION = 60.0
"""Seconds between looks for what has expired or was deleted."""

STEP_PATIENCE = 5.0
"""Seconds that a role may take to finish its step when the worker stops."""

FINISHING = 4
"""Batches that are finished at a time: most of it is waiting for disks."""

PAUSE = 0.5
"""Seconds before a role tries again after the database or the store has failed."""


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker works.

    Attributes:
        cancel_grace: seconds that requests in flight may take after their batch was cancelled or has expired.
        stop_grace: the same after the worker was asked to stop.
        alone: whether no other worker can be alive on this database.
        webhook_networks: networks that webhooks may go to although they are not the public internet's.
    """

    cancel_grace: float = 10.0
    stop_grace: float = 10.0
    alone: bool = False
    webhook_networks: tuple[Network, ...] = ()


class Worker:
    """Runs requests until it is stopped.

    Args:
        database: the tables, migrated.
        blobs: the blob store.
        destinations: the inference servers; at least one.
        settings: how.
    """

    def __init__(
        self, database: Database, blobs: BlobStore, destinations: Sequence[Destination], settings: WorkerSettings
    ) -> None:
        self.id = new_id()
        self._stop = asyncio.Event()
        self._to_beat = asyncio.Event()
        self._to_look = asyncio.Event()
        self._to_plan = asyncio.Event()
        self._to_feed = asyncio.Event()
        self._to_watch = asyncio.Event()
        self._to_finish = asyncio.Event()
        self._to_finish_taken = asyncio.Event()
        self._to_reap = asyncio.Event()
        self._to_retain = asyncio.Event()
        self._to_tell = asyncio.Event()
        self._to_yield = asyncio.Event()
        self._to_survey = asyncio.Event()
        self._waking: asyncio.TimerHandle | None = None
        self._database = database
        self._settings = settings
        self._reader = Reader(database, blobs)
        self._fleet = Fleet(self.id, alone=settings.alone)
        self._feeder = Feeder(
            database, self._reader, self.id, LEASE, self._fleet, self._to_feed, self._to_watch, self._to_finish
        )
        self._recorder = Recorder(
            database, self.id, LEASE, self._feeder.recorded, self._batch_done, self._copied, self._places
        )
        self._copies = Copies(self._reader, self._recorder, self._feeder.settle)
        self._pool = Pool(destinations, self._recorder, self._to_feed.set, self._feeder.settle, self._feeder.leaves)
        self._feeder.attach(self._pool, self._recorder, self._copies)
        self._planner = Planner(database, self._reader, self.id, LEASE)
        self._finaliser = Finaliser(database, blobs, self._reader, self.id, LEASE)
        self._small_batches = SmallBatches(database, blobs, self._reader, self._finaliser.leases, self.id, LEASE)
        self._host = machine()
        self._started_at = time.time()
        self._reaper = Reaper(database, self._finaliser, self._fleet, self.id, self._host)
        self._retention = Retention(database, blobs)
        self._deliverer = Deliverer(database, settings.webhook_networks, self._to_tell.set)
        self._scheduler = self._feeder.scheduler
        self._throughput = Throughput(time.monotonic())
        self._stop_grace = settings.stop_grace
        self.ended = asyncio.Event()  # after `abandon`: that everything answered is recorded
        self._finishing: set[asyncio.Task[None]] = set()
        self._defect: asyncio.Future[None]
        self._abandoned = False
        self._winding_down = False
        self._heart_stops = False  # it beats until the last request has ended, so that no lease lapses before

    def wake(self) -> None:
        """There may be something new: a batch, or a cancellation, or one that failed at once."""
        self._to_plan.set()  # most often it is a new batch, which then waits for nothing else
        if self._waking is None:
            self._waking = asyncio.get_running_loop().call_later(WAKING, self._look_and_tell)

    def _look_and_tell(self) -> None:
        self._waking = None
        self._to_look.set()
        self._to_tell.set()

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
        if not self._pool.is_single:
            await self._survey()  # it says which upstream a request goes to
        recording = asyncio.create_task(self._recorder.run())
        copying = asyncio.create_task(self._copies.run())
        heart = asyncio.create_task(self._forever(self._beat, self._to_beat, BEAT))
        roles = [
            heart,
            asyncio.create_task(self._forever(self._look, self._to_look, POLL, LOOK_SPACING)),
            asyncio.create_task(self._forever(self._plan, self._to_plan, None, PLAN_SPACING)),
            asyncio.create_task(self._forever(self._feeder.feed, self._to_feed, None)),
            asyncio.create_task(self._forever(self._watch, self._to_watch, POLL)),
            asyncio.create_task(self._forever(self._finish, self._to_finish, None, FINISH_SPACING)),
            asyncio.create_task(self._forever(self._finish_taken, self._to_finish_taken, None, FINISH_SPACING)),
            asyncio.create_task(self._forever(self._reap, self._to_reap, SILENCE)),
            asyncio.create_task(self._forever(self._retain, self._to_retain, RETENTION)),
            asyncio.create_task(self._forever(self._tell, self._to_tell, TELL, TELL_SPACING)),
        ]
        roles += [
            asyncio.create_task(self._forever(lane.yielding.look, self._to_yield, LOOK))
            for lane in self._pool.lanes
            if lane.yielding is not None
        ]
        surveying = asyncio.create_task(self._forever(self._survey, self._to_survey, SURVEY))
        stopping = asyncio.create_task(self._stop.wait())
        failing = asyncio.create_task(self._pool.failed())
        self._defect = asyncio.get_running_loop().create_future()
        everything: list[asyncio.Future[Any]] = [*roles, surveying, recording, copying, stopping, failing, self._defect]
        try:
            # All but `stopping` end only by a defect.
            await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
            await self._wind_down(recording, copying, roles)
        finally:
            for task in (*everything, *self._finishing):
                task.cancel()
        if self._abandoned:
            self.ended.set()
            return
        for outcome in await asyncio.gather(*everything, *self._finishing, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        await self._leave()

    async def _wind_down(
        self, recording: asyncio.Task[None], copying: asyncio.Task[None], roles: list[asyncio.Task[None]]
    ) -> None:
        """Let requests in flight end, record what they gave, and let each role finish the step that it is at.

        A step is not cancelled while it may be inside a transaction, unless it takes too long.
        """
        self._winding_down = True
        heart, *others = roles
        for event in (
            self._to_look,
            self._to_plan,
            self._to_feed,
            self._to_watch,
            self._to_finish,
            self._to_finish_taken,
            self._to_reap,
            self._to_retain,
            self._to_tell,
            self._to_yield,
            self._to_survey,
        ):
            event.set()
        await self._pool.close(self._stop_grace)
        self._copies.close()
        await asyncio.wait([copying], timeout=0 if self._abandoned else STEP_PATIENCE)
        copying.cancel()  # what it has not got to is still in the plan
        self._recorder.close()
        await asyncio.wait([recording])
        if self._abandoned:
            return
        await asyncio.wait([*others, *self._finishing], timeout=STEP_PATIENCE)
        await self._deliverer.close(STEP_PATIENCE)
        self._heart_stops = True
        self._to_beat.set()
        await asyncio.wait([heart], timeout=STEP_PATIENCE)

    async def _enter(self) -> None:
        dead = await self._reaper.bury(alone=self._settings.alone)
        async with self._database.write() as connection:
            await workers.insert(connection, self._row(time.time()))
        log.info(
            "worker started",
            worker=self.id,
            upstreams=[lane.name for lane in self._pool.lanes],
            max_in_flight=[lane.max_in_flight or "adaptive" for lane in self._pool.lanes],
            dead_before=dead,
        )

    def _row(self, now: float) -> workers.WorkerRow:
        return workers.WorkerRow(
            id=self.id,
            host=self._host,
            pid=os.getpid(),
            version=__version__,
            started_at=self._started_at,
            heartbeat_at=now,
        )

    async def _leave(self) -> None:
        try:
            async with self._database.write() as connection:
                await shards.release(connection, [self.id])
                await batches.release(connection, [self.id])
                await workers.remove(connection, [self.id])
        except StoreError as error:
            log.warning("leases could not be given back; they lapse by themselves", reason=str(error))
        log.info("worker stopped", worker=self.id)

    async def _forever(
        self, role: Callable[[], Awaitable[bool]], event: asyncio.Event, pause: float | None, spacing: float = 0.0
    ) -> None:
        """Play a role: again at once while it finds something to do, else when woken or after a pause.

        Args:
            role: does a step, and says whether there may be more to do.
            event: wakes it.
            pause: seconds after which it is played unwoken; None for never.
            spacing: seconds between the beginnings of two steps at least, so that what comes meanwhile is done in one.
        """
        while not (self._heart_stops if role == self._beat else self._winding_down):
            event.clear()
            began = time.monotonic()
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
            left = spacing - (time.monotonic() - began)
            if left > 0 and not self._winding_down:
                await asyncio.sleep(left)

    async def _look(self) -> bool:
        """See what there is to do, and wake whoever does it: two queries, however many roles and batches there are."""
        async with self._database.read() as connection:
            demand = await batch_sums.demand(connection, time.time())
            if demand.running:
                self._scheduler.update(await agenda.running(connection))
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
        planned = await self._planner.plan_some()
        for row in planned:
            left = row.total - row.completed - row.invalid
            self._scheduler.planned(agenda.Running(row.id, row.owner, 1.0, row.expires_at, left, row.model))
        if planned:
            self._to_feed.set()
        return bool(planned)

    async def _finish(self) -> bool:
        """Begin to finish all small batches that are ready, and one other, beside those that are being finished: a
        large one holds up no other, nor do small ones that keep coming."""
        if len(self._finishing) >= FINISHING:
            return False  # one that has been finished asks again
        small = await self._small_batches.claim()
        if small:
            self._begin(self._small_batches.finish(small))
        row = await self._finaliser.claim() if len(self._finishing) < FINISHING else None
        if row is not None:
            self._begin(self._finaliser.finish(row))
        return bool(small) or row is not None

    async def _finish_taken(self) -> bool:
        """Begin to finish small batches that were taken when their last results were recorded."""
        if len(self._finishing) >= FINISHING:
            return False
        small = self._small_batches.next()
        if small:
            self._begin(self._small_batches.finish(small))
        return bool(small)

    def _places(self) -> int:
        """Batches that may be begun to be finished."""
        return 0 if self._winding_down else max(0, FINISHING - len(self._finishing))

    def _batch_done(self, taken: list[BatchRow], left: bool) -> None:
        small = [row for row in taken if is_small(row)]
        for row in taken:
            if row not in small:
                self._begin(self._finaliser.finish(row))
        if small:
            self._small_batches.add(small)
            self._to_finish_taken.set()
        if left:
            self._to_finish.set()

    def _begin(self, finish: Coroutine[Any, Any, None]) -> None:
        finishing = asyncio.create_task(finish)
        self._finishing.add(finishing)
        finishing.add_done_callback(self._finished)

    def _finished(self, finishing: asyncio.Task[None]) -> None:
        if len(self._finishing) >= FINISHING:
            self._to_finish.set()  # there may be more that waited for a place
            self._to_finish_taken.set()
        self._finishing.discard(finishing)
        if not finishing.cancelled() and (error := finishing.exception()) is not None:
            if isinstance(error, StoreError):
                log.error("the database or the store failed; trying again", role="_finish", reason=str(error))
            elif not self._defect.done():
                self._defect.set_exception(error)
        self._to_tell.set()

    async def _tell(self) -> bool:
        return await self._deliverer.deliver_some()

    async def _reap(self) -> bool:
        before = self._fleet.elsewhere
        if await self._reaper.reap():
            self._to_watch.set()
            self._to_finish.set()
        if self._fleet.elsewhere != before:
            log.info("other workers serve models", left_to_them=sorted(self._fleet.elsewhere)[:LOGGED])
            self._to_feed.set()
        await self._reaper.drop_old_logs()
        return False

    async def _retain(self) -> bool:
        return await self._retention.sweep(time.time())

    async def _beat(self) -> bool:
        now = time.time()
        mine = list(self._scheduler)
        ids = [shard.id for shard in mine]
        at_work = [*self._planner.leases.batches, *self._finaliser.leases.batches]
        rate = self._throughput.observe(self._recorder.count, has_work=bool(mine), now=time.monotonic())
        async with self._database.write() as connection:
            if not await workers.beat(connection, self.id, now, rate, self._snapshot()):
                await workers.insert(connection, self._row(now))  # it was silent for so long that others removed it
            held = await shards.held(connection, self.id, ids)
            await shards.renew(connection, self.id, ids, now + LEASE)
            await batches.renew(connection, self.id, at_work, now + LEASE)
        self._feeder.drop_lost(
            {shard for shard in mine if not _holds(held.get(shard.id), shard)} & set(self._scheduler)
        )
        return False

    def _snapshot(self) -> workers.Snapshot:
        recorder = self._recorder
        return workers.Snapshot(
            ready=self._pool.ready,
            waiting=self._pool.waiting,
            upstreams=self._pool.snapshots(),
            commit_seconds=recorder.seconds.distribution(),
            commit_results=recorder.sizes.distribution(),
        )

    async def _survey(self) -> bool:
        """Ask the upstreams what they serve, and let the other workers know. Nothing waits for it."""
        pool = self._pool
        if await pool.survey():
            self._fleet.serves(pool.listed, takes_any=pool.takes_any)
            self._to_beat.set()
            self._to_feed.set()
        if not pool.is_surveyed:
            asyncio.get_running_loop().call_later(SURVEY_AGAIN, self._to_survey.set)
        return False

    async def _watch(self) -> bool:
        return await self._feeder.watch(self._settings.cancel_grace)

    def _copied(self, result: Result) -> None:
        self._copies.add(result)


def _holds(row: shards.Held | None, shard: LeasedShard) -> bool:
    return row is not None and row.epoch == shard.epoch


def machine() -> str:
    """What process ids are to be read against: this machine's name, and on Linux its namespace of processes, since
    containers may share a name."""
    try:
        return f"{platform.node()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return platform.node()
