"""An engine without its HTTP face: a worker in this process over a real database and folder, against the simulator."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from batchery.engine.pool import Destination
from batchery.engine.worker import Worker, WorkerSettings
from batchery.store import batches, files, line_index, results
from batchery.store.batches import BatchRow
from batchery.store.blobs import BlobStore, new_key, open_folder, write_whole
from batchery.store.database import Database
from batchery.store.files import FileRow
from batchery.store.ids import new_id
from batchery.upstreams.base import Upstream
from batchery.wire.lines import Limits
from batchery.wire.results import Kind
from batchery.wire.validation import validate


class Rig:
    """The durable side, and what tests do with it.

    Args:
        url: of an empty database.
        folder: for the blobs.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.database = Database(url)
        self.blobs: BlobStore = open_folder(folder)

    async def upload(self, lines: Iterable[bytes]) -> str:
        """Store an input file, as the server does; its bare id."""
        data = b"".join(lines)
        report = validate([data], Limits(), lambda start, length: data[start : start + length])
        assert report.ok, report.problems
        id = new_id()
        file = await write_whole(self.blobs, new_key("files", id), [data])
        index = await write_whole(self.blobs, new_key("index", id), line_index.encode(report.index))
        async with self.database.write() as connection:
            await files.insert(
                connection,
                id=id,
                owner="local",
                purpose="batch",
                filename="input.jsonl",
                status="processed",
                bytes=file.size,
                created_at=int(time.time()),
                blob_key=file.key,
                sha256=file.sha256,
                lines=report.lines,
                requests=len(report.index),
                models=files.encode_models(report.index.models),
                index_key=index.key,
            )
        return id

    async def create(self, file: str, *, window: int = 86_400) -> str:
        """Create a batch over it, as the server does; its bare id."""
        id, output = new_id(), new_id()
        now = int(time.time())
        async with self.database.write() as connection:
            row = await files.get(connection, file)
            assert row is not None
            await batches.insert(
                connection,
                id=id,
                owner="local",
                endpoint="/v1/chat/completions",
                input_file=file,
                window=f"{window}s",
                status="validating",
                output_file=output,
                created_at=now,
                expires_at=now + window,
                total=row.requests,
                metadata=batches.encode_metadata({}),
                has_log=True,
            )
            await files.insert(
                connection,
                **files.growing_file(id=output, owner="local", purpose="batch_output", batch=id, created_at=now),
            )
        return id

    async def batch(self, id: str) -> BatchRow:
        """The batch as it is now."""
        async with self.database.read() as connection:
            row = await batches.get(connection, id)
        assert row is not None
        return row

    async def file(self, id: str | None) -> FileRow:
        """A file as it is now."""
        assert id is not None
        async with self.database.read() as connection:
            row = await files.get(connection, id)
        assert row is not None
        return row

    async def until(self, id: str, reached: Callable[[BatchRow], bool], timeout: float = 30) -> BatchRow:
        """Wait until a batch is as wanted."""
        deadline = time.monotonic() + timeout
        while True:
            row = await self.batch(id)
            if reached(row):
                return row
            assert time.monotonic() < deadline, f"the batch is still {row}"
            await asyncio.sleep(0.01)

    async def ended(self, id: str, timeout: float = 30) -> BatchRow:
        """Wait until a batch has ended."""
        ends = ("completed", "failed", "expired", "cancelled")
        return await self.until(id, lambda row: row.status in ends, timeout)

    async def lines(self, id: str | None) -> list[dict[str, Any]]:
        """The lines of a finished file; none for no file."""
        if id is None:
            return []
        row = await self.file(id)
        assert row.blob_key is not None
        data = b"".join([piece async for piece in self.blobs.stream(row.blob_key)])
        assert len(data) == row.size
        found = [json.loads(line) for line in data.split(b"\n")[:-1]]
        assert data.endswith(b"\n") or not data
        assert len(found) == row.lines
        return found

    async def log(self, batch: str, kind: Kind) -> bytes:
        """What the log holds of a growing file."""
        position, data = 0, b""
        async with self.database.read() as connection:
            while segments := await results.read(connection, batch, kind, position):
                for segment in segments:
                    assert segment.position == position
                    data += segment.body
                    position += len(segment.ends)
        return data

    @asynccontextmanager
    async def working(self, upstream: Upstream | list[Destination], **settings: Any) -> AsyncIterator[Worker]:
        """A worker that runs while the block does."""
        await self.database.migrate()
        worker = make_worker(self, upstream, **settings)
        running = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.stop()
            await running


def make_worker(rig: Rig, upstream: Upstream | list[Destination], **settings: Any) -> Worker:
    """A worker that does not run yet; of the settings, those of an upstream are for the one that is given."""
    of_worker = {name: settings.pop(name) for name in WorkerSettings.__struct_fields__ if name in settings}
    destinations = upstream if isinstance(upstream, list) else [Destination(upstream=upstream, **settings)]
    return Worker(rig.database, rig.blobs, destinations, WorkerSettings(**of_worker))
