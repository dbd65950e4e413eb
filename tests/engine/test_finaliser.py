"""The finaliser: nothing is lost however its work is interrupted, and nothing is left lying about."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from batchery.engine import lease as lease_module
from batchery.engine import lifecycle
from batchery.engine.finaliser import Finaliser
from batchery.engine.planner import Planner
from batchery.engine.reader import Reader
from batchery.engine.recorder import Recorder
from batchery.engine.work import LeasedShard, Result, Work
from batchery.store import batches, shards
from batchery.store.blobs import Writer
from batchery.store.errors import StoreFull, StoreUnavailable
from batchery.wire.results import Failure, failure_line, success_line
from tests.databases import around_writes
from tests.engine.rig import Rig
from tests.requests import chat_line
from tests.store.examples import claim_any


async def finish_one(one: Finaliser) -> bool:
    """Finish a batch that is ready for it; whether there was one."""
    row = await one.claim()
    if row is None:
        return False
    await one.finish(row)
    return True


def finaliser(rig: Rig, worker: str = "w") -> Finaliser:
    return Finaliser(rig.database, rig.blobs, Reader(rig.database, rig.blobs), worker, 10.0)


async def recorded(rig: Rig, *, good: int = 3, bad: int = 2, missing: int = 0) -> str:
    """A batch of which this much is recorded; it is finalizing if that is everything."""
    total = good + bad + missing
    id = await rig.create(await rig.upload(chat_line(f"r{i}", f"p{i}") for i in range(total)))
    assert await Planner(rig.database, Reader(rig.database, rig.blobs), "w", 10.0).plan_one() is not None
    async with rig.database.write() as connection:
        (row,) = await claim_any(connection, "w", 9, time.time(), time.time() + 10)
    shard = LeasedShard(row)
    recorder = Recorder(rig.database, "w", 10.0, lambda _: None, lambda *_: None)
    running = asyncio.create_task(recorder.run())
    for i in range(good + bad):
        work = Work(shard, i, i, custom_id=f"r{i}", url="/v1/chat/completions", body=b"{}")
        if i < good:
            recorder.add(Result(work, "output", success_line(f"i{i}", f"r{i}", 200, "x", b"{}"), None))
        else:
            recorder.add(Result(work, "error", failure_line(f"i{i}", f"r{i}", Failure("c", "m")), None))
    recorder.close()
    await running
    async with rig.database.write() as connection:
        await shards.release(connection, ["w"])
    return id


async def cancel(rig: Rig, id: str) -> None:
    async with rig.database.write() as connection:
        row = await batches.get(connection, id, lock=True)
        assert row is not None
        change = lifecycle.cancelled_by_caller(row.status, now=int(time.time()))
        assert change is not None
        assert await batches.change(connection, id, expect=row.status, changes=change)


async def names(rig: Rig, id: str | None) -> list[str]:
    return [line["custom_id"] for line in await rig.lines(id)]


def blobs_in(rig: Rig) -> set[str]:
    assert rig.blobs.folder is not None
    found = (path.relative_to(rig.blobs.folder) for path in rig.blobs.folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if path.parts[0] in ("output", "error")}


async def blobs_of(rig: Rig, id: str) -> set[str]:
    row = await rig.batch(id)
    found = [await rig.file(file) for file in (row.output_file, row.error_file) if file is not None]
    return {file.blob_key for file in found if file.blob_key is not None}


async def test_a_batch_becomes_two_files(rig: Rig) -> None:
    id = await recorded(rig)
    assert await finish_one(finaliser(rig))
    row = await rig.batch(id)
    assert (row.status, row.has_log, row.lease_owner) == ("completed", False, None)
    assert await names(rig, row.output_file) == ["r0", "r1", "r2"]
    assert await names(rig, row.error_file) == ["r3", "r4"]
    assert blobs_in(rig) == await blobs_of(rig, id)
    assert not await finish_one(finaliser(rig))


async def test_without_an_error_there_is_no_error_file(rig: Rig) -> None:
    id = await recorded(rig, bad=0)
    assert await finish_one(finaliser(rig))
    row = await rig.batch(id)
    assert (row.status, row.error_file, len(blobs_in(rig))) == ("completed", None, 1)


async def test_what_never_ran_comes_after_what_failed(rig: Rig) -> None:
    id = await recorded(rig, missing=3)
    await cancel(rig, id)
    assert await finish_one(finaliser(rig))
    row = await rig.batch(id)
    lines = await rig.lines(row.error_file)
    assert [line["custom_id"] for line in lines] == ["r3", "r4", "r5", "r6", "r7"]
    assert [line["error"]["code"] for line in lines] == ["c", "c", *["batch_cancelled"] * 3]
    assert (row.status, row.completed, row.failed) == ("cancelled", 3, 2)


async def test_cancelled_while_its_files_are_written(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded stays, whenever the cancellation comes."""
    id = await recorded(rig)
    close = Writer.close

    async def close_and_cancel(self: Writer) -> None:
        await close(self)
        monkeypatch.undo()
        await cancel(rig, id)

    monkeypatch.setattr(Writer, "close", close_and_cancel)
    assert await finish_one(finaliser(rig))
    row = await rig.batch(id)
    assert (row.status, row.lease_owner, row.has_log) == ("cancelling", None, True)
    assert blobs_in(rig) == set()
    assert await finish_one(finaliser(rig))
    row = await rig.batch(id)
    assert row.status == "cancelled"
    assert await names(rig, row.output_file) == ["r0", "r1", "r2"]
    assert await names(rig, row.error_file) == ["r3", "r4"]
    assert blobs_in(rig) == await blobs_of(rig, id)


async def test_of_two_that_finish_one_batch_one_wins(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stood still for longer than its lease; the second must not find the log gone."""
    id = await recorded(rig)
    close = Writer.close

    async def close_late(self: Writer) -> None:
        await close(self)
        monkeypatch.undo()
        async with rig.database.write() as connection:
            await batches.renew(connection, "w", [id], time.time() - 1)
            row = await batches.claim(connection, "v", ("finalizing",), time.time(), time.time() + 10)
            assert row is not None

    monkeypatch.setattr(Writer, "close", close_late)
    assert await finish_one(finaliser(rig))
    assert blobs_in(rig) == set()
    row = await rig.batch(id)
    assert (row.status, row.lease_owner, row.has_log) == ("finalizing", "v", True)
    async with rig.database.write() as connection:
        await batches.release(connection, ["v"])
    assert await finish_one(finaliser(rig, "v"))
    assert await names(rig, (await rig.batch(id)).output_file) == ["r0", "r1", "r2"]


@pytest.mark.parametrize("failing", [1, 2])
async def test_no_room_leaves_nothing_and_is_tried_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    monkeypatch.setattr(lease_module, "PUT_OFF", -1.0)
    id = await recorded(rig)
    close = Writer.close
    closed = 0

    async def close_or_fail(self: Writer) -> None:
        nonlocal closed
        closed += 1
        if closed == failing:
            raise StoreFull("no space left on device")
        await close(self)

    monkeypatch.setattr(Writer, "close", close_or_fail)
    with pytest.raises(StoreFull):
        await finish_one(finaliser(rig))
    assert blobs_in(rig) == set()
    assert (await rig.batch(id)).status == "finalizing"
    assert await finish_one(finaliser(rig))
    assert await names(rig, (await rig.batch(id)).output_file) == ["r0", "r1", "r2"]


async def test_a_full_database_leaves_no_files(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "PUT_OFF", -1.0)
    id = await recorded(rig)
    change = batches.change

    async def fail(*_: Any, **__: Any) -> bool:
        monkeypatch.setattr(batches, "change", change)
        raise StoreFull("database or disk is full")

    monkeypatch.setattr(batches, "change", fail)
    with pytest.raises(StoreFull):
        await finish_one(finaliser(rig))
    assert blobs_in(rig) == set()
    row = await rig.batch(id)
    assert (row.status, (await rig.file(row.output_file)).blob_key) == ("finalizing", None)
    assert await finish_one(finaliser(rig))
    assert (await rig.batch(id)).status == "completed"


async def test_a_batch_that_cannot_be_finished_lets_others_go_first(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = await recorded(rig), await recorded(rig)
    close = Writer.close
    failing = True

    async def close_or_fail(self: Writer) -> None:
        if failing:
            raise StoreUnavailable("away")
        await close(self)

    monkeypatch.setattr(Writer, "close", close_or_fail)
    one = finaliser(rig)
    with pytest.raises(StoreUnavailable):
        await finish_one(one)
    assert not one.leases.batches
    failing = False
    assert await finish_one(one)
    assert ((await rig.batch(bad)).status, (await rig.batch(good)).status) == ("finalizing", "completed")
    row = await rig.batch(bad)
    assert row.lease_until is not None
    assert row.lease_until <= time.time() + lease_module.PUT_OFF


async def test_a_commit_that_only_seemed_to_fail_keeps_its_files(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    id = await recorded(rig)

    @asynccontextmanager
    async def ambiguous() -> AsyncIterator[None]:
        yield
        row = await rig.batch(id)
        if row.status == "completed" and row.has_log:
            monkeypatch.undo()
            raise StoreUnavailable("the connection was lost while it committed")

    around_writes(monkeypatch, ambiguous)
    with pytest.raises(StoreUnavailable):
        await finish_one(finaliser(rig))
    row = await rig.batch(id)
    assert (row.status, row.lease_owner) == ("completed", None)
    assert await names(rig, row.output_file) == ["r0", "r1", "r2"]
    assert await names(rig, row.error_file) == ["r3", "r4"]


async def test_results_that_come_after_the_end_are_refused(rig: Rig) -> None:
    id = await recorded(rig, missing=1)
    async with rig.database.write() as connection:
        (row,) = await claim_any(connection, "v", 9, time.time(), time.time() + 0.0)
    late = LeasedShard(row)
    await cancel(rig, id)
    assert await finish_one(finaliser(rig))
    recorder = Recorder(rig.database, "v", 10.0, lambda _: None, lambda *_: None)
    running = asyncio.create_task(recorder.run())
    work = Work(late, 5, 5, custom_id="r5", url="/v1/chat/completions", body=b"{}")
    recorder.add(Result(work, "output", success_line("i5", "r5", 200, "x", b"{}"), None))
    recorder.close()
    await running
    ended = await rig.batch(id)
    assert (ended.status, ended.completed) == ("cancelled", 3)
    assert await names(rig, ended.error_file) == ["r3", "r4", "r5"]
