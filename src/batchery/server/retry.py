"""`POST /batches/{id}/retry`: what has no good answer runs again, under the same id, with a fresh window."""

from __future__ import annotations

from litestar import post
from litestar.params import FromPath
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.engine import lifecycle
from batchery.server import limits
from batchery.server.batches import owned_batch
from batchery.server.context import AnyRequest, Context, caller_of, context_of
from batchery.server.render import batch_object
from batchery.store import batches, files, results
from batchery.store.batches import BatchRow
from batchery.wire.errors import Conflict
from batchery.wire.objects import BatchObject
from batchery.wire.windows import window_seconds

DROP_SEGMENTS = 64


@post("/batches/{id:str}/retry", status_code=200)
async def retry_batch(request: AnyRequest, id: FromPath[str]) -> BatchObject:
    """Run a batch's failed, expired and cancelled requests again.

    The output file grows on; errors go to a new file, and the old one stays readable.
    """
    context, caller = context_of(request), caller_of(request)
    while True:
        async with context.database.write() as connection:
            row = await owned_batch(connection, id, caller.owner, lock=True)
            now = context.now()
            changes = lifecycle.retried(
                row.status,
                total=row.total,
                completed=row.completed,
                invalid=row.invalid,
                window=window_seconds(row.window),
                now=now,
            )
            # The log of the first run must be gone before a second one is written under the same positions.
            if row.has_log and await results.drop_some(connection, row.id, DROP_SEGMENTS):
                continue
            await _check_files(connection, context, row)
            await limits.check_new_batch(connection, caller, row.total - row.completed - row.invalid)
            changes |= {
                "api_key": caller.key,
                "error_file": None,
                "error_lines": 0,
                "error_bytes": 0,
                "failed": 0,
                "has_log": True,
                "lease_owner": None,
                "lease_until": None,
            }
            await batches.change(connection, row.id, expect=row.status, changes=changes)
            await files.keep(connection, row.output_file)  # its expiry begins anew when it is complete again
            row = await owned_batch(connection, id, caller.owner)
        context.wake()
        return batch_object(row, await context.forecast.of_committed(row))


async def _check_files(connection: AsyncConnection, context: Context, row: BatchRow) -> None:
    """Make sure that what a second run needs is still there, and stays there.

    Raises:
        Conflict: the input or the output file has been deleted or has expired.
    """
    for name, id in (("input", row.input_file), ("output", row.output_file)):
        exists = await files.lock(connection, id)
        file = await files.get(connection, id) if exists else None
        if file is None or (file.expires_at is not None and file.expires_at <= context.clock()):
            raise Conflict(
                f"Cannot retry: the batch's {name} file was deleted or has expired. Create a new batch for the "
                "requests that are left.",
                code=f"{name}_file_gone",
            )
    if row.result_index is None:
        raise Conflict("Cannot retry: this batch ended before retries were kept book of.", code="batch_not_retryable")
