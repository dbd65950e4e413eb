"""The reader: a shard's requests, byte for byte, whether their lines lie together or far apart."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchery.engine import reader as reader_module
from batchery.engine.reader import Reader
from batchery.engine.work import LeasedShard
from batchery.store.blobs import write_whole
from batchery.store.errors import StoreUnavailable
from batchery.store.shards import ShardRow
from tests.engine.rig import Rig
from tests.requests import chat_line


def shard_of(batch: str, requests: list[int]) -> LeasedShard:
    return LeasedShard(
        ShardRow(
            id=1,
            batch_id=batch,
            model="m",
            deadline=0,
            requests=array("I", requests).tobytes(),
            done=None,
            lease_owner="w",
            lease_until=0.0,
            epoch=1,
        )
    )


async def read_all(reader: Reader, shard: LeasedShard) -> list[tuple[int, int, str, bytes]]:
    found = []
    while shard.unread:
        before = len(shard.unread)
        works = await reader.take(shard)
        assert len(works) == before - len(shard.unread) > 0
        found += [(work.place, work.request, work.custom_id, bytes(work.body)) for work in works]
    return found


@pytest.mark.parametrize(
    ("piece_bytes", "sizes"),
    [(1024 * 1024, [10] * 300), (5_000, [2_000] * 50), (1_000, [5_000] * 10), (100_000, [10, 50_000] * 20)],
)
@pytest.mark.parametrize("step", [1, -1, 7, 13])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_requests_come_as_they_were_written(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, piece_bytes: int, sizes: list[int], step: int
) -> None:
    monkeypatch.setattr(reader_module, "PIECE_BYTES", piece_bytes)
    lines = [chat_line(f"é{i}", "x" * size) for i, size in enumerate(sizes)]
    batch = await rig.create(await rig.upload(lines))
    requests = list(range(len(sizes)))[::step]
    found = await read_all(Reader(rig.database, rig.blobs), shard_of(batch, requests))
    assert [(place, request) for place, request, _, _ in found] == list(enumerate(requests))
    for _, request, custom_id, body in found:
        assert custom_id == f"é{request}"
        assert body in lines[request]
        assert body.startswith(b"{")
    ids = await Reader(rig.database, rig.blobs).custom_ids(batch, sorted(requests))
    assert ids == [f"é{request}" for request in sorted(requests)]


async def test_a_file_with_a_mark_blank_lines_and_carriage_returns(rig: Rig) -> None:
    lines = [
        b"\xef\xbb\xbf",
        chat_line("a", "1"),
        b"\n \n",
        chat_line("b", "2")[:-1] + b"\r\n",
        chat_line("c", "3")[:-1],
    ]
    batch = await rig.create(await rig.upload(lines))
    found = await read_all(Reader(rig.database, rig.blobs), shard_of(batch, [2, 0, 1]))
    assert [(request, custom_id) for _, request, custom_id, _ in found] == [(2, "c"), (0, "a"), (1, "b")]


async def test_a_shard_is_as_before_when_it_cannot_be_read(rig: Rig) -> None:
    file = await rig.upload([chat_line("a", "1"), chat_line("b", "2")])
    batch = await rig.create(file)
    row = await rig.file(file)
    assert row.blob_key is not None
    reader, shard = Reader(rig.database, rig.blobs), shard_of(batch, [0, 1])
    await reader.index(batch)
    data = await rig.blobs.read(row.blob_key, 0, row.size)
    for broken in ([], [data[:50]], [data[:-5]]):
        await write_whole(rig.blobs, row.blob_key, broken)
        with pytest.raises(StoreUnavailable):
            await reader.take(shard)
        assert shard.unread == [(1, 1), (0, 0)]
    await write_whole(rig.blobs, row.blob_key, [data])
    assert len(await read_all(reader, shard)) == 2


async def test_a_damaged_index_is_not_the_end_of_the_worker(rig: Rig) -> None:
    file = await rig.upload([chat_line("a", "1")])
    batch = await rig.create(file)
    row = await rig.file(file)
    assert row.index_key is not None
    await write_whole(rig.blobs, row.index_key, [b"nonsense"])
    with pytest.raises(StoreUnavailable, match="damaged"):
        await Reader(rig.database, rig.blobs).index(batch)
    with pytest.raises(StoreUnavailable, match="gone"):
        await Reader(rig.database, rig.blobs).index("0" * 32)


async def test_indexes_are_kept_only_while_there_is_room(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "INDEX_CACHE_BYTES", 3_000)
    reader = Reader(rig.database, rig.blobs)
    for i in range(5):
        batch = await rig.create(await rig.upload([chat_line("a", str(i))]))
        assert len(await reader.index(batch)) == 1
        assert len(reader._inputs) <= 2


@given(st.lists(st.integers(0, 40), unique=True, min_size=1), st.integers(1, 3_000), st.integers(1, 20))
@settings(max_examples=20)
def test_any_order_and_any_piece(
    tmp_path_factory: pytest.TempPathFactory, requests: list[int], piece_bytes: int, piece_requests: int
) -> None:
    import asyncio

    from batchery.store.database import sqlite_url

    async def check(folder: Path) -> None:
        rig = Rig(sqlite_url(folder / "a.db"), folder / "blobs")
        await rig.database.migrate()
        batch = await rig.create(await rig.upload(chat_line(f"{i}", "x" * (i * 37 % 400)) for i in range(41)))
        found = await read_all(Reader(rig.database, rig.blobs), shard_of(batch, requests))
        assert [(request, int(custom_id)) for _, request, custom_id, _ in found] == [(i, i) for i in requests]
        await rig.database.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "PIECE_BYTES", piece_bytes)
        patch.setattr(reader_module, "PIECE_REQUESTS", piece_requests)
        asyncio.run(check(tmp_path_factory.mktemp("reader")))
