"""What `batchery keys` does in the server's database, which it finds as `batchery serve` does and brings up to date.

Whatever stands in the way is said in plain words, and ends the command.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from batchery.cli.options import fail
from batchery.server.settings import Settings
from batchery.store import api_keys
from batchery.store.api_keys import KeyRow
from batchery.store.database import Database
from batchery.store.errors import StoreError
from batchery.store.ids import new_id
from batchery.wire import ids


def moment(seconds: int) -> str:
    """Unix seconds for people."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%SZ}"


def new_secret() -> str:
    """A webhook secret as Standard Webhooks has it."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


async def create(settings: Settings, owner: str, columns: dict[str, Any]) -> tuple[str, str]:
    """Make a key; it, and its id as it is shown."""
    id, key = new_id(), api_keys.new_key()
    async with _opened(settings, make=True) as database, database.write() as connection:
        await api_keys.insert(connection, id=id, key=key, owner=owner, now=int(time.time()), **columns)
    return key, ids.show("key", id)


async def all_keys(settings: Settings) -> list[KeyRow]:
    """Every key there ever was."""
    async with _opened(settings) as database, database.read() as connection:
        return await api_keys.all_keys(connection)


async def update(settings: Settings, id: str, changes: dict[str, Any]) -> str | None:
    """Change a key; the webhook secret that was made because it had none and needs one now."""
    secret, shown = None, ids.show("key", id)
    async with _opened(settings) as database, database.write() as connection:
        row = await api_keys.get(connection, id)
        if row is None:
            fail(f"there is no key {shown}; see 'batchery keys list'")
        if row.revoked_at is not None:
            fail(f"{shown} was revoked at {moment(row.revoked_at)}; make a new key")
        url = changes.get("webhook_url", row.webhook_url)
        if url is None and changes.get("webhook_secret") is not None:
            fail(f"{shown} has no webhook to sign for; give --webhook-url as well")
        if url is not None and changes.get("webhook_secret", row.webhook_secret) is None:
            secret = changes["webhook_secret"] = new_secret()
        await api_keys.change(connection, id, changes)
    return secret


async def revoke(settings: Settings, id: str) -> int | None:
    """Revoke a key; since when it has been revoked already, if it has."""
    async with _opened(settings) as database, database.write() as connection:
        row = await api_keys.get(connection, id)
        if row is None:
            fail(f"there is no key {ids.show('key', id)}; see 'batchery keys list'")
        if row.revoked_at is None:
            await api_keys.change(connection, id, {"revoked_at": int(time.time())})
        return row.revoked_at


@asynccontextmanager
async def _opened(settings: Settings, *, make: bool = False) -> AsyncIterator[Database]:
    """The server's database, at the schema of this version.

    Args:
        make: whether one is made where there is none.

    Raises:
        typer.Exit: there is none, or it cannot be used; said in plain words.
    """
    nothing = "there is no batchery database in {}; name the server's --data-dir or --database, or run 'keys create'"
    if settings.uses_folder and make:
        try:
            settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            fail(f"cannot make the data folder {settings.data_dir}: {error.strerror}")
    database = Database(settings.database_url)
    try:
        if not make and not _exists(settings):
            fail(nothing.format(place(settings)))
        await database.ping()
        if not make and await database.revision() is None:
            fail(nothing.format(place(settings)))
        await database.migrate()
        yield database
    except StoreError as error:
        fail(f"the database cannot be used: {str(error).partition(chr(10))[0]}")
    finally:
        await database.close()


def place(settings: Settings) -> str:
    """Where the keys are, for people; without a password."""
    return str(settings.data_dir) if settings.uses_folder else sa.make_url(settings.database_url).render_as_string()


def _exists(settings: Settings) -> bool:
    """Whether there is a database, as far as can be told without opening it, which would make an SQLite file."""
    url = sa.make_url(settings.database_url)
    return url.get_backend_name() != "sqlite" or Path(url.database or "").is_file()
