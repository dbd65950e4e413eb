"""Small batches are finished together, and what befalls one of them leaves the others as they are."""

from __future__ import annotations

import time
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from batchery.engine import lease as lease_module
from batchery.engine import small_batches as small_module
from batchery.engine.lease import BatchLeases
from batchery.engine.reader import Reader, read_results
from batchery.engine.small_batches import SmallBatches
from batchery.store import batches, results, small_indexes
from batchery.store.blobs import BlobStore
from batchery.store.errors import StoreFull, StoreUnavailable
from tests.databases import around_writes
from tests.engine.rig import Rig
from tests.engine.test_finaliser import blobs_in, blobs_of, cancel, finaliser, finish_one, names, recorded


def small(rig: Rig, worker: str = "w") -> SmallBatches:
    reader = Reader(rig.database, rig.blobs)
    return SmallBatches(rig.database, rig.blobs, reader, BatchLeases(rig.database, worker), worker, 10.0)


async def statuses(rig: Rig, ids: Sequence[str]) -> list[str]:
    return [(await rig.batch(id)).status for id in ids]


async def is_done(rig: Rig, id: str) -> None:
    """Everything that a batch of three good and two bad answers ends with is there, and nothing else."""
    row = await rig.batch(id)
    assert (row.status, row.has_log, row.lease_owner) == ("completed", False, None)
    assert await names(rig, row.output_file) == ["r0", "r1", "r2"]
    assert await names(rig, row.error_file) == ["r3", "r4"]
    async with rig.database.read() as connection:
        assert await results.of_batches(connection, [id]) == []
    index = await read_results(rig.database, rig.blobs, row)
    assert index is not None
    assert list(index.statuses) == [1, 1, 1, 2, 2]
    assert list(index.numbers) == [1, 2, 3, 4, 5]
    for file, requests in ((row.output_file, (0, 1, 2)), (row.error_file, (3, 4))):
        key = (await rig.file(file)).blob_key
        assert key is not None
        content = await rig.blobs.read_whole(key)
        for request in requests:
            line = content[index.starts[request] : index.starts[request] + index.lengths[request]]
            assert f'"custom_id":"r{request}"'.encode() in line
            assert line.count(b"\n") == 1
            assert line.endswith(b"\n")


async def test_several_are_finished_in_two_transactions(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [await recorded(rig) for _ in range(5)]
    written = []

    @asynccontextmanager
    async def counted() -> AsyncIterator[None]:
        written.append(1)
        yield

    around_writes(monkeypatch, counted)
    one = small(rig)
    rows = await one.claim()
    assert {row.id for row in rows} == set(ids)
    assert await small(rig, "v").claim() == []
    await one.finish(rows)
    assert len(written) == 2
    for id in ids:
        await is_done(rig, id)
    assert await one.claim() == []
    expected = [key for id in ids for key in await blobs_of(rig, id)]
    assert blobs_in(rig) == set(expected)


async def test_one_that_is_cancelled_meanwhile_is_left_to_the_finaliser(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [await recorded(rig) for _ in range(3)]
    put_many = BlobStore.put_many

    async def put_and_cancel(self: BlobStore, blobs: Any) -> None:
        await put_many(self, blobs)
        await cancel(rig, ids[1])

    monkeypatch.setattr(BlobStore, "put_many", put_and_cancel)
    one = small(rig)
    await one.finish(await one.claim())
    assert await statuses(rig, ids) == ["completed", "cancelling", "completed"]
    assert (await rig.batch(ids[1])).lease_owner is None
    assert blobs_in(rig) == {key for id in (ids[0], ids[2]) for key in await blobs_of(rig, id)}
    assert await one.claim() == []
    assert await finish_one(finaliser(rig))
    row = await rig.batch(ids[1])
    assert (row.status, row.completed) == ("cancelled", 3)
    assert await names(rig, row.output_file) == ["r0", "r1", "r2"]


async def test_one_that_another_has_taken_is_his(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """This worker stood still for longer than its lease."""
    ids = [await recorded(rig) for _ in range(2)]
    put_many = BlobStore.put_many

    async def put_late(self: BlobStore, blobs: Any) -> None:
        await put_many(self, blobs)
        monkeypatch.undo()
        async with rig.database.write() as connection:
            await batches.change_many(
                connection, [{"id": ids[0], "lease_owner": "v", "lease_until": time.time() + 10.0}]
            )

    monkeypatch.setattr(BlobStore, "put_many", put_late)
    one = small(rig)
    await one.finish(await one.claim())
    row = await rig.batch(ids[0])
    assert (row.status, row.lease_owner, row.has_log) == ("finalizing", "v", True)
    assert blobs_in(rig) == await blobs_of(rig, ids[1])
    await is_done(rig, ids[1])
    async with rig.database.write() as connection:
        await batches.release(connection, ["v"])
    other = small(rig, "v")
    await other.finish(await other.claim())
    await is_done(rig, ids[0])


@pytest.mark.parametrize("where", ["blobs", "database"])
async def test_no_room_leaves_nothing_and_is_tried_again(rig: Rig, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    ids = [await recorded(rig) for _ in range(2)]

    async def fail(*_: Any) -> None:
        raise StoreFull("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lease_module, "PUT_OFF", -1.0)
        if where == "blobs":
            patch.setattr("batchery.store.blobs._fsync", lambda *_: _full())
        else:
            patch.setattr(results, "drop_of", fail)
        one = small(rig)
        with pytest.raises(StoreFull):
            await one.finish(await one.claim())
    assert blobs_in(rig) == set()
    assert await statuses(rig, ids) == ["finalizing"] * 2
    await one.finish(await one.claim())
    for id in ids:
        await is_done(rig, id)


def _full() -> None:
    raise OSError(28, "No space left on device")


async def test_a_commit_that_only_seemed_to_fail_keeps_its_files(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    id = await recorded(rig)

    @asynccontextmanager
    async def ambiguous() -> AsyncIterator[None]:
        yield
        if (await rig.batch(id)).status == "completed":
            monkeypatch.undo()
            raise StoreUnavailable("the connection was lost while it committed")

    around_writes(monkeypatch, ambiguous)
    one = small(rig)
    rows = await one.claim()
    with pytest.raises(StoreUnavailable):
        await one.finish(rows)
    await is_done(rig, id)


async def test_one_that_cannot_be_read_is_put_off_and_the_others_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = await recorded(rig), await recorded(rig)
    numbers = Reader.numbers

    async def fail(self: Reader, batch: str) -> array[int]:
        if batch == bad:
            raise StoreUnavailable("away")
        return await numbers(self, batch)

    monkeypatch.setattr(Reader, "numbers", fail)
    one = small(rig)
    with pytest.raises(StoreUnavailable):
        await one.finish(await one.claim())
    await is_done(rig, good)
    row = await rig.batch(bad)
    assert row.status == "finalizing"
    assert row.lease_until is not None
    assert row.lease_until <= time.time() + lease_module.PUT_OFF


async def test_what_takes_more_is_not_small(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    id = await recorded(rig)
    row = await rig.batch(id)
    assert small_module.is_small(row)
    with monkeypatch.context() as patch:
        patch.setattr(small_module, "SMALL_BYTES", row.output_bytes + row.error_bytes - 1)
        assert await small(rig).claim() == []
    with monkeypatch.context() as patch:
        patch.setattr(small_module, "SMALL_REQUESTS", row.total - 1)
        assert await small(rig).claim() == []
    async with rig.database.write() as connection:
        await batches.change_many(connection, [{"id": id, "run_done": 1}])  # as if it had run before
    assert await small(rig).claim() == []
    missing = await recorded(rig, missing=1)
    await cancel(rig, missing)
    assert await small(rig).claim() == []


@pytest.mark.parametrize("most", [117, 116])  # 12 bytes and 21 for each of five requests
async def test_an_index_is_a_row_or_a_blob(rig: Rig, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    id = await recorded(rig)
    monkeypatch.setattr(small_indexes, "MAX_BYTES", most)
    one = small(rig)
    await one.finish(await one.claim())
    await is_done(rig, id)
    row = await rig.batch(id)
    async with rig.database.read() as connection:
        assert (await small_indexes.get(connection, row.seq) is not None) == (most == 117)
    assert (row.result_index == small_indexes.HERE) == (most == 117)


async def test_the_row_goes_when_the_batch_ends_again(rig: Rig) -> None:
    id = await recorded(rig)
    one = small(rig)
    await one.finish(await one.claim())
    async with rig.database.write() as connection:  # as if all had run again
        await batches.change_many(connection, [{"id": id, "status": "finalizing", "ending": "completed"}])
    assert await finish_one(finaliser(rig))
    row = await rig.batch(id)
    assert (row.result_index or "").startswith("results/")
    index = await read_results(rig.database, rig.blobs, row)
    assert index is not None
    assert list(index.numbers) == [1, 2, 3, 4, 5]
    async with rig.database.read() as connection:
        assert await small_indexes.get(connection, row.seq) is None


async def test_not_more_are_taken_than_fit(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [await recorded(rig) for _ in range(3)]
    row = await rig.batch(ids[0])
    monkeypatch.setattr(small_module, "AT_ONCE_BYTES", 2 * (row.output_bytes + row.error_bytes))
    one = small(rig)
    assert len(await one.claim()) == 2
    assert len(await one.claim()) == 1
