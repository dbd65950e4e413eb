"""Retention: what is over goes, with its blobs, whatever breaks in between; what anybody still uses stays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from batchery.engine import retention as retention_module
from batchery.engine.retention import GRACE, Retention
from batchery.store import batches, dead_blobs, files, idempotency, results, schema, small_indexes, uploads
from batchery.store.blobs import BlobStore, new_key, write_whole
from batchery.store.errors import StoreUnavailable
from batchery.store.ids import new_id
from batchery.upstreams.http import HttpUpstream
from batchery.upstreams.simulator import Behaviour, Uniform, running_simulator
from tests.engine.rig import Rig
from tests.requests import chat_line
from tests.store.examples import NOW, add_batch, add_file, segment


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few at once that every test sees more than one step."""
    monkeypatch.setattr(retention_module, "REST", 0)
    for name in ("FILES_AT_ONCE", "BATCHES_AT_ONCE", "ROWS_AT_ONCE", "BLOBS_AT_ONCE"):
        monkeypatch.setattr(retention_module, name, 3)


async def sweep(rig: Rig, now: float = NOW, **settings: Any) -> int:
    """Sweep until there is nothing more; how many rounds it took."""
    retention = Retention(rig.database, rig.blobs, **settings)
    rounds = 1
    while await retention.sweep(now):
        rounds += 1
        assert rounds < 1000, "it never ends"
    return rounds


async def stored_file(rig: Rig, **values: Any) -> str:
    """A file whose blobs exist; its id."""
    id = values.pop("id", None) or new_id()
    keys = {"blob_key": new_key("files", id), "index_key": new_key("index", id)}
    for key in keys.values():
        await write_whole(rig.blobs, key, [b"x"])
    async with rig.database.write() as connection:
        return await add_file(connection, id=id, **keys | values)


def stored_keys(rig: Rig) -> list[str]:
    """The keys of all blobs."""
    folder = rig.blobs.folder
    assert folder is not None
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def stored(rig: Rig) -> set[str]:
    """The names of all blobs, which are the ids of their files."""
    return {key.rsplit("/", 1)[1] for key in stored_keys(rig)}


async def rows(rig: Rig, table: sa.Table) -> list[Any]:
    async with rig.database.read() as connection:
        return list((await connection.execute(sa.select(table))).all())


async def ids(rig: Rig, table: sa.Table = schema.files) -> set[str]:
    return {row.id for row in await rows(rig, table)}


# Files.


async def test_what_has_expired_goes_with_its_blobs(rig: Rig) -> None:
    gone = {await stored_file(rig, expires_at=NOW - i) for i in range(7)}
    kept = {await stored_file(rig, expires_at=at) for at in (NOW + 1000, None)}
    assert await sweep(rig) >= 3
    assert await ids(rig) == kept
    assert stored(rig) == kept | gone, "downloads that run may end"
    await sweep(rig, NOW + GRACE - 0.1)
    assert stored(rig) == kept | gone
    await sweep(rig, NOW + GRACE, grace=GRACE)
    assert await ids(rig) == stored(rig) == kept
    assert await rows(rig, schema.dead_blobs) == []


async def test_a_download_that_runs_can_end(rig: Rig) -> None:
    id = await stored_file(rig, expires_at=NOW)
    row = await rig.file(id)
    assert row.blob_key is not None
    pieces = rig.blobs.stream(row.blob_key)
    await sweep(rig)
    assert [piece async for piece in pieces] == [b"x"]


async def test_what_a_live_batch_uses_stays_until_its_end(rig: Rig) -> None:
    """More of it than one step takes, and expired before all else: it does not hold up the rest."""
    used: dict[str, set[str]] = {}
    for _ in range(5):
        read, written, errors = [await stored_file(rig, expires_at=NOW - 100) for _ in range(3)]
        async with rig.database.write() as connection:
            batch = await add_batch(connection, input_file=read, output_file=written, error_file=errors)
            await connection.execute(
                sa.update(schema.files).where(schema.files.c.id.in_([written, errors])).values(batch_id=batch)
            )
        used[batch] = {read, written, errors}
    await stored_file(rig, expires_at=NOW)
    await sweep(rig)
    everything = set().union(*used.values())
    assert await ids(rig) == everything
    ended, last = used.popitem()
    async with rig.database.write() as connection:
        await batches.change_many(connection, [{"id": ended, "status": "completed"}])
    await sweep(rig)
    assert await ids(rig) == everything - last


async def test_an_expired_file_s_idempotency_key_is_free_again(rig: Rig) -> None:
    id, kept = await stored_file(rig, expires_at=NOW), await stored_file(rig)
    async with rig.database.write() as connection:
        for key, file in (("a", id), ("b", kept)):
            await idempotency.claim(connection, idempotency.Use("local", "file", key, "f" * 64), file, NOW)
    await sweep(rig)
    assert [row.key for row in await rows(rig, schema.idempotency_keys)] == ["b"]


async def test_a_sweep_with_nothing_to_do_changes_nothing(rig: Rig) -> None:
    await stored_file(rig, expires_at=NOW + 1)
    assert await sweep(rig) == 1


# Crashes between the steps, and stores that fail.


class Crash(Exception):
    """The process ends here."""


def crash(*_: Any, **__: Any) -> Any:
    raise Crash


@pytest.mark.parametrize(
    ("module", "name", "rows_left", "blobs_left"),
    [
        (dead_blobs, "note", 1, 2),
        (idempotency, "forget", 1, 2),
        (dead_blobs, "claim", 0, 2),
        (BlobStore, "delete", 0, 2),
        (dead_blobs, "forget", 0, 0),
    ],
)
async def test_a_crash_between_steps_loses_nothing_and_leaves_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, rows_left: int, blobs_left: int
) -> None:
    await stored_file(rig, expires_at=NOW)
    retention = Retention(rig.database, rig.blobs, grace=0)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, crash)
        with pytest.raises(Crash):
            await retention.sweep(NOW)
    assert len(await rows(rig, schema.files)) == rows_left
    assert len(stored_keys(rig)) == blobs_left
    # The file has its blobs as long as it is there, and the blobs are known as long as they are there.
    assert rows_left or len(await rows(rig, schema.dead_blobs)) == 2
    await sweep(rig, NOW + 1, grace=0)
    assert await ids(rig) == stored(rig) == set()
    assert await rows(rig, schema.dead_blobs) == []


async def test_a_store_that_fails_is_asked_again_later(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def fail(_: BlobStore, keys: Any) -> None:
        asked.extend(keys)
        raise StoreUnavailable("no answer")

    for _ in range(6):
        await stored_file(rig, expires_at=NOW)
    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "delete", fail)
        await sweep(rig, grace=GRACE)
        assert asked == []
        assert await sweep(rig, NOW + GRACE, grace=GRACE) == 1
        assert len(asked) == 3, "a store that does not answer is not asked again and again"
    await sweep(rig, NOW + 2 * GRACE, grace=GRACE)
    assert stored(rig) == set()


async def test_a_blob_that_is_gone_already_is_no_matter(rig: Rig) -> None:
    id = await stored_file(rig, expires_at=NOW)
    await rig.blobs.delete([new_key("files", id)])
    await sweep(rig, grace=0)
    assert stored(rig) == set()
    assert await rows(rig, schema.dead_blobs) == []


# Several at once.


async def test_many_sweep_at_once(rig: Rig, database_url: str, tmp_path: Path) -> None:
    for i in range(60):
        await stored_file(rig, expires_at=NOW - i % 3)
    kept = await stored_file(rig)
    rigs = [Rig(database_url, tmp_path / "blobs") for _ in range(3)]
    await asyncio.gather(*(sweep(other, grace=0) for other in rigs))
    await sweep(rig, NOW + 1, grace=0)
    assert await ids(rig) == stored(rig) == {kept}
    assert await rows(rig, schema.dead_blobs) == []
    for other in rigs:
        await other.database.close()


async def test_a_batch_made_over_a_file_that_is_being_swept(rig: Rig, database_url: str, tmp_path: Path) -> None:
    """Either the batch has its file, or there is no batch."""
    other = Rig(database_url, tmp_path / "blobs")

    async def create(file: str) -> bool:
        async with other.database.write() as connection:
            if not await files.lock(connection, file):
                return False
            await asyncio.sleep(0)
            await add_batch(connection, input_file=file)
            return True

    outcomes = set()
    for i in range(40):
        file = await stored_file(rig, expires_at=NOW)
        retention = Retention(rig.database, rig.blobs, grace=0)
        steps: list[Awaitable[bool]] = [create(file), retention.sweep(NOW)]
        made, _ = await asyncio.gather(*(steps if i % 2 else steps[::-1]))
        made = made if i % 2 else _
        assert (file in await ids(rig)) == made
        assert (file in stored(rig)) == made
        outcomes.add(made)
    assert outcomes == {True, False}
    await other.database.close()


async def test_a_file_that_somebody_holds_is_passed_over(rig: Rig) -> None:
    if rig.database.is_sqlite:
        pytest.skip("on SQLite nothing is swept while somebody writes")
    held, free = await stored_file(rig, expires_at=NOW - 1), await stored_file(rig, expires_at=NOW)
    async with rig.database.write() as connection:
        assert await files.lock(connection, held)
        await sweep(rig)
        assert await ids(rig) == {held}
        await add_batch(connection, input_file=held)
    await sweep(rig)
    assert await ids(rig) == {held}
    assert free not in await ids(rig)


async def test_a_batch_that_is_made_between_the_sweep_s_two_looks(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep's first look saw no batch, and by the time that it holds the file there is one."""
    if rig.database.is_sqlite:
        pytest.skip("on SQLite nobody writes while somebody sweeps")
    file = await stored_file(rig, expires_at=NOW)
    real = files._delete

    async def delete(connection: Any, which: Any, now: float) -> files.Gone:
        async with rig.database.write() as another:
            await add_batch(another, input_file=file)
        return await real(connection, which, now)

    monkeypatch.setattr(files, "_delete", delete)
    await Retention(rig.database, rig.blobs).sweep(NOW)
    assert await ids(rig) == {file}


# Batches that were deleted.


async def test_a_deleted_batch_goes_when_it_has_ended_and_its_log_is_dropped(rig: Rig) -> None:
    index = new_key("results", new_id())
    await write_whole(rig.blobs, index, [b"x"])
    async with rig.database.write() as connection:
        plain = await add_batch(connection, status="completed")
        live = await add_batch(connection, status="cancelling", deleted_at=NOW)
        with_log = await add_batch(connection, status="cancelled", deleted_at=NOW, has_log=True)
        await results.insert(connection, [segment(with_log, "output", 0, [b"x\n"])])
        strange = await add_batch(connection, status="cancelled", deleted_at=NOW)  # its flag says no log
        await results.insert(connection, [segment(strange, "output", 0, [b"x\n"])])
        gone = [await add_batch(connection, status="failed", deleted_at=NOW) for _ in range(7)]
        indexed = await add_batch(connection, status="completed", deleted_at=NOW, result_index=index)
        in_a_row = await add_batch(connection, status="completed", deleted_at=NOW, result_index=small_indexes.HERE)
        row = await batches.get(connection, in_a_row)
        assert row is not None
        await small_indexes.insert(connection, {row.seq: b"x"})
    await sweep(rig, grace=0)
    assert await ids(rig, schema.batches) == {plain, live, with_log, strange}
    assert not {*gone, indexed, in_a_row} & await ids(rig, schema.batches)
    async with rig.database.read() as connection:
        assert await small_indexes.get(connection, row.seq) is None
    assert stored(rig) == set()


async def test_a_deleted_batch_s_files_stay_unless_they_are_empty(rig: Rig) -> None:
    names = ("output", "error", "old error", "empty", "never written", "live", "other")
    ids_of = {name: new_id() for name in names}
    async with rig.database.write() as connection:
        batch = await add_batch(
            connection,
            status="cancelled",
            deleted_at=NOW,
            output_file=ids_of["output"],
            error_file=ids_of["error"],
            output_lines=77,
            output_bytes=777,
        )
        live = await add_batch(connection, deleted_at=NOW, output_file=ids_of["live"])
    for name in ("output", "error", "old error", "empty"):
        size = 0 if name == "empty" else 1
        await stored_file(rig, id=ids_of[name], batch_id=batch, bytes=size, lines=size, purpose="batch_output")
    async with rig.database.write() as connection:
        await add_file(connection, id=ids_of["never written"], batch_id=batch, bytes=0)
        await add_file(connection, id=ids_of["live"], batch_id=live, bytes=0)
        await add_file(connection, id=ids_of["other"], bytes=0)
    await sweep(rig, grace=0)
    assert await ids(rig, schema.batches) == {live}
    kept = {ids_of[name] for name in names} - {ids_of["empty"], ids_of["never written"]}
    assert await ids(rig) == kept
    row = await rig.file(ids_of["output"])
    assert (row.size, row.lines, row.grows, row.blob_size, row.batch_id) == (1, 1, False, 1, batch)
    assert b"".join([piece async for piece in rig.blobs.stream(row.blob_key or "")]) == b"x"
    assert ids_of["empty"] not in stored(rig)


# What else piles up.


async def test_the_other_tables_are_swept_too(rig: Rig) -> None:
    part = new_key("parts", new_id())
    await write_whole(rig.blobs, part, [b"x"])
    upload = new_id()
    async with rig.database.write() as connection:
        for i in range(10):
            use = idempotency.Use("local", "batch", f"key {i}", "f" * 64)
            await idempotency.claim(connection, use, new_id(), NOW - idempotency.KEPT + (i >= 8))
        await uploads.insert(
            connection,
            id=upload,
            owner="local",
            filename="f",
            mime_type="t",
            bytes=1,
            status="pending",
            created_at=NOW - 3600,
            expires_at=NOW,
        )
        await uploads.insert_part(
            connection, id=new_id(), upload_id=upload, bytes=1, md5="m" * 32, blob_key=part, created_at=NOW
        )
        await connection.execute(
            sa.insert(schema.webhooks).values(
                id=new_id(),
                batch_id=new_id(),
                type="batch.completed",
                url="http://127.0.0.1/",
                host="127.0.0.1",
                secret="s",
                body=b"{}",
                created_at=NOW - 100 * 86_400,
            )
        )
    await sweep(rig, grace=0)
    assert {row.key for row in await rows(rig, schema.idempotency_keys)} == {"key 8", "key 9"}
    assert await rows(rig, schema.upload_parts) == []
    assert await rows(rig, schema.webhooks) == []
    assert stored(rig) == set()
    await sweep(rig, NOW + uploads.KEPT)
    assert await rows(rig, schema.uploads) == []


# Through a whole worker.


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 — a row has no event to wait for
            await asyncio.sleep(0.01)


async def test_a_worker_sweeps(rig: Rig) -> None:
    expired, kept = await stored_file(rig, expires_at=1), await stored_file(rig)
    async with running_simulator(Behaviour()) as simulator:
        upstream = HttpUpstream(simulator.url, timeout=10)
        async with rig.working(upstream):
            await until(lambda: _is_gone(rig, expired))
        await upstream.close()
    assert await ids(rig) == {kept}


async def _is_gone(rig: Rig, id: str) -> bool:
    return id not in await ids(rig)


async def test_a_batch_whose_input_has_expired_runs_to_its_end(rig: Rig) -> None:
    file = await rig.upload(chat_line(f"r{i}", f"p{i}") for i in range(20))
    batch = await rig.create(file)
    async with rig.database.write() as connection:
        await connection.execute(sa.update(schema.files).where(schema.files.c.id == file).values(expires_at=1))
    async with running_simulator(Behaviour()) as simulator:
        upstream = HttpUpstream(simulator.url, timeout=10)
        async with rig.working(upstream) as worker:
            worker._retention = Retention(rig.database, rig.blobs, grace=0)
            await worker._retention.sweep(time.time())
            row = await rig.ended(batch)
            assert (row.status, row.completed) == ("completed", 20)
            worker._to_retain.set()
            await until(lambda: _is_gone(rig, file))
        await upstream.close()
    assert len(await rig.lines(row.output_file)) == 20
    assert (await rig.batch(batch)).input_file == file


@pytest.mark.parametrize("end", ["completed", "cancelled", "expired", "failed"])
async def test_result_files_expire_so_long_after_their_end(rig: Rig, end: str) -> None:
    """Not after the batch's creation: `output_expires_after` counts from when the file is complete."""
    slow = Behaviour(latency=Uniform(0.0, 0.0) if end in ("completed", "failed") else Uniform(30.0, 30.0))
    model = "no-such" if end == "failed" else "m"
    lines = [chat_line(f"r{i}", f"p{i}") for i in range(3)]
    if model == "no-such":
        lines = [line.replace(b'"messages"', b'"messages_"') for line in lines]
    batch = await rig.create(await rig.upload(lines), window=86_400)
    before = {"output_expires_after": 3600, "created_at": 1000}
    if end == "expired":
        before["expires_at"] = 2000
    async with rig.database.write() as connection:
        await batches.change_many(connection, [{"id": batch, **before}])
    async with running_simulator(slow) as simulator:
        upstream = HttpUpstream(simulator.url, timeout=60)
        began = int(time.time())
        async with rig.working(upstream, cancel_grace=0.0) as worker:
            if end == "cancelled":
                await rig.until(batch, lambda row: row.status == "in_progress")
                async with rig.database.write() as connection:
                    changes = {"status": "cancelling", "cancelling_at": began}
                    assert await batches.change(connection, batch, expect="in_progress", changes=changes)
                worker.wake()
            row = await rig.ended(batch)
        await upstream.close()
    assert row.status == end
    ended_at = row.completed_at or row.cancelled_at or row.expired_at or row.failed_at
    assert ended_at is not None
    assert ended_at >= began
    output = await rig.file(row.output_file)
    assert output.expires_at == ended_at + 3600
    if end != "completed":
        assert (await rig.file(row.error_file)).expires_at == ended_at + 3600
