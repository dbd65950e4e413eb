"""The queries over `workers`, on both databases."""

from __future__ import annotations

from batchery.store import workers
from batchery.store.database import Database
from batchery.store.workers import WorkerRow


async def test_a_worker_s_life(database: Database) -> None:
    first, second = (
        WorkerRow(id=letter * 32, host="höst", pid=2**22, version="1", started_at=1.5, heartbeat_at=1.5)
        for letter in "ab"
    )
    async with database.write() as connection:
        assert await workers.all_workers(connection) == []
        await workers.insert(connection, first)
        await workers.insert(connection, second)
        await workers.beat(connection, first.id, 99.25)
        await workers.beat(connection, "c" * 32, 99.25)
        found = {row.id: row.heartbeat_at for row in await workers.all_workers(connection)}
        assert found == {first.id: 99.25, second.id: 1.5}
        await workers.remove(connection, [first.id, "c" * 32])
        assert await workers.all_workers(connection) == [second]
        await workers.remove(connection, [])
        assert await workers.all_workers(connection) == [second]
