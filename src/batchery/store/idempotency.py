"""Queries over `idempotency_keys`: which object a caller's `Idempotency-Key` has made."""

from __future__ import annotations

from typing import Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.schema import idempotency_keys

Kind = Literal["file", "batch"]

KEPT = 86_400
"""Seconds for which a key is remembered."""


class Use(msgspec.Struct, frozen=True):
    """A caller's use of an idempotency key.

    Attributes:
        owner: whose key it is.
        kind: what is created with it; the same key for another kind of object is another key.
        key: the caller's own text.
        fingerprint: SHA-256 of what is asked for, as hex.
    """

    owner: str
    kind: Kind
    key: str
    fingerprint: str


class Made(msgspec.Struct, frozen=True):
    """What a key was used for before.

    Attributes:
        fingerprint: of what was asked for then.
        object_id: of what came of it, bare.
    """

    fingerprint: str
    object_id: str


def _is(owner: str, kind: Kind, key: str) -> sa.ColumnElement[bool]:
    table = idempotency_keys.c
    return sa.and_(table.owner == owner, table.kind == kind, table.key == key)


async def find(connection: AsyncConnection, owner: str, kind: Kind, key: str, now: int) -> Made | None:
    """What a key has made within the last 24 hours."""
    found = await connection.execute(
        sa.select(idempotency_keys.c.fingerprint, idempotency_keys.c.object_id).where(
            _is(owner, kind, key), idempotency_keys.c.created_at > now - KEPT
        )
    )
    row = found.one_or_none()
    return None if row is None else Made(row.fingerprint, row.object_id)


async def claim(connection: AsyncConnection, use: Use, object_id: str, now: int) -> Made | None:
    """Note that a key makes an object, in the transaction that makes it.

    Of two callers with the same key at once, the second waits here until the first has committed.

    Returns:
        None when the key is new; else what it has made, and then nothing is to be made again.
    """
    where = _is(use.owner, use.kind, use.key)
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    while True:  # what stood in the way may be gone before it can be read
        await connection.execute(sa.delete(idempotency_keys).where(where, idempotency_keys.c.created_at <= now - KEPT))
        added = await connection.execute(
            insert(idempotency_keys)
            .values(
                owner=use.owner,
                kind=use.kind,
                key=use.key,
                fingerprint=use.fingerprint,
                object_id=object_id,
                created_at=now,
            )
            .on_conflict_do_nothing()
        )
        if added.rowcount == 1:
            return None
        made = await find(connection, use.owner, use.kind, use.key, now)
        if made is not None:
            return made


async def forget(connection: AsyncConnection, *object_ids: str) -> None:
    """Objects are deleted: their keys may make others."""
    await connection.execute(sa.delete(idempotency_keys).where(idempotency_keys.c.object_id.in_(object_ids)))


async def sweep(connection: AsyncConnection, now: int, limit: int) -> int:
    """Forget up to `limit` of the keys that are older than they are remembered; how many there were."""
    key = sa.tuple_(idempotency_keys.c.owner, idempotency_keys.c.kind, idempotency_keys.c.key)
    old = (
        sa.select(idempotency_keys.c.owner, idempotency_keys.c.kind, idempotency_keys.c.key)
        .where(idempotency_keys.c.created_at <= now - KEPT)
        .order_by(idempotency_keys.c.created_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    done = await connection.execute(sa.delete(idempotency_keys).where(key.in_(old)))
    return done.rowcount
