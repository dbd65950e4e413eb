"""The queries over `workers`, on both databases."""

from __future__ import annotations

import msgspec

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
        assert await workers.beat(connection, first.id, 99.25, 12.5)
        assert not await workers.beat(connection, "c" * 32, 99.25, 7.0)
        found = {row.id: row.heartbeat_at for row in await workers.all_workers(connection)}
        assert found == {first.id: 99.25, second.id: 1.5}
        await workers.beat(connection, second.id, 50.0, 2.0)
        rates = [await workers.total_rate(connection, since) for since in (50.0, 50.5, 99.5)]
        assert rates == [14.5, 12.5, 0.0]
        second = msgspec.structs.replace(second, heartbeat_at=50.0, rate=2.0)
        await workers.remove(connection, [first.id, "c" * 32])
        assert await workers.all_workers(connection) == [second]
        upstream = workers.UpstreamSnapshot(name="u", limit=7, attempts={"200": 3})
        said = workers.Snapshot(upstreams=[upstream], commit_results=workers.Distribution([1.0], [2, 1], 9.0))
        await workers.beat(connection, second.id, 60.0, 2.0, said)
        (row,) = await workers.all_workers(connection)
        assert row.snapshot is not None
        assert workers.decode_snapshot(row.snapshot) == said
        await workers.beat(connection, second.id, 50.0, 2.0)
        await workers.remove(connection, [])
        assert await workers.all_workers(connection) == [second]
