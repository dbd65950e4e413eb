"""A server in this process, and what tests do with it."""

from __future__ import annotations

import asyncio
import json
import re
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import openai
import sqlalchemy as sa

from batchery.server.app import create_app
from batchery.server.context import Context
from batchery.server.http import serve_http
from batchery.server.port import take_port
from batchery.store import batches, files, results, schema
from batchery.store.blobs import open_folder
from batchery.store.database import Database
from batchery.store.ids import new_id
from batchery.store.results import Segment
from batchery.wire.lines import Limits
from batchery.wire.objects import Model

BOUNDARY = "a-boundary"


@dataclass
class Answer:
    """An HTTP answer, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """The error that every failure must be, in full shape."""
        assert self.headers["content-type"] == "application/json"
        assert re.fullmatch(r"req_[0-9a-f]{32}", self.headers["x-request-id"])
        assert list(self.json) == ["error"]
        error: dict[str, Any] = self.json["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert error["message"]
        return error


@dataclass
class Rig:
    """A server and its durable side."""

    port: int
    context: Context
    folder: Path
    http: aiohttp.ClientSession
    wakes: list[None]
    openai: openai.AsyncOpenAI = field(init=False)

    def __post_init__(self) -> None:
        self.openai = openai.AsyncOpenAI(base_url=f"{self.base}/v1", api_key="sk-any", max_retries=0)

    @property
    def base(self) -> str:
        """Where it is served."""
        return f"http://127.0.0.1:{self.port}"

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        """One request."""
        async with self.http.request(method, self.base + path, allow_redirects=False, **options) as answer:
            return Answer(
                answer.status, {name.lower(): value for name, value in answer.headers.items()}, await answer.read()
            )

    async def raw(self, data: bytes, *, finish: bool = True) -> Answer:
        """Bytes as they are, on a connection of their own.

        Args:
            finish: whether we say, after the last byte, that there will be no more.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            if finish:
                writer.write_eof()
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            status_line, *lines = head.decode().split("\r\n")[:-2]
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await asyncio.wait_for(reader.readexactly(int(headers["content-length"])), 10)
            return Answer(int(status_line.split()[1]), headers, body)
        finally:
            writer.close()

    async def post_form(self, body: bytes, *, content_type: str | None = None) -> Answer:
        """A form as bytes."""
        kind = f"multipart/form-data; boundary={BOUNDARY}" if content_type is None else content_type
        return await self.ask("POST", "/v1/files", data=body, headers={"Content-Type": kind})

    async def upload(self, data: bytes, name: str = "input.jsonl") -> dict[str, Any]:
        """Upload a file; its object."""
        answer = await self.post_form(form(file_part(data, filename=name), field_part("purpose", "batch")))
        assert answer.status == 200, answer
        uploaded: dict[str, Any] = answer.json
        return uploaded

    async def create(self, file: str, **more: Any) -> Answer:
        """Create a batch."""
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"} | more
        return await self.ask("POST", "/v1/batches", json=body)

    def left_behind(self) -> list[str]:
        """Every file in the blob store's folder."""
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    async def set_batch(self, id: str, **values: Any) -> None:
        """Change a batch's row behind the server's back."""
        async with self.context.database.write() as connection:
            await batches.change_many(connection, [{"id": id.removeprefix("batch_")} | values])


def field_part(name: str, value: str) -> bytes:
    """A text field of a form."""
    return b'Content-Disposition: form-data; name="%b"\r\n\r\n%b' % (name.encode(), value.encode())


def file_part(data: bytes, *, name: str = "file", filename: str | None = "input.jsonl") -> bytes:
    """The file of a form."""
    named = b"" if filename is None else b'; filename="%b"' % filename.encode()
    head = b'Content-Disposition: form-data; name="%b"%b\r\nContent-Type: application/octet-stream' % (
        name.encode(),
        named,
    )
    return head + b"\r\n\r\n" + data


def form(*parts: bytes, boundary: str = BOUNDARY) -> bytes:
    """A multipart body."""
    mark = boundary.encode()
    return b"".join(b"--%b\r\n%b\r\n" % (mark, part) for part in parts) + b"--%b--\r\n" % mark


@asynccontextmanager
async def running(url: str, folder: Path, **changes: Any) -> AsyncIterator[Rig]:
    """A server while the block runs.

    Args:
        url: of an empty database.
        folder: for the blobs.
        changes: to the context.
    """
    database = Database(url)
    await database.migrate()
    wakes: list[None] = []

    async def models() -> list[Model]:
        return [Model(id="m")]

    context = Context(
        database=database,
        blobs=open_folder(folder / "blobs"),
        limits=Limits(),
        windows=("24h", "1h"),
        wake=lambda: wakes.append(None),
        list_models=models,
        may_be_open=True,
    )
    context = replace(context, **changes)
    stop, ready = context.stopping, asyncio.Event()
    port = take_port("127.0.0.1", 0)
    serving = asyncio.create_task(serve_http(create_app(context), port, stop, ready.set))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    try:
        if serving.done():
            serving.result()
        async with aiohttp.ClientSession() as session:
            rig = Rig(port.number, context, folder / "blobs", session, wakes)
            try:
                yield rig
            finally:
                await rig.openai.close()
    finally:
        waiting.cancel()
        port.close()
        stop.set()
        await serving
        await database.close()


async def until(reached: Any, timeout: float = 10) -> None:
    """Wait for a condition, with a deadline."""
    deadline = asyncio.get_running_loop().time() + timeout
    while not reached():
        assert asyncio.get_running_loop().time() < deadline, "the condition was not reached in time"
        await asyncio.sleep(0.005)


class Growing:
    """The output file of a batch, grown by hand.

    Args:
        context: whose database and blobs.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.batch = new_id()
        self.file = new_id()
        self.lines: list[bytes] = []
        self.blobs: list[str] = []
        """What it was joined into, each time that it was finished."""

    async def begin(self) -> None:
        """Make the batch and the file."""
        async with self._context.database.write() as connection:
            await batches.insert(
                connection,
                id=self.batch,
                owner="local",
                endpoint="/v1/chat/completions",
                input_file=new_id(),
                window="24h",
                status="in_progress",
                output_file=self.file,
                created_at=1,
                expires_at=2,
                total=100,
                metadata=batches.encode_metadata({}),
                has_log=True,
            )
            await files.insert(
                connection,
                **files.growing_file(
                    id=self.file, owner="local", purpose="batch_output", batch=self.batch, created_at=1
                ),
            )

    async def grow(self, *lines: bytes) -> None:
        """Add a segment."""
        ends = array("I")
        for line in lines:
            ends.append((ends[-1] if ends else 0) + len(line))
        segment = Segment(
            batch_id=self.batch,
            kind="output",
            position=len(self.lines),
            requests=array("I", range(len(lines))),
            ends=ends,
            attempts=array("I", [1] * len(lines)),
            body=b"".join(lines),
        )
        self.lines += lines
        async with self._context.database.write() as connection:
            await results.insert(connection, [segment])
            await batches.change_many(
                connection,
                [{"id": self.batch, "output_lines": len(self.lines), "output_bytes": len(b"".join(self.lines))}],
            )

    async def drop(self, *positions: int) -> None:
        """Drop the segments that begin with these lines."""
        async with self._context.database.write() as connection:
            await connection.execute(
                sa.delete(schema.results).where(
                    schema.results.c.batch_id == self.batch, schema.results.c.position.in_(positions)
                )
            )

    async def finish(self, *more: bytes, drop: int = 1000) -> None:
        """Join the log into a blob, with some lines more, and drop so many of its segments."""
        self.lines += more
        async with self._context.blobs.write(f"output/{self.file}-{len(self.blobs)}") as writer:
            await writer.write(b"".join(self.lines))
            await writer.close()
        self.blobs.append(writer.key)
        async with self._context.database.write() as connection:
            await files.finish(
                connection,
                self.file,
                blob_key=writer.key,
                size=writer.size,
                lines=len(self.lines),
                sha256=writer.sha256,
                expires_at=None,
            )
            await batches.change_many(connection, [{"id": self.batch, "status": "completed", "completed_at": 3}])
            await results.drop_some(connection, self.batch, drop)

    async def grow_again(self) -> None:
        """Run the batch again: what there is stays in the blob, and what comes goes to the log."""
        while self.blobs and await self._drop_some():
            pass
        changes = {
            "status": "in_progress",
            "completed_at": None,
            "output_lines": len(self.lines),
            "output_bytes": len(b"".join(self.lines)),
        }
        async with self._context.database.write() as connection:
            await batches.change_many(connection, [{"id": self.batch} | changes])

    async def _drop_some(self) -> int:
        async with self._context.database.write() as connection:
            return await results.drop_some(connection, self.batch, 1000)

    async def sweep(self) -> None:
        """Delete the blobs that later ones have replaced."""
        await self._context.blobs.delete(self.blobs[:-1])

    async def delete(self) -> None:
        """Delete the file, and its blobs."""
        async with self._context.database.write() as connection:
            await connection.execute(sa.delete(schema.files).where(schema.files.c.id == self.file))
        await self._context.blobs.delete(self.blobs)
