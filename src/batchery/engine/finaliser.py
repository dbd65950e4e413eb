"""The finaliser: turns an ended run into finished files.

It joins the log's segments into one blob for each file, adds a line for every request that never ran, and then, in one
transaction, shows the terminal status, the files and the counts together. Until that transaction nothing has changed,
so a crash anywhere before it costs only the work. The log's rows are dropped afterwards, a few at a time.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import structlog

from batchery.engine import lifecycle
from batchery.engine.lease import BatchLease
from batchery.engine.reader import Reader
from batchery.store import batches, files, results, shards
from batchery.store.batches import BatchRow
from batchery.store.blobs import BlobStore, Writer, new_key
from batchery.store.database import Database
from batchery.store.errors import StoreFull
from batchery.store.ids import new_id
from batchery.wire import ids
from batchery.wire.results import Failure, Kind, failure_line

log = structlog.get_logger()

NEVER_RAN_PIECE = 500
DROP_SEGMENTS = 64


class Finaliser:
    """Finishes batches for one worker.

    Args:
        database: the tables.
        blobs: where finished files go.
        reader: for the `custom_id`s of requests that never ran.
        worker: its id.
        seconds: that a batch stays ours without renewal.

    Attributes:
        lease: on the batch that is being finished.
    """

    def __init__(self, database: Database, blobs: BlobStore, reader: Reader, worker: str, seconds: float) -> None:
        self._database = database
        self._blobs = blobs
        self._reader = reader
        self._worker = worker
        self._seconds = seconds
        self.lease = BatchLease(database, worker)

    async def finish_one(self) -> bool:
        """Finish one batch that is ready for it.

        Returns:
            Whether there was one.

        Raises:
            StoreError: it could not be finished now, and will be tried again.
        """
        now = time.time()
        async with self._database.write() as connection:
            row = await batches.claim(connection, self._worker, ("finalizing", "cancelling"), now, now + self._seconds)
            if row is None:
                return False
            await shards.fence(connection, row.id)
        async with self.lease.held(row.id):
            shown = await self._finish(row)
        if shown:
            await self.drop_log(row.id)
        return True

    async def _finish(self, row: BatchRow) -> bool:
        left = await self._never_ran(row)
        keys = [new_key("output", new_id()), new_key("error", new_id())]
        try:
            async with self._blobs.write(keys[0]) as output:
                await self._copy(row, "output", output)
                await output.close()
            error: Writer | None = None
            if row.error_lines or left:
                async with self._blobs.write(keys[1]) as error:
                    await self._copy(row, "error", error)
                    async for lines in self._never_ran_lines(row, left):
                        await error.write(lines)
                    await error.close()
            shown = await self._show(row, output, error, len(left))
        except StoreFull:  # or each further try would leave one more copy
            await self._blobs.delete(keys)
            raise
        if not shown:
            await self._blobs.delete(keys)
        return shown

    async def _show(self, row: BatchRow, output: Writer, error: Writer | None, never_ran: int) -> bool:
        """Make the end visible, all of it in one transaction.

        Returns:
            Whether the batch was still as it was when its files were written; if somebody has cancelled it in between,
            the next round finishes it anew.
        """
        now = int(time.time())
        change = lifecycle.finished(
            row.status, row.ending, total=row.total, completed=row.completed, failed=row.failed, now=now
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
                    blob_key=error.key,
                    size=error.size,
                    lines=row.error_lines + never_ran,
                    sha256=error.sha256,
                    expires_at=expires_at,
                )
            await batches.change(
                connection,
                row.id,
                expect=row.status,
                changes=change | {"error_file": error_file, "lease_owner": None, "lease_until": None},
            )
            await shards.drop(connection, row.id)
        log.info(
            "batch ended",
            batch=row.id,
            status=change["status"],
            total=row.total,
            completed=row.completed,
            failed=row.failed,
            never_ran=never_ran,
        )
        return True

    async def _never_ran(self, row: BatchRow) -> list[int]:
        """The requests without a result, in file order."""
        if row.completed + row.failed >= row.total:
            return []
        async with self._database.read() as connection:
            plan = await shards.of_batch(connection, row.id)
        if not plan:  # it ended before it was planned
            return list(range(row.total))
        return sorted(request for shard in plan for _, request in shard.left())

    async def _never_ran_lines(self, row: BatchRow, requests: list[int]) -> AsyncIterator[bytes]:
        failure = Failure(*lifecycle.never_ran(row.status))
        for start in range(0, len(requests), NEVER_RAN_PIECE):
            piece = requests[start : start + NEVER_RAN_PIECE]
            custom_ids = await self._reader.custom_ids(row.id, piece)
            yield b"".join(
                failure_line(ids.request_id(row.id, request), custom_id, failure)
                for request, custom_id in zip(piece, custom_ids, strict=True)
            )

    async def _copy(self, row: BatchRow, kind: Kind, writer: Writer) -> None:
        """Write a growing file's lines, as they stand in the log."""
        position = 0
        while True:
            async with self._database.read() as connection:
                segments = await results.read(connection, row.id, kind, position)
            if not segments:
                return
            for segment in segments:
                await writer.write(segment.body)
                position = segment.position + len(segment.ends)

    async def drop_log(self, batch: str) -> None:
        """Drop the rows of an ended batch's log, whose lines are in its files now.

        Raises:
            StoreError: it could not be done now; the reaper does it later.
        """
        while True:
            async with self._database.write() as connection:
                if await results.drop_some(connection, batch, DROP_SEGMENTS) == 0:
                    await batches.change_many(connection, [{"id": batch, "has_log": False}])
                    return
