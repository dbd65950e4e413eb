"""`batchery worker` and its database: one that is not there yet is waited for."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from batchery.cli.worker_database import NewerDatabaseError, wait_for_database
from batchery.store.database import REVISION, Database, sqlite_url
from tests.processes import wait_for

NOWHERE = "http://127.0.0.1:9"


async def at(database: Database, revision: str) -> None:
    """Say that the database is at a migration."""
    async with database.write() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})


async def test_what_is_waited_for(database_url: str) -> None:
    database = Database(database_url)
    stop = asyncio.Event()
    waiting = asyncio.create_task(wait_for_database(database, stop))
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done, "an empty one cannot be used"
    await database.migrate()
    await at(database, "0001")
    done, _ = await asyncio.wait([waiting], timeout=1.5)
    assert not done, "an earlier version cannot be used"
    await at(database, REVISION)
    assert await waiting
    await at(database, "9999")
    with pytest.raises(NewerDatabaseError, match="upgrade batchery"):
        await wait_for_database(database, stop)
    await database.close()


async def test_a_wait_can_be_ended() -> None:
    database = Database("postgresql+asyncpg://nobody@127.0.0.1:9/nothing")
    stop = asyncio.Event()
    waiting = asyncio.create_task(wait_for_database(database, stop))
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done
    stop.set()
    assert not await waiting
    await database.close()


def test_a_worker_that_is_started_first(tmp_path: Path) -> None:
    data = tmp_path / "data"
    command = ["worker", "--data-dir", str(data), "--upstream", NOWHERE]
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, "-m", "batchery", *command], stderr=stderr)
    wait_for(lambda: "batchery serve" in log.read_text(), 30, "the worker's reason to wait")
    assert data.stat().st_mode & 0o077 == 0

    async def migrate() -> None:
        database = Database(sqlite_url(data / "batchery.db"))
        await database.migrate()
        await database.close()

    asyncio.run(migrate())
    wait_for(lambda: "worker started" in log.read_text(), 30, "the worker's start")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert "Traceback" not in log.read_text()
