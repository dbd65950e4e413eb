"""Queries over `uploads` and `upload_parts`: files that arrive in parts.

An upload is pending until it is completed or cancelled, or until its hour is over. Its end takes its parts with it, in
the same transaction, and their blobs are noted dead there.
"""

from __future__ import annotations

from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store import dead_blobs
from batchery.store.rows import all_typed, typed
from batchery.store.schema import upload_parts, uploads

KEPT = 86_400
"""Seconds for which an upload that has ended can still be looked at, counted from `expires_at`."""


class UploadRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `uploads`."""

    id: str
    owner: str
    api_key: str | None
    filename: str
    mime_type: str
    bytes: int
    file_expires_after: int | None
    status: str
    created_at: int
    expires_at: int
    file_id: str | None

    def status_at(self, now: int) -> str:
        """The status at a moment: what is pending has expired once its time is over, swept or not."""
        return "expired" if self.status == "pending" and self.expires_at <= now else self.status


class PartRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `upload_parts`; `md5` is hex."""

    seq: int
    id: str
    upload_id: str
    bytes: int
    md5: str
    blob_key: str
    created_at: int


class Held(msgspec.Struct, frozen=True):
    """How many parts there are, and their bytes together."""

    parts: int
    bytes: int


async def insert(connection: AsyncConnection, **values: Any) -> None:
    """Add an upload; `values` are the columns."""
    await connection.execute(sa.insert(uploads).values(**values))


async def get(connection: AsyncConnection, id: str, *, lock: bool = False) -> UploadRow | None:
    """The upload with this id, whoever owns it.

    Args:
        lock: hold it until the end of the transaction, so that it does not end, and gets no part, meanwhile.
    """
    query = sa.select(uploads).where(uploads.c.id == id)
    if lock:
        query = query.with_for_update()
    return typed(UploadRow, (await connection.execute(query)).one_or_none())


async def insert_part(connection: AsyncConnection, **values: Any) -> None:
    """Add a part to an upload that the transaction holds; `values` are the columns, of which `seq` is made here."""
    await connection.execute(sa.insert(upload_parts).values(**values))


async def get_part(connection: AsyncConnection, id: str) -> PartRow | None:
    """The part with this id, whoever owns it."""
    return typed(PartRow, (await connection.execute(sa.select(upload_parts).where(upload_parts.c.id == id))).first())


async def parts(connection: AsyncConnection, upload: str) -> list[PartRow]:
    """An upload's parts, in the order in which they came."""
    found = await connection.execute(
        sa.select(upload_parts).where(upload_parts.c.upload_id == upload).order_by(upload_parts.c.seq)
    )
    return all_typed(PartRow, found)


async def held(connection: AsyncConnection, upload: str) -> Held:
    """What an upload has so far."""
    row = (
        await connection.execute(
            sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(upload_parts.c.bytes), 0)).where(
                upload_parts.c.upload_id == upload
            )
        )
    ).one()
    return Held(row[0], int(row[1]))


async def bytes_of_key(connection: AsyncConnection, key: str) -> int:
    """The bytes of all parts in the store of uploads that an API key has begun."""
    found = await connection.execute(
        sa.select(sa.func.coalesce(sa.func.sum(upload_parts.c.bytes), 0))
        .select_from(upload_parts.join(uploads, upload_parts.c.upload_id == uploads.c.id))
        .where(uploads.c.api_key == key)
    )
    return int(found.scalar_one())


async def end(connection: AsyncConnection, id: str, status: str, now: float, *, file: str | None = None) -> None:
    """An upload that the transaction holds is over: drop its parts, and note their blobs dead.

    Args:
        status: completed or cancelled.
        now: Unix seconds.
        file: what it has become, if it is completed; a bare id.
    """
    await connection.execute(sa.update(uploads).where(uploads.c.id == id).values(status=status, file_id=file))
    dropped = await connection.execute(
        sa.delete(upload_parts).where(upload_parts.c.upload_id == id).returning(upload_parts.c.blob_key)
    )
    await dead_blobs.note(connection, dropped.scalars().all(), now)


async def sweep(connection: AsyncConnection, now: int, limit: int) -> int:
    """End what has expired, drop parts of it and note their blobs dead, and forget uploads a day after they expired.

    Call it again while it finds something, each time in a transaction of its own: what one call does is bounded. Any
    number of callers may do so at once.

    Args:
        now: Unix seconds.
        limit: at most so many uploads end, so many parts are dropped, and so many uploads are forgotten.

    Returns:
        How many rows it has changed or dropped; 0 when there is nothing left to do for now.
    """
    ended = await _some(
        connection, sa.select(uploads.c.id).where(uploads.c.status == "pending", uploads.c.expires_at <= now), limit
    )
    await connection.execute(sa.update(uploads).where(uploads.c.id.in_(ended)).values(status="expired"))
    # Of the uploads that have ended, only expired ones still have parts.
    left = await _some(
        connection,
        sa.select(upload_parts.c.seq)
        .join(uploads, upload_parts.c.upload_id == uploads.c.id)
        .where(uploads.c.status == "expired"),
        limit,
    )
    dropped = await connection.execute(
        sa.delete(upload_parts).where(upload_parts.c.seq.in_(left)).returning(upload_parts.c.blob_key)
    )
    await dead_blobs.note(connection, dropped.scalars().all(), now)
    has_parts = sa.exists().where(upload_parts.c.upload_id == uploads.c.id)
    old = await _some(
        connection,
        sa.select(uploads.c.id).where(uploads.c.status != "pending", uploads.c.expires_at <= now - KEPT, ~has_parts),
        limit,
    )
    await connection.execute(sa.delete(uploads).where(uploads.c.id.in_(old)))
    return len(ended) + len(left) + len(old)


async def _some(connection: AsyncConnection, query: sa.Select[Any], limit: int) -> list[Any]:
    """The first column of up to `limit` rows, which the transaction then holds; what others hold is left to them."""
    found = await connection.execute(query.limit(limit).with_for_update(skip_locked=True))
    return list(found.scalars())
