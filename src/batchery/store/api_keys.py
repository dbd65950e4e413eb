"""Queries over `api_keys`, and making a key: who may use a server, and how much of it.

A key is kept as its SHA-256 only. Passwords need a slow hash because people choose ones that can be guessed; a key has
256 random bits, so nobody can try them all however fast the hash is, and the fast one can be taken on every request.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.rows import all_typed, typed
from batchery.store.schema import api_keys

HINT = 4
"""Characters of a key's end that are kept to tell it by; 232 of its bits stay unknown."""

FORM = re.compile(r"sk-[A-Za-z0-9_-]{43}", re.ASCII)
"""What every key looks like."""

LOCAL_OWNER = "local"
"""Who owns what is made while there are no keys, and a key's owner unless another is named."""


class KeyRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `api_keys`."""

    seq: int
    id: str
    owner: str
    hash: str
    hint: str
    created_at: int
    revoked_at: int | None
    max_queued_requests: int | None
    max_live_batches: int | None
    max_upload_bytes: int | None
    webhook_url: str | None
    webhook_secret: str | None
    weight: int


_select = sa.select(api_keys)


def new_key() -> str:
    """A key that nobody has: `sk-` and 43 URL-safe characters, from 32 random bytes."""
    return "sk-" + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """What is kept of a key, and what it is found by."""
    return hashlib.sha256(key.encode()).hexdigest()


async def insert(connection: AsyncConnection, *, id: str, key: str, owner: str, now: int, **more: Any) -> None:
    """Add a key.

    Args:
        id: its bare id.
        key: the key itself, of which only the digest and the last characters are kept.
        owner: of everything that is made with it.
        now: Unix seconds.
        more: other columns: limits, weight and the webhook.
    """
    columns = {"id": id, "hash": digest(key), "hint": key[-HINT:], "owner": owner, "created_at": now} | more
    await connection.execute(sa.insert(api_keys).values(**columns))


async def get(connection: AsyncConnection, id: str) -> KeyRow | None:
    """The key with this bare id, revoked or not."""
    return typed(KeyRow, (await connection.execute(_select.where(api_keys.c.id == id))).one_or_none())


async def all_keys(connection: AsyncConnection) -> list[KeyRow]:
    """Every key there ever was, the oldest first."""
    return all_typed(KeyRow, await connection.execute(_select.order_by(api_keys.c.seq)))


async def active(connection: AsyncConnection) -> list[KeyRow]:
    """Every key that is not revoked."""
    return all_typed(KeyRow, await connection.execute(_select.where(api_keys.c.revoked_at.is_(None))))


async def were_made(connection: AsyncConnection) -> bool:
    """Whether there ever was a key, revoked or not."""
    return (await connection.execute(sa.select(api_keys.c.seq).limit(1))).first() is not None


async def lock(connection: AsyncConnection, id: str) -> None:
    """Hold a key until the end of the transaction, so that two callers cannot both use up the last of its limit."""
    await connection.execute(sa.select(api_keys.c.seq).where(api_keys.c.id == id).with_for_update())


async def change(connection: AsyncConnection, id: str, changes: Mapping[str, Any]) -> None:
    """Change some columns of a key."""
    await connection.execute(sa.update(api_keys).where(api_keys.c.id == id).values(**changes))
