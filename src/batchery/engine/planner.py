"""The planner: cuts a batch over an indexed file into shards, without looking at a line.

A shard holds requests for one model, in the order in which they go out. There are as many shards as keep each a few
hundred requests, so that planning a million costs some thousand rows, and small enough that several workers share one
batch. A retried batch is planned again, over what has no good answer. Bad lines that are to be passed over get their
error lines first, a piece at a time: what a crash leaves of them is gone on from. Only where duplicates are to be sent
once are the lines looked at after all.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Sequence
from itertools import accumulate

import structlog

from batchery.engine import lifecycle
from batchery.engine.duplicates import Finder, regroup
from batchery.engine.lease import BatchLeases
from batchery.engine.reader import Reader
from batchery.store import batches, files, results, shards
from batchery.store.batches import BatchRow
from batchery.store.database import Database
from batchery.store.ids import new_id
from batchery.store.results import Segment
from batchery.wire.file_index import FileIndex

log = structlog.get_logger()

SHARD_REQUESTS = 256
MAX_SHARDS = 2_048


def shard_size(requests: int) -> int:
    """Requests in each shard of a batch with so many."""
    return max(SHARD_REQUESTS, -(-requests // MAX_SHARDS))


def cut(index: FileIndex, only: list[int] | None = None) -> list[tuple[str, bytes]]:
    """The plan of a batch: for each shard the model and its packed requests (unsigned 32 bit), in the order of
    the index, which has like prompts side by side.

    Shards of different models alternate, so that a file sorted by model keeps all of its upstreams busy.

    Args:
        index: of the input file.
        only: the requests that are to run; None for all.
    """
    size = shard_size(len(index) if only is None else len(only))
    by_model = index.by_model if only is None else _only(index, only)
    queues = [
        [(model, requests[start : start + size].tobytes()) for start in range(0, len(requests), size)]
        for model, requests in zip(index.models, by_model, strict=True)
    ]
    longest = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def _only(index: FileIndex, only: list[int]) -> list[array[int]]:
    wanted = bytearray(len(index))
    for request in only:
        wanted[request] = 1
    return [array("I", [request for request in requests if wanted[request]]) for requests in index.by_model]


class Planner:
    """Plans batches for one worker.

    Args:
        database: the tables.
        reader: for the indexes of input files.
        worker: its id.
        seconds: that a batch stays ours without renewal.

    Attributes:
        leases: on the batch that is being planned.
    """

    def __init__(self, database: Database, reader: Reader, worker: str, seconds: float) -> None:
        self._database = database
        self._reader = reader
        self._worker = worker
        self._seconds = seconds
        self.leases = BatchLeases(database, worker)

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
        async with self.leases.held(row.id):
            await self._plan(row)
        return row

    async def _plan(self, row: BatchRow) -> None:
        if row.invalid and not await self._record_invalid(row):
            return
        index = await self._reader.index(row.id)
        before = await self._reader.results(row.result_index)
        only = None if before is None else before.to_retry()
        plan = cut(index, only)
        twins: list[bytes | None] = []
        if row.deduplicate:
            copies = await self._copies(row, range(len(index)) if only is None else only)
            plan, twins = await asyncio.to_thread(regroup, plan, copies)
        began = time.time()
        now = int(began)
        done = row.completed + row.invalid
        changes = lifecycle.planned(now) | {"lease_owner": None, "lease_until": None}
        changes |= {"run_started_at": began, "run_done": done}
        # If nothing can run, because every line is bad, the run is over with its beginning.
        changes |= (
            lifecycle.recorded("in_progress", total=row.total, completed=row.completed, failed=row.invalid, now=now)
            or {}
        )
        async with self._database.write() as connection:
            if await batches.change(connection, row.id, expect="validating", changes=changes):
                await shards.insert(connection, row.id, row.expires_at, plan, twins)
            else:  # cancelled or expired in between
                await batches.change_many(connection, [{"id": row.id, "lease_owner": None, "lease_until": None}])
        log.info(
            "batch planned",
            batch=row.id,
            requests=row.total - row.completed - row.invalid,
            shards=len(plan),
            invalid=row.invalid,
        )

    async def _copies(self, row: BatchRow, requests: Sequence[int]) -> dict[int, list[int]]:
        """The duplicates among some requests of a batch; takes one pass over their lines."""
        finder = Finder()
        async for some, lines in self._reader.lines(row.id, requests):
            await asyncio.to_thread(finder.add, some, lines)
        return await asyncio.to_thread(finder.copies)

    async def _record_invalid(self, row: BatchRow) -> bool:
        """Write the error lines of the bad lines, as far as they are not yet written.

        Returns:
            Whether the batch still waits for its plan.
        """
        done = row.error_lines
        async for lines in self._reader.invalid_lines(row, done):
            async with self._database.write() as connection:
                current = await batches.get(connection, row.id, lock=True)
                if current is None or current.lease_owner != self._worker:
                    return False
                if current.status != "validating":  # cancelled or expired in between
                    await batches.change_many(connection, [{"id": row.id, "lease_owner": None, "lease_until": None}])
                    return False
                error_file = current.error_file or new_id()
                if current.error_file is None:
                    now = int(time.time())
                    values = files.growing_file(
                        id=error_file, owner=row.owner, purpose="batch_error", batch=row.id, created_at=now
                    )
                    await files.insert(connection, **values)
                segment = _segment(row, done, lines)
                await results.insert(connection, [segment])
                done += len(lines)
                change = {
                    "id": row.id,
                    "error_file": error_file,
                    "error_lines": done,
                    "error_bytes": current.error_bytes + len(segment.body),
                    "failed": done,
                }
                await batches.change_many(connection, [change])
        return True


def _segment(row: BatchRow, position: int, lines: list[bytes]) -> Segment:
    """Error lines of bad lines as a segment of the log. A bad line counts as a request after all good ones."""
    first = row.total - row.invalid + position
    return Segment(
        batch_id=row.id,
        kind="error",
        position=position,
        requests=array("I", range(first, first + len(lines))),
        ends=array("I", accumulate(map(len, lines))),
        attempts=array("I", bytes(4 * len(lines))),
        body=b"".join(lines),
    )
