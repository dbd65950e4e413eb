"""`DELETE /batches/{id}`: a batch that nobody wants any more.

It is gone for its owner at once. What it still runs is cancelled and ends as any cancelled batch does; the row, the log
and the plan go after that (`engine/retention.py`). Its files are files of their own and stay, but for those that
nothing was ever written to.
"""

from __future__ import annotations

from typing import Any

from litestar import delete
from litestar.params import FromPath

from batchery.engine import lifecycle
from batchery.server.batches import owned_batch
from batchery.server.context import AnyRequest, context_of, owner_of
from batchery.store import batches, files
from batchery.store import idempotency as idempotency_keys


@delete("/batches/{id:str}", status_code=204)
async def delete_batch(request: AnyRequest, id: FromPath[str]) -> None:
    """Delete a batch, which is cancelled first if it has not ended; its files stay."""
    context, owner = context_of(request), owner_of(request)
    async with context.database.write() as connection:
        row = await owned_batch(connection, id, owner, lock=True)
        now = context.now()
        changes: dict[str, Any] = {"deleted_at": now}
        ended = lifecycle.is_terminal(row.status)
        if not ended:
            changes |= lifecycle.cancelled_by_caller(row.status, now=now) or {}
        await batches.change(connection, row.id, expect=row.status, changes=changes)
        await idempotency_keys.forget(connection, row.id)
        if ended:
            await files.delete_empty(connection, row.id, now)
    if not ended:
        context.wake()
