"""What tests of waiting and of event streams need: a batch that the test leads through its life, and a reader."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa

from batchery.server import app
from batchery.server.context import Context
from batchery.server.watch import Hub
from batchery.store import batches, files, results, schema
from batchery.store.ids import new_id
from batchery.wire.results import Kind
from tests.server.rig import Rig, running
from tests.store.examples import add_batch, segment


class Life:
    """A batch that does what the test says, as the recorder, the finaliser and a retry would do it.

    Args:
        context: whose database and blobs.

    Attributes:
        output: the lines of its output file so far.
        errors: the lines of each of its error files, by id.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.id = new_id()
        self.output_file = new_id()
        self.error_file: str | None = None
        self.output: list[bytes] = []
        self.errors: dict[str, list[bytes]] = {}
        self._logged = 0

    @property
    def path(self) -> str:
        """Where the batch is served."""
        return f"/v1/batches/batch_{self.id}"

    async def begin(self, owner: str = "local") -> Life:
        """Make the batch and its output file."""
        async with self._context.database.write() as connection:
            await add_batch(
                connection, id=self.id, owner=owner, output_file=self.output_file, total=1_000, has_log=True
            )
            await files.insert(
                connection,
                **files.growing_file(
                    id=self.output_file, owner=owner, purpose="batch_output", batch=self.id, created_at=1
                ),
            )
        return self

    async def set(self, **values: Any) -> None:
        """Change the batch's row."""
        async with self._context.database.write() as connection:
            await batches.change_many(connection, [{"id": self.id} | values])

    async def grow(self, output: list[bytes] | None = None, errors: list[bytes] | None = None) -> None:
        """Record results, in one transaction."""
        kinds: list[tuple[Kind, list[bytes], list[bytes]]] = []
        async with self._context.database.write() as connection:
            if output:
                kinds.append(("output", self.output, output))
            if errors:
                if self.error_file is None:
                    await self._new_error_file(connection)
                assert self.error_file is not None
                kinds.append(("error", self.errors[self.error_file], errors))
            for kind, known, more in kinds:
                await results.insert(connection, [segment(self.id, kind, len(known), [line + b"\n" for line in more])])
                known.extend(more)
            await batches.change_many(connection, [self._columns()])

    async def _new_error_file(self, connection: Any) -> None:
        self.error_file = new_id()
        self.errors[self.error_file] = []
        await files.insert(
            connection,
            **files.growing_file(id=self.error_file, owner="local", purpose="batch_error", batch=self.id, created_at=1),
        )

    def _columns(self) -> dict[str, Any]:
        errors = [] if self.error_file is None else self.errors[self.error_file]
        return {
            "id": self.id,
            "completed": len(self.output),
            "failed": len(errors),
            "output_lines": len(self.output),
            "output_bytes": sum(len(line) + 1 for line in self.output),
            "error_lines": len(errors),
            "error_bytes": sum(len(line) + 1 for line in errors),
            "error_file": self.error_file,
        }

    async def finish(
        self, status: str = "completed", never_ran: list[bytes] | None = None, *, drop: bool = True
    ) -> None:
        """End it, with error lines for requests that never ran; their number is in the file's row only."""
        columns = self._columns()
        if never_ran and self.error_file is None:
            async with self._context.database.write() as connection:
                await self._new_error_file(connection)
        produced = [(self.output_file, self.output)]
        if self.error_file is not None:
            self.errors[self.error_file] += never_ran or []
            produced.append((self.error_file, self.errors[self.error_file]))
        stamp = {f"{status}_at": 3}
        blobs = []
        for id, lines in produced:
            async with self._context.blobs.write(f"done/{new_id()}") as writer:
                await writer.write(b"".join(line + b"\n" for line in lines))
                await writer.close()
            blobs.append((id, lines, writer))
        async with self._context.database.write() as connection:
            for id, lines, writer in blobs:
                await files.finish(
                    connection,
                    id,
                    blob_key=writer.key,
                    size=writer.size,
                    lines=len(lines),
                    sha256=writer.sha256,
                    expires_at=None,
                )
            await batches.change_many(connection, [columns | {"status": status, "error_file": self.error_file} | stamp])
            if drop:
                await self._drop(connection)

    async def _drop(self, connection: Any) -> None:
        await connection.execute(sa.delete(schema.results).where(schema.results.c.batch_id == self.id))

    async def retry(self) -> None:
        """Run what has failed again: the output file grows on, errors go to another file."""
        self.error_file = None
        async with self._context.database.write() as connection:
            await self._drop(connection)
            again = {"status": "in_progress", "failed_at": None, "completed_at": None, "expired_at": None}
            await batches.change_many(connection, [self._columns() | again | {"cancelled_at": None}])


@dataclass
class Event:
    """One server-sent event."""

    id: str
    name: str
    raw: bytes

    @property
    def data(self) -> Any:
        """The data, parsed."""
        return json.loads(self.raw)


class Events:
    """The events of an answer, as they come; strict about their form.

    Args:
        answer: to read.
    """

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.answer = answer
        self.comments: list[bytes] = []
        self.retry: int | None = None
        self._read = b""

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> Event:
        fields: dict[str, bytes] = {}
        while True:
            while b"\n" not in self._read:
                piece = await self.answer.content.readany()
                if not piece:
                    assert not self._read, f"the stream ended in the middle of {self._read[:80]!r}"
                    assert not fields, f"the stream ended in the middle of an event: {fields}"
                    raise StopAsyncIteration
                self._read += piece
            line, _, self._read = self._read.partition(b"\n")
            assert b"\r" not in line
            if line.startswith(b":"):
                self.comments.append(line)
            elif line.startswith(b"retry: "):
                self.retry = int(line[7:])
            elif line:
                name, _, value = line.partition(b": ")
                assert name.decode() not in fields
                fields[name.decode()] = value
            elif fields:
                assert list(fields) == ["id", "event", "data"]
                return Event(fields["id"].decode(), fields["event"].decode(), fields["data"])

    async def until(self, name: str) -> Event:
        """The next event with this name; those before it are passed over."""
        async for event in self:
            if event.name == name:
                return event
        raise AssertionError(f"the stream ended before an event {name}")


@asynccontextmanager
async def follow(rig: Rig, batch: Life, query: str = "", last: str | None = None) -> AsyncIterator[Events]:
    """A stream of a batch's events."""
    headers = {} if last is None else {"Last-Event-ID": last}
    async with rig.http.get(f"{rig.base}{batch.path}/events{query}", headers=headers) as answer:
        assert answer.status == 200, await answer.read()
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        yield Events(answer)


@dataclass
class Watched:
    """A server whose hub the test can look into."""

    rig: Rig
    hub: Hub


@asynccontextmanager
async def watched(url: str, folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    """A server while the block runs; it looks often, so that tests are quick."""
    hubs: list[Hub] = []

    def recorded(*arguments: Any) -> Hub:
        hubs.append(Hub(*arguments))
        return hubs[-1]

    patch.setattr(app, "Hub", recorded)
    patch.setattr("batchery.server.watch.INTERVAL", 0.01)
    async with running(url, folder) as rig:
        yield Watched(rig, hubs[0])
    assert hubs[0].watching == 0
