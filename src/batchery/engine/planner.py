"""The planner: cuts a batch over an indexed file into shards, without looking at a line.

A shard holds requests for one model, in the order in which they go out. There are as many shards as keep each a few
hundred requests, so that planning a million costs some thousand rows, and small enough that several workers share one
batch.
"""

from __future__ import annotations

import time

import structlog

from batchery.engine import lifecycle
from batchery.engine.lease import BatchLease
from batchery.engine.reader import Reader
from batchery.store import batches, shards
from batchery.store.batches import BatchRow
from batchery.store.database import Database
from batchery.wire.validation import FileIndex

log = structlog.get_logger()

SHARD_REQUESTS = 256
MAX_SHARDS = 2_048


def shard_size(requests: int) -> int:
    """Requests in each shard of a batch with so many."""
    return max(SHARD_REQUESTS, -(-requests // MAX_SHARDS))


def cut(index: FileIndex) -> list[tuple[str, bytes]]:
    """The plan of a batch: for each shard the model and its packed requests (unsigned 32 bit), in file order.

    Shards of different models alternate, so that a file sorted by model keeps all of its upstreams busy.
    """
    size = shard_size(len(index))
    queues = [
        [(model, requests[start : start + size].tobytes()) for start in range(0, len(requests), size)]
        for model, requests in zip(index.models, index.by_model, strict=True)
    ]
    longest = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


class Planner:
    """Plans batches for one worker.

    Args:
        database: the tables.
        reader: for the indexes of input files.
        worker: its id.
        seconds: that a batch stays ours without renewal.

    Attributes:
        lease: on the batch that is being planned.
    """

    def __init__(self, database: Database, reader: Reader, worker: str, seconds: float) -> None:
        self._database = database
        self._reader = reader
        self._worker = worker
        self._seconds = seconds
        self.lease = BatchLease(database, worker)

    async def plan_one(self) -> BatchRow | None:
        """Plan one batch that waits for it: its shards and its new status appear together.

        Returns:
            The batch as it was; None when there was none.

        Raises:
            StoreError: it could not be planned now, and will be tried again.
        """
        now = time.time()
        async with self._database.write() as connection:
            row = await batches.claim(connection, self._worker, ("validating",), now, now + self._seconds)
        if row is None:
            return None
        async with self.lease.held(row.id):
            await self._plan(row)
        return row

    async def _plan(self, row: BatchRow) -> None:
        plan = cut(await self._reader.index(row.id))
        async with self._database.write() as connection:
            changes = lifecycle.planned(int(time.time())) | {"lease_owner": None, "lease_until": None}
            if await batches.change(connection, row.id, expect="validating", changes=changes):
                await shards.insert(connection, row.id, row.expires_at, plan)
            else:  # cancelled or expired in between
                await batches.change_many(connection, [{"id": row.id, "lease_owner": None, "lease_until": None}])
        log.info("batch planned", batch=row.id, requests=row.total, shards=len(plan))
