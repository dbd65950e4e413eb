"""What an API key may have at a time: requests in live batches, live batches, bytes of uploaded files.

The last word is had in the transaction that makes the new thing. It holds the key's row until it commits, so that two
callers with one key cannot both take what is left, on PostgreSQL as little as on SQLite.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.server.context import Caller
from batchery.store import api_keys, batch_sums, files, uploads
from batchery.store.batch_sums import Held
from batchery.wire.errors import TooManyRequests

RETRY_AFTER = 60
"""Seconds, where nothing says when there will be room."""


async def check_new_batch(connection: AsyncConnection, caller: Caller, requests: int) -> None:
    """Whether a caller may have one more batch, in the transaction that makes it.

    Args:
        requests: how many the new batch has.

    Raises:
        TooManyRequests: a limit of the caller's key would be passed; says which, and when there may be room.
    """
    if caller.key is None or (caller.max_live_batches is None and caller.max_queued_requests is None):
        return
    await api_keys.lock(connection, caller.key)
    held = await batch_sums.held_by_key(connection, caller.key)
    if caller.max_live_batches is not None and held.live + 1 > caller.max_live_batches:
        raise _no_room(
            f"This API key has {held.live} batches that have not ended, and may have {caller.max_live_batches} at a "
            f"time. {_when(held)}Create this one when one of them has ended, or cancel one.",
            "live_batches_exceeded",
            held.first_due,
        )
    if caller.max_queued_requests is not None and held.queued + requests > caller.max_queued_requests:
        remedy = (
            "Create it when enough of them are done, or split it."
            if requests <= caller.max_queued_requests
            else "Split it: there will never be room for so many at a time."
        )
        raise _no_room(
            f"This API key has {held.queued} requests that wait or run, and may have {caller.max_queued_requests} at "
            f"a time; this batch has {requests} more. {_when(held)}{remedy}",
            "queued_requests_exceeded",
            held.first_due,
        )


def _when(held: Held) -> str:
    """When the first of the batches that a key has under way must have ended, as a sentence."""
    if held.first_due is None:
        return ""
    return f"The first of its batches is due at {datetime.fromtimestamp(held.first_due, UTC):%Y-%m-%dT%H:%M:%SZ}. "


def _no_room(message: str, code: str, due: int | None = None) -> TooManyRequests:
    return TooManyRequests(message, retry_after=RETRY_AFTER if due is None else due - time.time(), code=code)


async def upload_room(connection: AsyncConnection, caller: Caller) -> int | None:
    """How many bytes a caller may still upload, as it is just now; None for any number. Never negative."""
    if caller.key is None or caller.max_upload_bytes is None:
        return None
    return max(0, caller.max_upload_bytes - await _uploaded(connection, caller.key))


async def check_new_upload(connection: AsyncConnection, caller: Caller, size: int) -> None:
    """Whether a caller may keep so many more bytes, in the transaction that adds them.

    Args:
        size: in bytes.

    Raises:
        TooManyRequests: the limit of the caller's key would be passed.
    """
    if caller.key is None or caller.max_upload_bytes is None:
        return
    await api_keys.lock(connection, caller.key)
    held = await _uploaded(connection, caller.key)
    if held + size > caller.max_upload_bytes:
        raise no_upload_room(caller, caller.max_upload_bytes - held, size)


async def _uploaded(connection: AsyncConnection, key: str) -> int:
    """The bytes that a key's uploads take: files that have not expired, and parts of files."""
    return await files.bytes_of_key(connection, key, int(time.time())) + await uploads.bytes_of_key(connection, key)


def no_upload_room(caller: Caller, room: int, size: int | None = None) -> TooManyRequests:
    """The error for an upload that a key has no room for.

    Args:
        caller: whose key it is.
        room: bytes that it still has.
        size: how many the upload has; None when there is no telling yet.
    """
    assert caller.max_upload_bytes is not None
    wanted = "this upload has more" if size is None else f"this upload has {size}"
    return TooManyRequests(
        f"This API key's uploads may have {caller.max_upload_bytes} bytes at a time, of which {max(0, room)} are free; "
        f"{wanted}. Nothing was stored. Delete files that are not needed any more, or wait until some expire.",
        retry_after=RETRY_AFTER,
        code="upload_bytes_exceeded",
    )
