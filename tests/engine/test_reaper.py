"""The reaper: ended windows, dead workers and forgotten logs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.engine import finaliser as finaliser_module
from batchery.engine.finaliser import Finaliser
from batchery.engine.fleet import Fleet
from batchery.engine.reader import Reader
from batchery.engine.reaper import GONE_AFTER, Reaper
from batchery.store import batches, results, schema, shards, workers
from batchery.store.ids import new_id
from batchery.store.workers import WorkerRow
from tests.engine.rig import Rig
from tests.store.examples import add_batch, claim_any, segment


def reaper(rig: Rig, worker: str = "me") -> Reaper:
    finaliser = Finaliser(rig.database, rig.blobs, Reader(rig.database, rig.blobs), worker, 10.0)
    return Reaper(rig.database, finaliser, Fleet(worker), worker, platform.node())


async def add_worker(rig: Rig, id: str, *, host: str | None = None, pid: int = 0, silent: float = 0.0) -> str:
    """A worker with a leased shard and a leased batch; the shard's batch."""
    now = time.time()
    async with rig.database.write() as connection:
        row = WorkerRow(
            id=id,
            host=host or platform.node(),
            pid=pid or os.getpid(),
            version="1",
            started_at=now - silent,
            heartbeat_at=now - silent,
        )
        await workers.insert(connection, row)
        batch = await add_batch(connection, expires_at=int(now) + 1000)
        await shards.insert(connection, [shards.Plan(batch, int(now) + 1000, [("m", b"\0\0\0\0")])])
        assert len(await claim_any(connection, id, 1, now, now + 1000)) == 1
        await add_batch(
            connection, status="validating", expires_at=int(now) + 1000, lease_owner=id, lease_until=now + 1000
        )
    return batch


async def left_of_log(rig: Rig, batch: str) -> list[int]:
    """The positions of the segments that a batch's log still has."""
    async with rig.database.read() as connection:
        table = schema.results.c
        found = await connection.execute(sa.select(table.position).where(table.batch_id == batch))
        return list(found.scalars())


async def free(rig: Rig) -> tuple[int, int]:
    """How many shards and waiting batches nobody holds."""
    now = time.time()
    async with rig.database.write() as connection:
        leased = await claim_any(connection, new_id(), 99, now, now)
        planning = 0
        while await batches.claim(connection, new_id(), ("validating",), now, now + 1):
            planning += 1
    return len(leased), planning


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


async def test_a_dead_worker_of_this_machine_is_buried(rig: Rig, dead_pid: int) -> None:
    await add_worker(rig, "dead", pid=dead_pid)
    await add_worker(rig, "alive")
    await add_worker(rig, "elsewhere", host="other", pid=dead_pid)
    assert await reaper(rig).bury(alone=False) == 1
    async with rig.database.read() as connection:
        assert {row.id for row in await workers.all_workers(connection)} == {"alive", "elsewhere"}
    assert await free(rig) == (1, 1)


async def test_alone_every_other_worker_is_dead(rig: Rig) -> None:
    await add_worker(rig, "same process id")
    await add_worker(rig, "elsewhere", host="other")
    await add_worker(rig, "me")
    assert await reaper(rig).bury(alone=True) == 2
    assert await free(rig) == (2, 2)


async def test_nobody_to_bury(rig: Rig) -> None:
    assert await reaper(rig).bury(alone=True) == 0


async def test_a_silent_worker_is_forgotten(rig: Rig) -> None:
    await add_worker(rig, "silent", host="other", silent=GONE_AFTER + 1)
    await add_worker(rig, "alive", host="other", silent=GONE_AFTER - 5)
    await add_worker(rig, "me", silent=GONE_AFTER + 1)
    assert not await reaper(rig).reap()
    async with rig.database.read() as connection:
        assert {row.id for row in await workers.all_workers(connection)} == {"alive", "me"}
    assert await free(rig) == (1, 1)


async def test_a_worker_of_this_machine_that_dies_later_is_noticed_at_once(rig: Rig, dead_pid: int) -> None:
    await add_worker(rig, "dead", pid=dead_pid)
    await add_worker(rig, "alive")
    assert not await reaper(rig).reap()
    async with rig.database.read() as connection:
        assert {row.id for row in await workers.all_workers(connection)} == {"alive"}
    assert await free(rig) == (1, 1)


async def test_windows_that_have_ended(rig: Rig) -> None:
    now = int(time.time())
    async with rig.database.write() as connection:
        ids = {
            status: await add_batch(connection, status=status, expires_at=now - 1)
            for status in ("validating", "in_progress", "finalizing", "cancelling", "completed")
        }
        later = await add_batch(connection, expires_at=now + 100)
    assert await reaper(rig).reap()
    rows = {status: await rig.batch(id) for status, id in ids.items()}
    assert {status: row.status for status, row in rows.items()} == {
        "validating": "finalizing",
        "in_progress": "finalizing",
        "finalizing": "finalizing",
        "cancelling": "cancelling",
        "completed": "completed",
    }
    assert {row.ending for row in (rows["validating"], rows["in_progress"])} == {"expired"}
    assert rows["finalizing"].ending is None
    assert (await rig.batch(later)).status == "in_progress"
    assert not await reaper(rig).reap()


async def test_logs_that_a_crash_left_are_dropped(rig: Rig) -> None:
    async with rig.database.write() as connection:
        ended = await add_batch(connection, status="completed", has_log=True)
        running = await add_batch(connection, has_log=True)
        for batch in (ended, running):
            await results.insert(connection, [segment(batch, "output", i, [b"x\n"]) for i in range(100)])
    await reaper(rig).drop_old_logs()
    assert await rig.log(ended, "output") == b""
    assert not (await rig.batch(ended)).has_log
    assert len(await rig.log(running, "output")) == 200
    assert (await rig.batch(running)).has_log


async def test_the_log_of_a_batch_that_lives_again_is_kept(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry in the middle of dropping the old log, and one between finding the batch and dropping anything."""
    monkeypatch.setattr(finaliser_module, "DROP_SEGMENTS", 10)
    async with rig.database.write() as connection:
        batch = await add_batch(connection, status="completed", has_log=True)
        await results.insert(connection, [segment(batch, "output", i, [b"x\n"]) for i in range(100)])
    real = results.drop_some
    steps = 0

    async def drop_some(connection: AsyncConnection, id: str, segments: int) -> int:
        nonlocal steps
        steps += 1
        if steps == 3:
            await batches.change_many(connection, [{"id": id, "status": "validating"}])
        return await real(connection, id, segments)

    monkeypatch.setattr(results, "drop_some", drop_some)
    await reaper(rig).drop_old_logs()
    assert steps == 3
    monkeypatch.undo()
    assert len(await left_of_log(rig, batch)) == 70

    finaliser = Finaliser(rig.database, rig.blobs, Reader(rig.database, rig.blobs), "me", 10.0)
    for status in ("validating", "in_progress", "finalizing", "cancelling"):
        async with rig.database.write() as connection:
            await batches.change_many(connection, [{"id": batch, "status": status}])
        await finaliser.drop_log(batch)
    assert len(await left_of_log(rig, batch)) == 70
    assert (await rig.batch(batch)).has_log
    await finaliser.drop_log(new_id())  # a batch that was deleted meanwhile
