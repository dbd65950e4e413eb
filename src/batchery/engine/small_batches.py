"""Finishing small batches: many at a time, in two transactions and one round of the disk for all of them.

What a batch costs whatever its size is what counts where there are thousands of small ones. So batches that have run to
their end, and whose results are few, are finished together: their logs are read in one query, their files are made in
memory and written at once, and in one transaction all of them end and drop their logs. Everything else, such as a
batch that was cancelled, has expired, or ran before, is left to the `finaliser`, which takes one at a time.
"""

from __future__ import annotations

import time
from array import array
from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256
from itertools import accumulate
from typing import Any

import msgspec
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.engine import lifecycle
from batchery.engine.lease import BatchLeases
from batchery.engine.reader import Reader
from batchery.store import batches, files, result_index, results, shards, small_indexes, webhooks
from batchery.store.batches import BatchRow
from batchery.store.blobs import BlobStore, new_key
from batchery.store.database import Database
from batchery.store.errors import StoreError, StoreFull
from batchery.store.ids import new_id
from batchery.store.result_index import ResultIndex
from batchery.store.results import Segment

log = structlog.get_logger()

SMALL_BYTES = 1024 * 1024
"""Bytes of results up to which a batch is small."""

SMALL_REQUESTS = 10_000
"""Requests up to which it is."""

AT_ONCE = 32
"""Batches that are finished together at most."""

AT_ONCE_BYTES = 8 * 1024 * 1024
"""Bytes of results that they may have together."""


def is_small(row: BatchRow) -> bool:
    """Whether a batch that is ready to be finished can be finished together with others."""
    return (
        row.status == "finalizing"
        and row.completed + row.failed >= row.total
        and row.in_progress_at is not None
        and row.result_index is None
        and row.run_done == row.invalid  # or it ran before, and its files go on
        and row.total <= SMALL_REQUESTS
        and row.output_bytes + row.error_bytes <= SMALL_BYTES
    )


def _fitting(rows: Sequence[BatchRow]) -> int:
    """How many of these can be finished together: always the first, if there is one."""
    sizes = accumulate(row.output_bytes + row.error_bytes for row in rows[:AT_ONCE])
    return max(min(1, len(rows)), sum(size <= AT_ONCE_BYTES for size in sizes))


class _Files(msgspec.Struct, frozen=True):
    """What a batch ends with.

    Attributes:
        row: the batch as it was.
        output, errors: the whole files, and where they go.
        index: where each result is, likewise; without a key it goes into the database.
    """

    row: BatchRow
    output_key: str
    output: bytes
    error_key: str | None
    errors: bytes
    index_key: str | None
    index: bytes

    def blobs(self) -> list[tuple[str, bytes]]:
        """The blobs to be written."""
        blobs = [(self.output_key, self.output)]
        if self.index_key is not None:
            blobs.append((self.index_key, self.index))
        if self.error_key is not None:
            blobs.append((self.error_key, self.errors))
        return blobs


class SmallBatches:
    """Finishes small batches for one worker.

    Args:
        database: the tables.
        blobs: where finished files go.
        reader: for the physical lines of the requests.
        leases: on batches that are being finished.
        worker: its id.
        seconds: that a batch stays ours without renewal.
    """

    def __init__(
        self, database: Database, blobs: BlobStore, reader: Reader, leases: BatchLeases, worker: str, seconds: float
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._reader = reader
        self._leases = leases
        self._worker = worker
        self._seconds = seconds
        self._taken: list[BatchRow] = []

    def add(self, rows: Sequence[BatchRow]) -> None:
        """These were taken when their last results were recorded; they wait for one another, and for `next`."""
        self._taken += rows
        self._leases.batches.update(row.id for row in rows)

    def next(self) -> list[BatchRow]:
        """Of those that were taken some that can be finished together; `finish` is to follow at once."""
        count = _fitting(self._taken)
        some, self._taken = self._taken[:count], self._taken[count:]
        return some

    async def claim(self) -> list[BatchRow]:
        """Take small batches that are ready to be finished and that nobody has; `finish` is to follow at once.

        Raises:
            StoreError: none could be taken.
        """
        now = time.time()
        async with self._database.read() as connection:
            ready = await batches.ready(connection, now, AT_ONCE)
            await self._reader.locate(connection, ready)
        found = list(filter(is_small, ready))
        wanted = [row.id for row in found[: _fitting(found)]]
        if not wanted:
            return []

        async def take(connection: AsyncConnection) -> list[BatchRow]:
            current = await batches.get_many(connection, wanted, lock=True)
            taken = [row for row in current.values() if is_small(row) and (row.lease_until or 0.0) < now]
            until = now + self._seconds
            await batches.change_many(
                connection, [{"id": row.id, "lease_owner": self._worker, "lease_until": until} for row in taken]
            )
            return taken

        return await self._database.write_at_once(take)

    async def finish(self, rows: Sequence[BatchRow]) -> None:
        """Finish batches that were claimed.

        Raises:
            StoreError: some could not be finished now, and can be claimed again; the others are.
        """
        async with self._leases.held(*(row.id for row in rows)):
            async with self._database.read() as connection:
                segments = await results.of_batches(connection, [row.id for row in rows])
            by_batch: dict[str, list[Segment]] = defaultdict(list)
            for segment in segments:
                by_batch[segment.batch_id].append(segment)
            made: list[_Files] = []
            spread = new_id()[:2]
            failed: StoreError | None = None
            for row in rows:
                try:
                    made.append(_files(row, by_batch[row.id], await self._reader.numbers(row.id), spread))
                except StoreError as error:
                    failed = error
            await self._end(made)
            if failed is not None:
                raise failed

    async def _end(self, made: Sequence[_Files]) -> None:
        if not made:
            return
        await self._blobs.put_many([blob for one in made for blob in one.blobs()])
        try:
            shown = await self._show(made)
        except StoreFull:  # or each further try would leave one more copy
            await self._blobs.delete([key for one in made for key, _ in one.blobs()])
            raise
        lost = [key for one in made if one.row.id not in shown for key, _ in one.blobs()]
        if lost:
            await self._blobs.delete(lost)

    async def _show(self, made: Sequence[_Files]) -> set[str]:
        """Make the ends visible, all of them and all that belongs to them in one transaction.

        Returns:
            Those batches that were still as they were when their files were written.
        """
        now = int(time.time())

        async def show(connection: AsyncConnection) -> list[_Files]:
            mine = await batches.leased(connection, self._worker, [one.row.id for one in made])
            ended = [one for one in made if mine.get(one.row.id) == one.row.status]
            shown = {one.row.id for one in ended}
            left = [{"id": id, "lease_owner": None, "lease_until": None} for id in mine if id not in shown]
            await batches.change_many(connection, left)
            await files.finish_many(connection, [file for one in ended for file in _finished(one, now)])
            await small_indexes.insert(connection, {one.row.seq: one.index for one in ended if one.index_key is None})
            changes: dict[str, list[dict[str, Any]]] = defaultdict(list)  # by status, since each has its own stamp
            for one in ended:
                change = _ended(one, now)
                changes[change["status"]].append(change)
            for some in changes.values():
                await batches.change_many(connection, some)
            for one in ended:
                if one.row.webhook_url is not None:
                    await webhooks.tell(connection, one.row.id, now)
            await shards.drop_of(connection, sorted(shown))
            await results.drop_of(connection, sorted(shown))
            return ended

        ended = await self._database.write_at_once(show)
        for one in ended:
            row = one.row
            log.info(
                "batch ended",
                batch=row.id,
                status=_ended(one, now)["status"],
                total=row.total,
                completed=row.completed,
                failed=row.failed,
                never_ran=0,
            )
        return {one.row.id for one in ended}


def _files(row: BatchRow, segments: Sequence[Segment], numbers: array[int], spread: str) -> _Files:
    """Join a batch's log; its segments are in order of kind and position.

    Args:
        spread: with which two digits the keys begin: those of batches that are finished together lie in the same
            folders, or each would have folders of its own to be synced.
    """
    index = ResultIndex.empty(numbers)
    good = row.total - row.invalid
    whole: dict[str, list[bytes]] = {"output": [], "error": []}
    sizes = {"output": 0, "error": 0}
    for segment in segments:
        index.put_lines(segment.kind, sizes[segment.kind], segment.requests, segment.ends, segment.attempts, good)
        whole[segment.kind].append(segment.body)
        sizes[segment.kind] += len(segment.body)
    content = b"".join(result_index.encode(index))
    return _Files(
        row=row,
        output_key=new_key("output", spread + new_id()[2:]),
        output=b"".join(whole["output"]),
        error_key=new_key("error", spread + new_id()[2:]) if row.error_lines else None,
        errors=b"".join(whole["error"]),
        index_key=None if len(content) <= small_indexes.MAX_BYTES else new_key("results", spread + new_id()[2:]),
        index=content,
    )


def _finished(one: _Files, now: int) -> list[dict[str, Any]]:
    """What changes of a batch's files."""
    row = one.row
    expires_at = None if row.output_expires_after is None else now + row.output_expires_after
    found = [(row.output_file, one.output_key, one.output, row.output_lines)]
    if row.error_file is not None and one.error_key is not None:
        found.append((row.error_file, one.error_key, one.errors, row.error_lines))
    return [
        {
            "id": id,
            "blob_key": key,
            "bytes": len(content),
            "lines": lines,
            "sha256": sha256(content).hexdigest(),
            "expires_at": expires_at,
        }
        for id, key, content, lines in found
    ]


def _ended(one: _Files, now: int) -> dict[str, Any]:
    """What changes of the batch."""
    row = one.row
    return lifecycle.finished(
        row.status, row.ending, total=row.total, completed=row.completed, failed=row.failed, now=now
    ) | {
        "id": row.id,
        "result_index": one.index_key or small_indexes.HERE,
        "lease_owner": None,
        "lease_until": None,
        "has_log": False,
    }
