"""Queries over `dead_blobs`: blobs that nothing refers to any more, and that are to be deleted.

A key is noted in the transaction that takes the last reference away, and the blob is deleted afterwards: a crash in
between leaves the note, and so never a blob that nobody knows of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.schema import dead_blobs


async def note(connection: AsyncConnection, keys: Iterable[str | None], now: float) -> None:
    """These blobs are referred to no more.

    Args:
        keys: of the blobs; None is passed over.
        now: Unix seconds.
    """
    rows = [{"key": key, "since": now} for key in keys if key is not None]
    if rows:
        insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        await connection.execute(insert(dead_blobs).on_conflict_do_nothing(), rows)


async def claim(connection: AsyncConnection, now: float, grace: float, limit: int) -> list[str]:
    """Take blobs that were noted at least a grace ago, to delete them, the oldest first.

    Nobody else gets them for another grace. Whoever fails to delete them need not give them back: then they are due
    again.

    Args:
        now: Unix seconds.
        grace: in seconds.
        limit: at most so many.
    """
    found = await connection.execute(
        sa.select(dead_blobs.c.key)
        .where(dead_blobs.c.since <= now - grace)
        .order_by(dead_blobs.c.since)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    keys = list(found.scalars())
    if keys:
        await connection.execute(sa.update(dead_blobs).where(dead_blobs.c.key.in_(keys)).values(since=now))
    return keys


async def forget(connection: AsyncConnection, keys: Sequence[str]) -> None:
    """These blobs have been deleted."""
    await connection.execute(sa.delete(dead_blobs).where(dead_blobs.c.key.in_(keys)))
