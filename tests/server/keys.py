"""API keys for tests, made behind the server's back."""

from __future__ import annotations

import time
from typing import Any

from batchery.server.context import Context
from batchery.store import api_keys
from batchery.store.ids import new_id


async def make_key(context: Context, owner: str = "local", **more: Any) -> str:
    """A new key; `more` are its limits and webhook."""
    key = api_keys.new_key()
    async with context.database.write() as connection:
        await api_keys.insert(connection, id=new_id(), key=key, owner=owner, now=int(time.time()), **more)
    return key


async def revoke(context: Context, key: str) -> None:
    """Revoke a key."""
    async with context.database.write() as connection:
        rows = await api_keys.active(connection)
        (id,) = [row.id for row in rows if row.hash == api_keys.digest(key)]
        await api_keys.change(connection, id, {"revoked_at": int(time.time())})


def bearing(key: str) -> dict[str, str]:
    """The headers that carry a key."""
    return {"Authorization": f"Bearer {key}"}
