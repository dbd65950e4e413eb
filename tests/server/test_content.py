"""The content of files: which lines are sent, and that they are the right ones while the file grows and is finished."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchery.server import content
from batchery.server.content import after_lines, slice_of, stream, stream_bytes
from batchery.store import blobs as blob_store
from batchery.store import files, results
from batchery.store.errors import StoreUnavailable
from batchery.store.files import FileRow
from batchery.store.ids import new_id
from tests.requests import chat_file
from tests.server.rig import Growing, Rig

CONTENT = st.lists(st.binary(max_size=6).map(lambda line: line.replace(b"\n", b"") + b"\n"), max_size=30)


def joined(lines: Iterable[bytes]) -> bytes:
    return b"".join(lines)


@given(lines=st.integers(0, 50), growing=st.booleans(), offset=st.integers(0, 60), limit=st.none() | st.integers(1, 60))
def test_a_slice_follows_the_contract(lines: int, growing: bool, offset: int, limit: int | None) -> None:
    part = slice_of(lines, growing=growing, offset=offset, limit=limit)
    wanted = list(range(lines))[offset:][:limit]
    assert list(range(part.first, part.end)) == wanted
    assert part.last_line == (wanted[-1] + 1 if wanted else lines)
    assert part.incomplete == (growing or part.last_line < lines)
    assert part.whole == (wanted == list(range(lines)) and not growing)


@given(st.lists(st.sampled_from([b"\n", b"a", b"bc"])).map(joined), st.data())
def test_a_line_is_found_by_counting_breaks(piece: bytes, data: st.DataObject) -> None:
    lines = data.draw(st.integers(0, piece.count(b"\n")))
    assert piece[: after_lines(piece, lines)] == b"".join(piece.splitlines(keepends=True)[:lines])


async def row_of(rig: Rig, id: str) -> FileRow:
    async with rig.context.database.read() as connection:
        row = await files.get(connection, id)
    assert row is not None
    return row


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
async def test_a_file_reads_right_whatever_becomes_of_it_meanwhile(either: Rig, data: st.DataObject) -> None:
    """It may be finished while it is read, and its batch run again, any number of times, and old blobs deleted."""
    growing = Growing(either.context)
    await growing.begin()

    async def grow() -> None:
        for _ in range(data.draw(st.integers(0, 4), "segments")):
            await growing.grow(*data.draw(st.lists(st.binary(max_size=9).map(_line), min_size=1, max_size=5), "lines"))

    live = True

    async def go_on() -> None:
        nonlocal live
        if live:
            await growing.finish(b"added at the end\n", drop=data.draw(st.sampled_from([0, 1, 3, 1000]), "drop"))
        else:
            await growing.grow_again()
        live = not live
        if live:
            await grow()
        if data.draw(st.booleans(), "sweep"):
            await growing.sweep()

    await grow()
    for _ in range(data.draw(st.integers(0, 3), "changes before")):
        await go_on()
    row = await row_of(either, growing.file)
    known = len(growing.lines)
    assert (row.lines, row.size, row.grows) == (known, len(joined(growing.lines)), live)
    offset = data.draw(st.integers(0, known + 2), "offset")
    limit = data.draw(st.none() | st.integers(1, known + 2), "limit")
    changes = data.draw(st.lists(st.integers(0, 3), max_size=4), "pieces read before each change")
    if not row.grows and data.draw(st.booleans(), "by bytes"):
        start = data.draw(st.integers(0, row.size), "start")
        end = data.draw(st.integers(start, row.size), "end")
        wanted = joined(growing.lines[:known])[start:end]
        pieces = stream_bytes(either.context, row, start, end)
    else:
        wanted = joined(growing.lines[:known][offset:][:limit])
        pieces = stream(either.context, row, slice_of(row.lines, growing=row.grows, offset=offset, limit=limit))
    read = b""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content, "SEGMENTS", 2)
        patch.setattr(blob_store, "READ", 7)
        for count in changes:
            for _ in range(count):
                read += await anext(pieces, b"")
            await go_on()
        async for piece in pieces:
            read += piece
    assert read == wanted


async def test_large_segments_of_the_log_are_read_one_at_a_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    growing = Growing(rig.context)
    await growing.begin()
    for size in (1, 1, 1, 1, 1, 600, 600, 600, 600, 1, 1):
        await growing.grow(b"x" * size + b"\n")
    monkeypatch.setattr(content, "SEGMENT_BYTES", 1000)
    real = results.read
    asked = []

    async def counted(*arguments: Any, segments: int) -> Any:
        asked.append(segments)
        return await real(*arguments, segments=segments)

    monkeypatch.setattr(results, "read", counted)
    part = slice_of(11, growing=True, offset=0, limit=None)
    pieces = [piece async for piece in stream(rig.context, await row_of(rig, growing.file), part)]
    assert pieces == growing.lines
    assert asked == [1, 4, 4, 1, 4]  # so many by the size of the one before


@pytest.mark.parametrize("accept", ["identity", "gzip", "zstd"])
async def test_a_file_that_is_deleted_while_it_is_sent_is_cut_off(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, accept: str
) -> None:
    monkeypatch.setattr(blob_store, "READ", 10_000)
    real = type(rig.context.blobs).read
    for query in ("", "?offset=1", "?limit=1000"):
        growing = Growing(rig.context)
        await growing.begin()
        await growing.grow(*(chat_file(2000, padding=1000).splitlines(keepends=True)))
        await growing.finish()
        reads = 0

        async def deleting(
            self: blob_store.BlobStore, key: str, start: int, length: int, growing: Growing = growing
        ) -> bytes:
            nonlocal reads
            reads += 1
            if reads == 5:
                await growing.delete()
            return await real(self, key, start, length)

        monkeypatch.setattr(type(rig.context.blobs), "read", deleting)
        with pytest.raises(aiohttp.ClientPayloadError):
            await rig.ask("GET", f"/v1/files/{growing.file}/content{query}", headers={"Accept-Encoding": accept})
        monkeypatch.setattr(type(rig.context.blobs), "read", real)
        assert (await rig.ask("GET", f"/v1/files/{growing.file}/content{query}")).status == 404


async def test_a_later_file_in_the_same_log_is_not_taken_for_this_one(either: Rig) -> None:
    """A batch that is run again writes its errors to a new file, whose lines begin in the log at 0 again."""
    growing = Growing(either.context)
    await growing.begin()
    for _ in range(6):
        await growing.grow(b"mine\n")
    row = await row_of(either, growing.file)
    pieces = stream(either.context, row, slice_of(6, growing=True, offset=0, limit=None))
    read = await anext(pieces)
    await growing.finish()
    await growing.grow_again()
    await either.set_batch(growing.batch, output_file=new_id(), output_lines=0, output_bytes=0)
    growing.lines = []
    for _ in range(6):
        await growing.grow(b"not mine\n")
    async for piece in pieces:
        read += piece
    assert read == b"mine\n" * 6


async def test_a_log_that_is_gone_without_a_blob_is_an_error_and_no_endless_search(rig: Rig) -> None:
    growing = Growing(rig.context)
    await growing.begin()
    await growing.grow(b"a\n")
    await growing.grow(b"b\n")
    row = await row_of(rig, growing.file)
    await growing.drop(1)
    pieces = stream(rig.context, row, slice_of(2, growing=True, offset=0, limit=None))
    assert await anext(pieces) == b"a\n"
    with pytest.raises(StoreUnavailable, match="from 1 on"):
        await anext(pieces)


@pytest.mark.parametrize("finish_after", range(4))
async def test_whatever_is_dropped_of_a_finished_log_the_reader_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, finish_after: int
) -> None:
    monkeypatch.setattr(content, "SEGMENTS", 3)
    for dropped in range(16):
        growing = Growing(rig.context)
        await growing.begin()
        for segment in range(4):
            await growing.grow(b"%d first\n" % segment, b"%d second\n" % segment)
        row = await row_of(rig, growing.file)
        before = joined(growing.lines)
        read = b""

        async def end(growing: Growing = growing, dropped: int = dropped) -> None:
            await growing.finish(b"added at the end\n", drop=0)
            await growing.drop(*(2 * segment for segment in range(4) if dropped >> segment & 1))

        if finish_after == 0:
            await end()
        count = 0
        async with asyncio.timeout(10):
            async for piece in stream(rig.context, row, slice_of(8, growing=True, offset=0, limit=None)):
                read += piece
                count += 1
                if count == finish_after:
                    await end()
        assert read == before


def _line(text: bytes) -> bytes:
    return text.replace(b"\n", b" ") + b"\n"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=CONTENT,
    last=st.binary(max_size=5).map(lambda text: text.replace(b"\n", b"")),
    offset=st.integers(0, 35),
    limit=st.none() | st.integers(1, 35),
    read=st.integers(1, 40),
)
async def test_any_lines_of_a_finished_file(
    rig: Rig, lines: list[bytes], last: bytes, offset: int, limit: int | None, read: int
) -> None:
    data = joined(lines) + last
    every = [*lines, last] if last else lines
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blob_store, "READ", read)
        uploaded = await rig.upload(data)
        query = f"?offset={offset}" + ("" if limit is None else f"&limit={limit}")
        answer = await rig.ask("GET", f"/v1/files/{uploaded['id']}/content{query}")
    wanted = every[offset:][:limit]
    end = offset + len(wanted) if wanted else len(every)
    assert answer.body == joined(wanted)
    assert answer.headers["x-last-line"] == str(end)
    assert answer.headers["x-incomplete"] == ("true" if end < len(every) else "false")


async def test_a_resume_by_last_line_loses_and_repeats_nothing(either: Rig) -> None:
    growing = Growing(either.context)
    await growing.begin()
    got, position, seen = b"", 0, []

    async def catch_up(limit: str = "") -> None:
        nonlocal got, position
        answer = await either.ask("GET", f"/ai/v1/files/file-{growing.file}/content?skip={position}{limit}")
        assert answer.status == 200
        got += answer.body
        position = int(answer.headers["x-last-line"])
        seen.append(answer.headers["x-incomplete"])

    await catch_up()
    for i in range(5):
        await growing.grow(b"%d a\n" % i, b"%d b\n" % i)
        await catch_up("&limit=1" if i == 2 else "")
    await growing.finish(b"the last\n")
    await catch_up("&limit=1")
    await catch_up()
    await catch_up()
    assert got == joined(growing.lines)
    assert seen[-1] == "false"
    assert set(seen[:-3]) == {"true"}


async def test_finished_content_has_its_length(rig: Rig) -> None:
    data = chat_file(100)
    uploaded = await rig.upload(data)
    answer = await rig.ask("GET", f"/v1/files/{uploaded['id']}/content", headers={"Accept-Encoding": "identity"})
    assert answer.headers["content-length"] == str(len(data))
    same = await rig.ask("GET", f"/v1/files/{uploaded['id']}/content?offset=3&skip=3&limit=2")
    assert same.body == joined(data.splitlines(keepends=True)[3:5])


async def test_a_download_that_breaks_is_seen_to_be_broken(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = await rig.upload(chat_file(2000, padding=1000))
    monkeypatch.setattr(blob_store, "READ", 10_000)
    real = type(rig.context.blobs).read
    reads = 0

    async def failing(self: blob_store.BlobStore, key: str, start: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        if reads > 5:
            raise StoreUnavailable("gone")
        return await real(self, key, start, length)

    monkeypatch.setattr(type(rig.context.blobs), "read", failing)
    for query in ("", "?offset=1"):
        reads = 0
        with pytest.raises(aiohttp.ClientPayloadError):
            await rig.ask("GET", f"/v1/files/{uploaded['id']}/content{query}")


async def test_a_slow_reader_is_waited_for_and_a_lost_one_is_forgotten(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uploaded = await rig.upload(chat_file(16_000, padding=2_000))
    real = type(rig.context.blobs).read
    reads = 0

    async def counted(self: blob_store.BlobStore, key: str, start: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        return await real(self, key, start, length)

    monkeypatch.setattr(type(rig.context.blobs), "read", counted)
    pieces = uploaded["bytes"] // blob_store.READ
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=1000)
    writer.write(f"GET /v1/files/{uploaded['id']}/content HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    for _ in range(20):  # whoever serves others has had the time to read on
        await rig.ask("GET", "/healthz")
    assert reads < pieces / 2, "the server reads ahead of a client that does not take what it is given"
    before = asyncio.all_tasks()
    writer.transport.abort()
    for _ in range(20):
        await rig.ask("GET", "/healthz")
    assert reads < pieces / 2, "the server reads on for nobody"
    assert len(asyncio.all_tasks()) < len(before)
