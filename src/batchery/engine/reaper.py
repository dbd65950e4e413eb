"""The reaper: looks after what nobody is looking after.

It ends batches whose window has passed, gives back what dead workers held, and drops what a crash left of logs that
are no longer needed.
"""

from __future__ import annotations

import os
import time

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.engine import lifecycle
from batchery.engine.finaliser import Finaliser
from batchery.engine.fleet import Fleet
from batchery.store import batches, shards, workers
from batchery.store.database import Database
from batchery.store.workers import WorkerRow

log = structlog.get_logger()

GONE_AFTER = 60.0
"""Seconds without a heartbeat after which a worker's row is removed; its leases have lapsed long before."""


class Reaper:
    """Cleans up for one worker.

    Args:
        database: the tables.
        finaliser: drops logs.
        fleet: is shown every worker that there is.
        worker: its id.
        host: this machine, as `machine` in `worker` names it.
    """

    def __init__(self, database: Database, finaliser: Finaliser, fleet: Fleet, worker: str, host: str) -> None:
        self._database = database
        self._finaliser = finaliser
        self._fleet = fleet
        self._worker = worker
        self._host = host

    async def bury(self, *, alone: bool) -> int:
        """Give back at once what the dead workers of this machine held.

        Args:
            alone: whether no other worker can exist, because this process holds the data folder's lock; then
                whatever is leased was leased by a dead one.

        Returns:
            How many workers were dead.

        Raises:
            StoreError: the database failed.
        """
        now = time.time()
        async with self._database.write() as connection:
            found = await workers.all_workers(connection)
            dead = [
                worker.id for worker in found if (alone and worker.id != self._worker) or self._is_dead(worker, now)
            ]
            await _give_back(connection, dead)
        if not alone:
            self._fleet.look(found, now)
        return len(dead)

    async def reap(self) -> bool:
        """End the batches whose window has passed, and give back what dead workers held.

        A worker is dead when its process on this machine is gone, or when it has been silent for long.

        Returns:
            Whether a batch's window had passed.

        Raises:
            StoreError: the database failed.
        """
        now = time.time()
        async with self._database.read() as connection:
            overdue = await batches.overdue(connection, now)
            found = await workers.all_workers(connection)
        self._fleet.look(found, now)
        dead = [worker.id for worker in found if self._is_dead(worker, now)]
        if not overdue and not dead:
            return False
        async with self._database.write() as connection:
            for row in overdue:
                change = lifecycle.window_ended(row.status, expires_at=row.expires_at, now=now)
                if change is not None and await batches.change(connection, row.id, expect=row.status, changes=change):
                    log.info("batch's window has ended", batch=row.id, completed=row.completed, total=row.total)
            await _give_back(connection, dead)
        return bool(overdue)

    def _is_dead(self, worker: WorkerRow, now: float) -> bool:
        if worker.id == self._worker:
            return False
        return worker.heartbeat_at < now - GONE_AFTER or (worker.host == self._host and not _is_alive(worker.pid))

    async def drop_old_logs(self) -> None:
        """Drop the logs of ended batches that a crash has left.

        Raises:
            StoreError: the database failed.
        """
        async with self._database.read() as connection:
            left = await batches.ended_with_log(connection)
        for batch in left:
            await self._finaliser.drop_log(batch)


async def _give_back(connection: AsyncConnection, dead: list[str]) -> None:
    if dead:
        await shards.release(connection, dead)
        await batches.release(connection, dead)
        await workers.remove(connection, dead)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
