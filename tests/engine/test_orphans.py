"""The sweep of orphans: what nothing refers to goes, and nothing else, whoever else uses the store."""

from __future__ import annotations

import asyncio
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchery.engine import orphans as orphans_module
from batchery.engine.orphans import AGE, MARK, Orphans
from batchery.store import blobs as blobs_module
from batchery.store import dead_blobs, identity, uploads
from batchery.store.blobs import KINDS, BlobStore, new_key, open_folder, open_url, write_whole
from batchery.store.database import Database, sqlite_url
from batchery.store.errors import StoreUnavailable
from batchery.store.ids import new_id
from tests.engine.rig import Rig
from tests.store.examples import NOW, add_batch, add_file

LATER = time.time() + 10 * 86_400


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server that speaks S3, with a bucket `bucket`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")).close()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.fixture(params=["folder", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BlobStore:
    monkeypatch.setattr(blobs_module, "LISTED", 2)
    monkeypatch.setattr(orphans_module, "REMOVED_AT_ONCE", 2)
    if request.param == "folder":
        return open_folder(tmp_path / "store")
    for name, value in {
        "AWS_ENDPOINT_URL": request.getfixturevalue("s3"),
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return open_url(f"s3://bucket/{new_id()}/deep")


def orphans(rig: Rig, blobs: BlobStore, *, alone: bool = False) -> Orphans:
    return Orphans(rig.database, blobs, alone=alone, pause=0)


async def stored(blobs: BlobStore) -> set[str]:
    """Every blob with a key of ours."""
    return {key for kind in KINDS for keys in [k async for k in blobs.older_than(LATER, kind)] for key in keys}


async def put(blobs: BlobStore, *keys: str) -> None:
    for key in keys:
        await write_whole(blobs, key, [b"x"])


async def ended(sweeping: asyncio.Task[None]) -> None:
    """End a sweep, and wait until it has let go of the database."""
    sweeping.cancel()
    await asyncio.wait([sweeping])


def new_keys() -> dict[str, str]:
    """A key of each kind."""
    return {kind: new_key(kind, new_id()) for kind in KINDS}


async def test_what_nothing_refers_to_goes_and_all_else_stays(rig: Rig, blobs: BlobStore) -> None:
    wanted, upload = new_keys(), new_id()
    dead = new_key("output", new_id())
    left = [key for _ in range(3) for key in new_keys().values()]
    theirs = ["files/report.pdf", "elsewhere/aa/" + "a" * 32, "files/ab/" + "c" * 32]
    await put(blobs, *wanted.values(), dead, *left, *theirs)
    async with rig.database.write() as connection:
        await add_file(connection, blob_key=wanted["files"], index_key=wanted["index"])
        for kind in ("output", "error"):
            await add_file(connection, blob_key=wanted[kind])
        await add_batch(connection, result_index=wanted["results"])
        await uploads.insert(
            connection,
            id=upload,
            owner="local",
            filename="f",
            mime_type="t",
            bytes=1,
            status="pending",
            created_at=NOW,
            expires_at=NOW,
        )
        await uploads.insert_part(
            connection, id=new_id(), upload_id=upload, bytes=1, md5="m" * 32, blob_key=wanted["parts"], created_at=NOW
        )
        await dead_blobs.note(connection, [dead], NOW)
    assert await orphans(rig, blobs).sweep(LATER) == len(left)
    assert await stored(blobs) == {*wanted.values(), dead}
    for key in theirs:
        assert await blobs.peek(key) is not None
    assert await orphans(rig, blobs).sweep(LATER) == 0


async def test_what_is_young_may_get_its_reference_yet(rig: Rig, blobs: BlobStore) -> None:
    key = new_key("files", new_id())
    await put(blobs, key)
    assert await orphans(rig, blobs).sweep(time.time() - 60) == 0
    assert await stored(blobs) == {key}


async def test_two_databases_on_one_store_take_nothing_from_each_other(
    rig: Rig, blobs: BlobStore, tmp_path: Path
) -> None:
    mine, theirs = new_key("files", new_id()), new_key("files", new_id())
    await put(blobs, mine, theirs)
    other = Rig(sqlite_url(tmp_path / "other.db"), tmp_path / "unused")
    await other.database.migrate()
    async with rig.database.write() as connection:
        await add_file(connection, blob_key=mine)
    async with other.database.write() as connection:
        await add_file(connection, blob_key=theirs)
    # `rig` is the first to come, and so the store is its own; the other one's files are younger than its sweep goes.
    assert await orphans(rig, blobs).sweep(time.time() - AGE) == 0
    for alone in (False, True):
        assert await orphans(other, blobs, alone=alone).sweep(LATER) == 0
    assert await stored(blobs) == {mine, theirs}
    # The mark is deleted, as the log says, once the first database is gone.
    await blobs.delete([MARK])
    assert await orphans(other, blobs).sweep(LATER) == 1
    assert await stored(blobs) == {theirs}
    await other.database.close()


async def test_a_store_that_was_marked_only_now_is_not_swept(rig: Rig, tmp_path: Path) -> None:
    """Whoever pointed a server at another's store by mistake has a day to notice."""
    blobs = open_folder(tmp_path / "store")
    assert blobs.folder is not None
    key = new_key("files", new_id())
    await put(blobs, key)
    os.utime(blobs.folder / key, (1000, 1000))
    for _ in range(2):
        assert await orphans(rig, blobs).sweep(time.time() - 60) == 0
        assert await stored(blobs) == {key}
    os.utime(blobs.folder / MARK, (2000, 2000))
    assert await orphans(rig, blobs).sweep(2000) == 0
    assert await orphans(rig, blobs).sweep(2001) == 1


async def test_several_servers_of_one_database_sweep_at_once(
    rig: Rig, blobs: BlobStore, database_url: str, tmp_path: Path
) -> None:
    left = [key for _ in range(5) for key in new_keys().values()]
    await put(blobs, *left)
    rigs = [Rig(database_url, tmp_path / "unused") for _ in range(3)]
    counts = await asyncio.gather(*(orphans(other, blobs).sweep(LATER) for other in rigs))
    assert max(counts) > 0
    assert await stored(blobs) == set()
    async with rig.database.write() as connection:
        mark = await blobs.peek(MARK)
        assert mark is not None
        assert mark.content == (await identity.get(connection)).encode()
    for other in rigs:
        await other.database.close()


async def test_alone_in_its_folder_a_server_leaves_no_mark(rig: Rig) -> None:
    """At the start everything older than the process goes, unfinished writes too."""
    folder = rig.blobs.folder
    assert folder is not None
    old, young, kept = (new_key("output", new_id()) for _ in range(3))
    await put(rig.blobs, old, young, kept)
    (folder / f"{old}#1").write_bytes(b"half")
    for key in (old, f"{old}#1", kept):
        os.utime(folder / key, (1000, 1000))
    async with rig.database.write() as connection:
        await add_file(connection, blob_key=kept)
    sweeping = asyncio.create_task(orphans(rig, rig.blobs, alone=True).run(2000.0))
    async with asyncio.timeout(10):
        while await stored(rig.blobs) != {young, kept}:  # noqa: ASYNC110 — a folder has no event to wait for
            await asyncio.sleep(0.01)
    await ended(sweeping)
    assert {path.name for path in folder.iterdir()} == {"output"}


async def test_on_a_shared_store_the_first_sweep_goes_back_a_day(rig: Rig, blobs: BlobStore) -> None:
    """Whatever was written before this process began: others may be at it."""
    key = new_key("output", new_id())
    await put(blobs, key)
    sweeping = asyncio.create_task(orphans(rig, blobs).run(LATER))
    async with asyncio.timeout(10):
        while await blobs.peek(MARK) is None:  # noqa: ASYNC110 — a store has no event to wait for
            await asyncio.sleep(0.01)
    await ended(sweeping)
    assert await stored(blobs) == {key}
    sweeping = asyncio.create_task(orphans(rig, blobs).run(0, lambda: LATER + AGE))
    async with asyncio.timeout(10):
        while await stored(blobs):  # noqa: ASYNC110 — a store has no event to wait for
            await asyncio.sleep(0.01)
    await ended(sweeping)


async def test_every_day_again_also_after_a_failure(
    rig: Rig, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans_module, "EVERY", 0.01)
    key = new_key("output", new_id())
    await put(blobs, key)
    real, asked = BlobStore.remove, 0

    async def remove(store: BlobStore, keys: list[str]) -> None:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise StoreUnavailable("no answer")
        await real(store, keys)

    monkeypatch.setattr(BlobStore, "remove", remove)
    sweeping = asyncio.create_task(orphans(rig, blobs).run(0, lambda: LATER + AGE))
    async with asyncio.timeout(10):
        while await stored(blobs):  # noqa: ASYNC110 — a store has no event to wait for
            await asyncio.sleep(0.01)
    await ended(sweeping)
    assert asked == 3


async def test_a_store_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its mark having been read, a store is not swept."""
    database = Database(sqlite_url(tmp_path / "batchery.db"))
    await database.migrate()
    blobs = open_folder(tmp_path / "store")
    key = new_key("files", new_id())
    await put(blobs, key)

    async def peek(_: BlobStore, __: str) -> bytes | None:
        raise StoreUnavailable("no answer")

    monkeypatch.setattr(BlobStore, "peek", peek)
    with pytest.raises(StoreUnavailable):
        await Orphans(database, blobs, alone=False, pause=0).sweep(LATER)
    assert await stored(blobs) == {key}
    await database.close()
