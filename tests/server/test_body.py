"""Request bodies that come slowly, never, or in too great a number."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from batchery.server.body import SMALL
from batchery.store.database import sqlite_url
from tests.requests import chat_file
from tests.server.rig import BOUNDARY, Answer, Rig, field_part, file_part, form, running

HEAD = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
LARGE = b"--%b\r\n" % BOUNDARY.encode() + file_part(b"x" * (2 * SMALL))


class Sender:
    """A connection that sends a body as it pleases."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """A chunk of a chunked body."""
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """The answer's status and body."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        body = await asyncio.wait_for(self.reader.readexactly(int(length.split(b":")[1])), 10)
        return int(head.split()[1]), body


@contextlib.asynccontextmanager
async def sender(rig: Rig, head: str = HEAD) -> AsyncIterator[Sender]:
    """A connection on which the head of a chunked upload has been sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    try:
        writer.write(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        yield Sender(reader, writer)
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_rate": 1000, "rate_window": 0.3}, "less than 1000 bytes a second for 0.3 seconds"),
        ({"idle_timeout": 0.3}, "No byte of the request body came for 0.3 seconds"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
async def test_who_sends_nothing_is_given_up(changes: dict[str, float], said: str, path: str, tmp_path: Path) -> None:
    async with running(sqlite_url(tmp_path / "b.db"), tmp_path, **changes) as rig:
        async with sender(rig, HEAD.replace("/v1/files", path)) as client:
            await client.send(b"-")
            status, body = await client.answer()
        assert status == 408
        assert said in body.decode()
        assert b"request_timeout" in body
        assert rig.left_behind() == []


async def test_who_only_trickles_is_given_up(tmp_path: Path) -> None:
    async with running(sqlite_url(tmp_path / "b.db"), tmp_path, min_rate=1000, rate_window=0.3) as rig:
        async with sender(rig) as client:

            async def trickle() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        await client.send(b"-")
                        await asyncio.sleep(0.02)

            trickling = asyncio.create_task(trickle())
            # While it goes on trickling, the last byte of the answer is kept back.
            answer = await asyncio.wait_for(client.reader.readuntil(b"1000 bytes a second"), 10)
            trickling.cancel()
        assert answer.startswith(b"HTTP/1.1 408 ")


async def test_who_is_fast_and_then_stops_is_given_up(tmp_path: Path) -> None:
    """What came before does not buy time for ever."""
    async with running(sqlite_url(tmp_path / "b.db"), tmp_path, min_rate=1000, rate_window=0.2) as rig:
        async with sender(rig) as client:
            await client.send(LARGE)
            status, body = await client.answer()
        assert status == 408
        assert b"less than 1000 bytes a second" in body
        assert rig.left_behind() == []


async def test_who_sends_slowly_but_fast_enough_is_served(tmp_path: Path) -> None:
    async with running(sqlite_url(tmp_path / "b.db"), tmp_path, min_rate=100, rate_window=0.3) as rig:
        body = form(file_part(chat_file(6)), field_part("purpose", "batch"))
        pieces = [body[start : start + 100] for start in range(0, len(body), 100)]
        assert len(pieces) > 8

        async def slowly() -> AsyncIterator[bytes]:
            for piece in pieces:
                await asyncio.sleep(0.1)
                yield piece

        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        assert (await rig.ask("POST", "/v1/files", data=slowly(), headers=kind)).status == 200


def too_many(answer: Answer) -> None:
    assert answer.status == 429
    assert answer.error()["code"] == "too_many_uploads"
    assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_large_uploads_are_taken_in_so_many_at_a_time(tmp_path: Path) -> None:
    async with (
        running(sqlite_url(tmp_path / "b.db"), tmp_path, max_uploads=2) as rig,
        contextlib.AsyncExitStack() as on,
    ):
        clients = [await on.enter_async_context(sender(rig)) for _ in range(2)]
        for client in clients:
            await client.send(LARGE)
        body = form(file_part(chat_file(1000)))
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        async with asyncio.timeout(10):
            while (await rig.ask("POST", "/v1/files", data=body, headers=kind)).status == 200:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        too_many(await rig.ask("POST", "/v1/files", data=body, headers=kind))
        # The answer comes before the body, where the length is announced; and else as soon as the body is large.
        too_many(await rig.raw(HEAD.encode() + b"Content-Length: 1000000\r\n\r\n", finish=False))
        async with sender(rig) as third:
            await third.send(LARGE)
            assert (await third.answer())[0] == 429
        # Small files need no place, and everything else goes on.
        assert (await rig.upload(chat_file(3)))["status"] == "processed"
        assert (await rig.ask("GET", "/v1/files")).status == 200
        # Whoever goes away, or ends, gives the place back.
        clients[0].writer.close()
        await clients[1].send(b"\r\n--%b--\r\n" % BOUNDARY.encode())
        await clients[1].send(b"")
        async with asyncio.timeout(10):
            while (await rig.ask("POST", "/v1/files", data=body, headers=kind)).status == 429:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_clients_who_trickle_do_not_keep_others_from_uploading(tmp_path: Path) -> None:
    async with (
        running(sqlite_url(tmp_path / "b.db"), tmp_path, max_uploads=1) as rig,
        contextlib.AsyncExitStack() as on,
    ):
        for _ in range(50):
            client = await on.enter_async_context(sender(rig))
            await client.send(b"--%b\r\n" % BOUNDARY.encode() + file_part(b"x"))
        body = form(file_part(chat_file(1000)))
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        assert len(body) > SMALL
        assert (await rig.ask("POST", "/v1/files", data=body, headers=kind)).status == 200
