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
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.engine import lifecycle
from batchery.engine.duplicates import Finder, regroup
from batchery.engine.lease import BatchLeases
from batchery.engine.reader import Reader
from batchery.store import batches, files, results, shards
from batchery.store.batches import BatchRow
from batchery.store.database import Database
from batchery.store.errors import StoreError
from batchery.store.ids import new_id
from batchery.store.results import Segment
from batchery.wire.file_index import FileIndex

log = structlog.get_logger()

SHARD_REQUESTS = 256
MAX_SHARDS = 2_048

AT_ONCE = 32
"""Batches that are planned in one transaction at most."""

AT_ONCE_REQUESTS = 50_000
"""The requests that these may have together, so that the transaction is short; a single batch may have more."""


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

    async def plan_some(self) -> list[BatchRow]:
        """Plan some of the batches that wait for it, the earliest deadlines first, in one transaction.

        Nobody has a lease on them meanwhile: where two workers are at the same ones, the first to write has planned
        them. Batches that take more than their indexes to plan, `plan_one` does under a lease.

        Returns:
            Those that were planned, as they were.

        Raises:
            StoreError: they could not be planned now, and will be tried again.
        """
        async with self._database.read() as connection:
            rows = await batches.waiting(connection, time.time(), AT_ONCE)
            await self._reader.locate(connection, rows)
        plans: dict[str, shards.Plan] = {}
        requests = 0
        for row in rows:
            requests += row.total
            if not _is_simple(row) or (plans and requests > AT_ONCE_REQUESTS):
                break
            try:
                index = await self._reader.index(row.id)
            except StoreError:
                break
            plans[row.id] = shards.Plan(row.id, row.expires_at, cut(index))
        if rows and not plans:
            one = await self.plan_one()
            return [] if one is None else [one]
        if not plans:
            return []
        now = time.time()

        async def record(connection: AsyncConnection) -> list[BatchRow]:
            current = await batches.get_many(connection, list(plans), lock=True)
            planned = [row for row in rows if row.id in plans and _waits(current.get(row.id), now)]
            await batches.change_many(connection, [{"id": row.id} | _begun(row, now) for row in planned])
            await shards.insert(connection, [plans[row.id] for row in planned])
            return planned

        planned = await self._database.write_at_once(record)
        for row in planned:
            _say(row, plans[row.id])
        return planned

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
        before = await self._reader.results(row)
        only = None if before is None else before.to_retry()
        plan = cut(index, only)
        twins: list[bytes | None] = []
        if row.deduplicate:
            copies = await self._copies(row, range(len(index)) if only is None else only)
            plan, twins = await asyncio.to_thread(regroup, plan, copies)
        whole = shards.Plan(row.id, row.expires_at, plan, twins)
        async with self._database.write() as connection:
            if await batches.change(connection, row.id, expect="validating", changes=_begun(row, time.time())):
                await shards.insert(connection, [whole])
            else:  # cancelled or expired in between
                await batches.change_many(connection, [{"id": row.id, "lease_owner": None, "lease_until": None}])
        _say(row, whole)

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


def _is_simple(row: BatchRow) -> bool:
    """Whether nothing but the index of its input is needed to plan a batch."""
    return not row.invalid and not row.deduplicate and row.result_index is None


def _waits(row: BatchRow | None, now: float) -> bool:
    """Whether a batch still waits for its plan, and nobody is planning it."""
    return row is not None and row.status == "validating" and (row.lease_until is None or row.lease_until < now)


def _begun(row: BatchRow, now: float) -> dict[str, Any]:
    """What changes of a batch with its plan."""
    changes = lifecycle.planned(int(now)) | {"lease_owner": None, "lease_until": None}
    changes |= {"run_started_at": now, "run_done": row.completed + row.invalid, "finalizing_at": None, "ending": None}
    # If nothing can run, because every line is bad, the run is over with its beginning.
    return changes | (
        lifecycle.recorded("in_progress", total=row.total, completed=row.completed, failed=row.invalid, now=int(now))
        or {}
    )


def _say(row: BatchRow, plan: shards.Plan) -> None:
    log.info(
        "batch planned",
        batch=row.id,
        requests=row.total - row.completed - row.invalid,
        shards=len(plan.pieces),
        invalid=row.invalid,
    )


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
