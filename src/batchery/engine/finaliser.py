"""The finaliser: turns an ended run into finished files.

It joins the log's segments into one blob for each file, adds a line for every request that never ran, notes in a result
index how each request ended and where its line is, and then, in one transaction, shows the terminal status, the files
and the counts together. Until that transaction nothing has changed, so a crash anywhere before it costs only the work.
The log's rows are dropped afterwards, a few at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import structlog

from batchery.engine import lifecycle
from batchery.engine.lease import BatchLeases
from batchery.engine.reader import Reader
from batchery.store import batches, dead_blobs, files, result_index, results, shards, small_indexes, webhooks
from batchery.store.batches import BatchRow
from batchery.store.blobs import BlobStore, Writer, all_of, new_key, write_whole
from batchery.store.database import Database
from batchery.store.errors import StoreFull
from batchery.store.ids import new_id
from batchery.store.result_index import ResultIndex, Status
from batchery.store.results import Lines
from batchery.wire import ids
from batchery.wire.results import Failure, Kind, failure_line

log = structlog.get_logger()

ENDING = ("finalizing", "cancelling")
NEVER_RAN_PIECE = 500
DROP_SEGMENTS = 64


class _Errors:
    """An error file that is being written.

    Attributes:
        writer: where it goes.
        lines: how many it has.
        invalid: how many of them are those of bad lines that are written only now.
    """

    def __init__(self, writer: Writer, lines: int) -> None:
        self.writer = writer
        self.lines = lines
        self.invalid = 0

    async def add(self, lines: list[bytes], requests: Iterable[int], status: Status, index: ResultIndex) -> None:
        """Append lines, and note for their requests where they are."""
        offset = self.writer.size
        await self.writer.write(b"".join(lines))
        for request, line in zip(requests, lines, strict=True):
            index.put(request, status, offset, len(line), 0)
            offset += len(line)
        self.lines += len(lines)


class Finaliser:
    """Finishes batches for one worker.

    Args:
        database: the tables.
        blobs: where finished files go.
        reader: for the `custom_id`s of requests that never ran.
        worker: its id.
        seconds: that a batch stays ours without renewal.

    Attributes:
        leases: on the batches that are being finished.
    """

    def __init__(self, database: Database, blobs: BlobStore, reader: Reader, worker: str, seconds: float) -> None:
        self._database = database
        self._blobs = blobs
        self._reader = reader
        self._worker = worker
        self._seconds = seconds
        self.leases = BatchLeases(database, worker)

    async def claim(self) -> BatchRow | None:
        """Take a batch that is ready to be finished; `finish` is to follow at once.

        Raises:
            StoreError: none could be taken.
        """
        now = time.time()
        async with self._database.read() as connection:  # which is often for nothing, and costs no write then
            if not await batches.is_claimable(connection, ENDING, now):
                return None
        async with self._database.write() as connection:
            row = await batches.claim(connection, self._worker, ENDING, now, now + self._seconds)
            if row is not None:
                await shards.fence(connection, row.id)
        return row

    async def finish(self, row: BatchRow) -> None:
        """Finish a batch that was claimed. Several may be at it at a time.

        Raises:
            StoreError: it could not be finished now, and can be claimed again.
        """
        async with self.leases.held(row.id):
            shown = await self._finish(row)
        if shown:
            await self.drop_log(row.id)

    async def _finish(self, row: BatchRow) -> bool:
        before = await self._reader.results(row)
        index = before or ResultIndex.empty(await self._reader.numbers(row.id))
        left = await self._never_ran(row, before)
        async with self._database.read() as connection:
            grown = await files.get(connection, row.output_file)
        keys = [new_key("output", new_id()), new_key("error", new_id()), new_key("results", new_id())]
        try:
            async with self._blobs.write(keys[0]) as output:
                first = 0
                if grown is not None and grown.blob_key is not None:  # the batch has ended before: its output goes on
                    first = grown.blob_lines
                    async for piece in self._blobs.stream(grown.blob_key, 0, grown.blob_size):
                        await output.write(piece)
                await self._copy(row, "output", first, output, index)
                error: _Errors | None = None
                if row.error_lines or left or row.failed < row.invalid:
                    async with self._blobs.write(keys[1]) as writer:
                        error = _Errors(writer, row.error_lines)
                        await self._copy(row, "error", 0, writer, index)
                        if row.in_progress_at is None:  # it ended before its bad lines were all written
                            await self._add_invalid(row, error, index)
                        await self._add_never_ran(row, left, error, index)
                        await writer.close()
                # They wait for the disk together.
                await all_of([output.close(), write_whole(self._blobs, keys[2], result_index.encode(index))])
            shown = await self._show(row, output, error, keys[2], len(left))
        except StoreFull:  # or each further try would leave one more copy
            await self._blobs.delete(keys)
            raise
        if not shown:
            await self._blobs.delete(keys)
        return shown

    async def _show(
        self, row: BatchRow, output: Writer, error: _Errors | None, results_key: str, never_ran: int
    ) -> bool:
        """Make the end visible, all of it in one transaction.

        Returns:
            Whether the batch was still as it was when its files were written; if somebody has cancelled it in between,
            the next round finishes it anew.
        """
        now = int(time.time())
        failed = row.failed + (0 if error is None else error.invalid)
        change = lifecycle.finished(
            row.status, row.ending, total=row.total, completed=row.completed, failed=failed, now=now
        )
        expires_at = None if row.output_expires_after is None else now + row.output_expires_after
        error_file = row.error_file
        async with self._database.write() as connection:
            current = await batches.get(connection, row.id, lock=True)
            if current is None or current.lease_owner != self._worker:
                return False
            if current.status != row.status:
                await batches.change_many(connection, [{"id": row.id, "lease_owner": None, "lease_until": None}])
                return False
            grown = await files.get(connection, row.output_file)
            before = small_indexes.blob_of(row.result_index)
            await dead_blobs.note(connection, (None if grown is None else grown.blob_key, before), now)
            if row.result_index is not None:
                await small_indexes.drop(connection, [row.seq])
            await files.finish(
                connection,
                row.output_file,
                blob_key=output.key,
                size=output.size,
                lines=row.output_lines,
                sha256=output.sha256,
                expires_at=expires_at,
            )
            if error is not None:
                if error_file is None:
                    error_file = new_id()
                    await files.insert(
                        connection,
                        **files.growing_file(
                            id=error_file, owner=row.owner, purpose="batch_error", batch=row.id, created_at=now
                        ),
                    )
                await files.finish(
                    connection,
                    error_file,
                    blob_key=error.writer.key,
                    size=error.writer.size,
                    lines=error.lines,
                    sha256=error.writer.sha256,
                    expires_at=expires_at,
                )
            await batches.change(
                connection,
                row.id,
                expect=row.status,
                changes=change
                | {
                    "error_file": error_file,
                    "failed": failed,
                    "result_index": results_key,
                    "lease_owner": None,
                    "lease_until": None,
                },
            )
            await webhooks.tell(connection, row.id, now)
            await shards.drop(connection, row.id)
        log.info(
            "batch ended",
            batch=row.id,
            status=change["status"],
            total=row.total,
            completed=row.completed,
            failed=failed,
            never_ran=never_ran,
        )
        return True

    async def _never_ran(self, row: BatchRow, before: ResultIndex | None) -> list[int]:
        """The requests without a result, in file order."""
        if row.completed + row.failed >= row.total:
            return []
        if row.in_progress_at is None:  # it ended before it was planned
            return list(range(row.total - row.invalid)) if before is None else before.to_retry()
        async with self._database.read() as connection:
            plan = await shards.of_batch(connection, row.id)
        return sorted(request for shard in plan for _, request in shard.left())

    async def _add_never_ran(self, row: BatchRow, requests: list[int], error: _Errors, index: ResultIndex) -> None:
        status: Status = "cancelled" if row.status == "cancelling" else "expired"
        failure = Failure(*lifecycle.never_ran(row.status))
        for start in range(0, len(requests), NEVER_RAN_PIECE):
            piece = requests[start : start + NEVER_RAN_PIECE]
            custom_ids = await self._reader.custom_ids(row.id, piece)
            lines = [
                failure_line(ids.request_id(row.id, request), custom_id, failure)
                for request, custom_id in zip(piece, custom_ids, strict=True)
            ]
            await error.add(lines, piece, status, index)

    async def _add_invalid(self, row: BatchRow, error: _Errors, index: ResultIndex) -> None:
        first = row.total - row.invalid + row.error_lines
        async for lines in self._reader.invalid_lines(row, row.error_lines):
            await error.add(lines, range(first, first + len(lines)), "invalid", index)
            first += len(lines)
            error.invalid += len(lines)

    async def _copy(self, row: BatchRow, kind: Kind, position: int, writer: Writer, index: ResultIndex) -> None:
        """Write a growing file's lines from `position` on, as they stand in the log, and note where each is.

        The next lines are read while these are written and noted.
        """
        good = row.total - row.invalid
        segments = await self._read(row, kind, position)
        while segments:
            position = segments[-1].position + len(segments[-1].ends)
            written = writer.size
            reading = asyncio.create_task(self._read(row, kind, position))
            writing = _write(writer, segments)
            # It comes last: the others are with their threads then.
            noting = _note(index, kind, segments, written, good)
            await all_of([reading, writing, noting])
            segments = reading.result()

    async def _read(self, row: BatchRow, kind: Kind, position: int) -> list[Lines]:
        async with self._database.read() as connection:
            return await results.read(connection, row.id, kind, position)

    async def drop_log(self, batch: str) -> None:
        """Drop the rows of an ended batch's log, whose lines are in its files now.

        A batch that lives again, because it is retried, keeps what is left: each step looks at its status under lock.

        Raises:
            StoreError: it could not be done now; the reaper does it later.
        """
        while True:
            async with self._database.write() as connection:
                row = await batches.get(connection, batch, lock=True)
                if row is None or not lifecycle.is_terminal(row.status):
                    return
                if await results.drop_some(connection, batch, DROP_SEGMENTS) < DROP_SEGMENTS:
                    await batches.change_many(connection, [{"id": batch, "has_log": False}])
                    return


async def _write(writer: Writer, segments: list[Lines]) -> None:
    for segment in segments:
        await writer.write(segment.body)


async def _note(index: ResultIndex, kind: Kind, segments: list[Lines], start: int, good: int) -> None:
    for segment in segments:
        index.put_lines(kind, start, segment.requests, segment.ends, segment.attempts, good)
        start += len(segment.body)
