"""A server and a worker together in this process, over a real database and folder, against the simulator."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from batchery.engine.pool import Destination
from batchery.engine.worker import Worker, WorkerSettings
from batchery.store.database import Database
from batchery.upstreams.http import HttpUpstream
from batchery.upstreams.simulator import Behaviour, RunningSimulator, running_simulator
from tests.server.rig import Answer, Rig, running

TERMINAL = ("completed", "failed", "expired", "cancelled")


class Whole:
    """What tests do with it.

    Args:
        rig: the server.
        simulator: the upstream.
    """

    def __init__(self, rig: Rig, simulator: RunningSimulator, database: Database) -> None:
        self.rig = rig
        self.simulator = simulator
        self._database = database
        self._worker: Worker | None = None

    def wake(self) -> None:
        """Tell the worker, if there is one, that there is something new."""
        if self._worker is not None:
            self._worker.wake()

    @asynccontextmanager
    async def working(self, **settings: Any) -> AsyncIterator[None]:
        """A worker, while the block runs."""
        upstream = HttpUpstream(self.simulator.url, timeout=30)
        of_worker = {name: settings.pop(name) for name in WorkerSettings.__struct_fields__ if name in settings}
        destination = Destination(upstream=upstream, **settings)
        worker = Worker(self._database, self.rig.context.blobs, [destination], WorkerSettings(**of_worker))
        running = asyncio.create_task(worker.run())
        self._worker = worker
        try:
            yield
        finally:
            self._worker = None
            worker.stop()
            await running
            await upstream.close()

    async def batch(self, data: bytes, **more: Any) -> dict[str, Any]:
        """Upload a file and create a batch over it; its object."""
        file = await self.rig.upload(data)
        answer = await self.rig.create(file["id"], **more)
        assert answer.status == 200, answer
        created: dict[str, Any] = answer.json
        return created

    async def get(self, batch: str) -> dict[str, Any]:
        """A batch as it is now."""
        answer = await self.rig.ask("GET", f"/v1/batches/{batch}")
        assert answer.status == 200, answer
        found: dict[str, Any] = answer.json
        return found

    async def until(self, batch: str, *statuses: str, timeout: float = 30) -> dict[str, Any]:
        """Wait until a batch has one of these statuses; any of the last ones if none is named."""
        deadline = time.monotonic() + timeout
        while True:
            found = await self.get(batch)
            if found["status"] in (statuses or TERMINAL):
                return found
            assert time.monotonic() < deadline, f"the batch is still {found}"
            await asyncio.sleep(0.01)

    async def retry(self, batch: str) -> Answer:
        """Ask for a retry."""
        return await self.rig.ask("POST", f"/v1/batches/{batch}/retry")

    async def content(self, file: str | None, query: str = "") -> list[dict[str, Any]]:
        """The lines of a file."""
        assert file is not None
        answer = await self.rig.ask("GET", f"/v1/files/{file}/content{query}")
        assert answer.status == 200, answer
        return [json.loads(line) for line in answer.body.split(b"\n")[:-1]]

    async def results(self, batch: str, query: str = "") -> list[dict[str, Any]]:
        """The lines of `/results`."""
        answer = await self.rig.ask("GET", f"/v1/batches/{batch}/results{query}")
        assert answer.status == 200, answer
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        return [json.loads(line) for line in answer.body.split(b"\n")[:-1]]


@asynccontextmanager
async def whole(url: str, folder: Path, behaviour: Behaviour | None = None, **changes: Any) -> AsyncIterator[Whole]:
    """A server, and a simulator to run against; start workers with `working`.

    Args:
        url: of an empty database.
        folder: for the blobs.
        behaviour: of the simulator.
        changes: to the server's context.
    """
    holder: list[Whole] = []

    def wake() -> None:
        for one in holder:
            one.wake()

    async with (
        running_simulator(behaviour or Behaviour()) as simulator,
        running(url, folder, wake=wake, **changes) as rig,
    ):
        database = Database(url)
        try:
            one = Whole(rig, simulator, database)
            holder.append(one)
            yield one
        finally:
            await database.close()
