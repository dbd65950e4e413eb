"""The blob store, in a folder and over the S3 protocol: whole blobs or none, and failures said as what they are."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import resource
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest

from batchery.store import blobs as blobs_module
from batchery.store.blobs import BlobStore, new_key, open_folder, open_url, write_whole
from batchery.store.errors import StoreError, StoreFull, StoreUnavailable
from batchery.store.ids import new_id

MIB = 1024 * 1024


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
    if request.param == "folder":
        return open_folder(tmp_path / "blobs")
    in_bucket(request.getfixturevalue("s3"), monkeypatch)
    return open_url(f"s3://bucket/{new_id()}")


def in_bucket(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stores be opened at this address."""
    environment = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def folder(tmp_path: Path) -> BlobStore:
    return open_folder(tmp_path / "blobs")


def left_in(blobs: BlobStore) -> list[str]:
    """Every file in a store's folder, unfinished ones too."""
    assert blobs.folder is not None
    return sorted(path.relative_to(blobs.folder).as_posix() for path in blobs.folder.rglob("*") if path.is_file())


async def whole(blobs: BlobStore, key: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join([piece async for piece in blobs.stream(key, start, end)])


@contextmanager
def no_room(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: what the kernel says then is what it says of a full disk, but for the
    number of the error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, 5 * MIB, 12 * MIB + 7])
async def test_what_is_written_can_be_read(blobs: BlobStore, size: int) -> None:
    data = os.urandom(size)
    key = new_key("files", new_id())
    async with blobs.write(key) as writer:
        for start in range(0, size, 700_000):
            await writer.write(data[start : start + 700_000])
            await writer.write(b"")
        await writer.close()
    assert (writer.size, writer.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert await whole(blobs, key) == data
    assert await blobs.read(key, 0, 0) == b""
    if size > 1:
        assert await blobs.read(key, size - 2, 2) == data[-2:]
        assert await blobs.read(key, size - 2, 100) == data[-2:]  # shorter at the end
        assert await blobs.read(key, 1, size // 2) == data[1 : 1 + size // 2]
        for start, end in ((0, 1), (1, size), (size // 2, size // 2), (size // 3, size // 2)):
            assert await whole(blobs, key, start, end) == data[start:end]


async def test_an_empty_blob_exists(blobs: BlobStore) -> None:
    writer = await write_whole(blobs, "a/b/empty", [])
    assert (writer.size, writer.sha256) == (0, hashlib.sha256().hexdigest())
    assert await whole(blobs, "a/b/empty") == b""
    with pytest.raises(StoreUnavailable):
        await whole(blobs, "a/b/none")


async def test_a_blob_is_overwritten_whole(blobs: BlobStore) -> None:
    await write_whole(blobs, "a/b/c", [b"x" * 100])
    async with blobs.write("a/b/c") as writer:
        await writer.write(b"yy")
        assert await whole(blobs, "a/b/c") == b"x" * 100  # until the writer is closed
        await writer.close()
    assert await whole(blobs, "a/b/c") == b"yy"


@pytest.mark.parametrize("size", [0, 3, 3 * MIB, 12 * MIB])
async def test_a_blob_that_is_given_up_never_was(blobs: BlobStore, size: int) -> None:
    async def give_up() -> None:
        async with blobs.write("a/b/c") as writer:
            for start in range(0, size, MIB):
                await writer.write(b"x" * min(MIB, size - start))
            raise KeyError

    with pytest.raises(KeyError):
        await give_up()
    with pytest.raises(StoreUnavailable):
        await whole(blobs, "a/b/c")
    if blobs.folder is not None:
        assert left_in(blobs) == []


async def test_many_at_once(blobs: BlobStore) -> None:
    keys = [new_key("files", new_id()) for _ in range(20)]
    await asyncio.gather(*(write_whole(blobs, key, [key.encode()]) for key in keys))
    assert await asyncio.gather(*(whole(blobs, key) for key in keys)) == [key.encode() for key in keys]


async def test_many_are_written_together(blobs: BlobStore) -> None:
    contents = {new_key("output", new_id()): os.urandom(size) for size in (0, 1, 1000, MIB, *range(80))}
    await blobs.put_many(list(contents.items()))
    for key, content in contents.items():
        assert await blobs.read_whole(key) == content


async def test_if_one_of_many_cannot_be_written_none_is_there(folder: BlobStore) -> None:
    keys = [new_key("output", new_id()) for _ in range(3)]
    assert folder.folder is not None
    (folder.folder / keys[1]).mkdir(parents=True)  # something else has its name
    with pytest.raises(StoreUnavailable):
        await folder.put_many([(key, b"x") for key in keys])
    (folder.folder / keys[1]).rmdir()
    assert left_in(folder) == []


async def test_many_are_synced_with_every_folder_above_them(folder: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    keys = [new_key("output", f"{digits}{new_id()[2:]}") for digits in ("aa", "aa", "bb")]
    await folder.put_many([(key, b"x") for key in keys])
    root = folder.folder
    assert root is not None
    expected = [f"{root / key}#1" for key in keys]
    expected += [str(path) for path in (root, root / "output", root / "output/aa", root / "output/bb")]
    assert sorted(synced) == sorted(expected)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux can say what is in memory")
@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EOPNOTSUPP])
async def test_what_is_not_in_memory_is_read_by_a_thread(
    folder: BlobStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    await write_whole(folder, "output/ab/one", [b"0123456789"])
    asked = []

    def refuse(*_: object) -> int:
        asked.append(1)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", refuse)
    for _ in range(2):
        assert await folder.read_at_once("output/ab/one", 2, 3) == b"234"
    assert len(asked) == (2 if code == errno.EAGAIN else 1), "a file system that cannot say is asked once"
    with pytest.raises(StoreUnavailable):
        await folder.read_at_once("output/ab/none", 0, 1)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux can say what is in memory")
async def test_what_is_in_memory_is_read_at_once(folder: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    await write_whole(folder, "output/ab/one", [b"0123456789"])
    preadv = os.preadv

    def only_at_once(descriptor: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", only_at_once)
    monkeypatch.setattr("batchery.store.blobs.obstore.get_range_async", None)
    assert await folder.read_at_once("output/ab/one", 2, 3) == b"234"
    monkeypatch.undo()
    assert await folder.read_at_once("output/ab/one", 8, 10) == b"89"


async def test_a_blob_that_is_sent_lets_others_go_on_between_its_pieces(folder: BlobStore) -> None:
    """Or whoever has gone away would be sent all of it, into memory."""
    await write_whole(folder, "output/ab/one", [b"x" * (4 * blobs_module.READ)])
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(others())
    seen = [turns async for _ in folder.stream("output/ab/one")]
    beside.cancel()
    assert len(set(seen)) == len(seen) == 4


async def test_deleting_passes_over_what_is_not_there(blobs: BlobStore) -> None:
    for key in ("a/b/1", "a/b/2", "a/b/3"):
        await write_whole(blobs, key, [b"x"])
    await blobs.delete(["a/b/1", "a/b/none", "no/such/folder", "a/b/2"])
    for key in ("a/b/1", "a/b/2"):
        with pytest.raises(StoreUnavailable):
            await whole(blobs, key)
    assert await whole(blobs, "a/b/3") == b"x"


async def test_a_blob_that_has_shrunk_is_not_taken_for_whole(blobs: BlobStore) -> None:
    await write_whole(blobs, "a/b/c", [b"12345"])
    with pytest.raises(StoreUnavailable):
        await whole(blobs, "a/b/c", 0, 9)
    with pytest.raises(StoreUnavailable):
        await blobs.read("a/b/none", 0, 1)


async def test_ping(blobs: BlobStore) -> None:
    await blobs.ping()


async def test_the_folder_has_gone(folder: BlobStore) -> None:
    assert folder.folder is not None
    folder.folder.rmdir()
    with pytest.raises(StoreUnavailable):
        await folder.ping()


async def test_the_server_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    retries = {"max_retries": 0}
    from obstore.store import S3Store

    gone = BlobStore(S3Store("bucket", retry_config=retries))  # type: ignore[arg-type]
    for attempt in (gone.ping(), gone.read("a", 0, 1), write_whole(gone, "a", [b"x"]), gone.delete(["a"])):
        with pytest.raises(StoreUnavailable):
            await attempt


# In a folder: full disks, and what is left behind.


@pytest.mark.parametrize("size", [2 * MIB, 12 * MIB])
async def test_no_room_while_writing(folder: BlobStore, size: int) -> None:
    pieces = [b"x" * MIB] * (size // MIB)
    with no_room(MIB), pytest.raises(StoreFull):
        await write_whole(folder, "a/b/c", pieces)
    assert left_in(folder) == []
    await write_whole(folder, "a/b/c", pieces)
    assert len(await whole(folder, "a/b/c")) == size


async def test_no_room_leaves_the_blob_before(folder: BlobStore) -> None:
    await write_whole(folder, "a/b/c", [b"before"])
    with no_room(MIB), pytest.raises(StoreFull):
        await write_whole(folder, "a/b/c", [b"x" * 2 * MIB])
    assert await whole(folder, "a/b/c") == b"before"
    assert left_in(folder) == ["a/b/c"]


@pytest.mark.parametrize(
    ("number", "raised"), [(errno.ENOSPC, StoreFull), (errno.EDQUOT, StoreFull), (errno.EIO, StoreUnavailable)]
)
async def test_a_blob_that_cannot_be_made_durable_does_not_exist(
    folder: BlobStore, monkeypatch: pytest.MonkeyPatch, number: int, raised: type[StoreError]
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(raised):
        await write_whole(folder, "a/b/c", [b"x"])
    monkeypatch.undo()
    assert left_in(folder) == []


async def test_the_file_and_every_folder_above_it_are_synced(
    folder: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(blobs_module, "_fsync", synced.extend)
    root = folder.folder
    assert root is not None
    await write_whole(folder, "a/b/c", [b"x"])
    assert synced == [root / "a/b/c", root / "a/b", root / "a", root]
    for key, *above in (("a/b/d", "a/b"), ("a/e/f", "a/e", "a"), ("g/b/c", "g/b", "g", "")):
        synced.clear()
        await write_whole(folder, key, [b"x"])
        assert synced == [root / key, *(root / path for path in above)], "the others are known to be there"


async def test_a_cancelled_upload_leaves_nothing(folder: BlobStore) -> None:
    began = asyncio.Event()

    async def upload() -> None:
        async with folder.write("a/b/c") as writer:
            for _ in range(12):
                await writer.write(b"x" * MIB)
            began.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(upload())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left_in(folder) == []


async def found(blobs: BlobStore, moment: float, kind: str) -> list[str]:
    return sorted([key async for keys in blobs.older_than(moment, kind) for key in keys])


async def test_what_a_crash_left_can_be_found_and_removed(folder: BlobStore) -> None:
    kept, old, other = (new_key("files", letter * 32) for letter in "abc")
    for key in (kept, old, other, new_key("index", "b" * 32)):
        await write_whole(folder, key, [b"x"])
    assert folder.folder is not None
    half = other + "#1"
    (folder.folder / half).write_bytes(b"x")
    for key in (old, half, new_key("index", "b" * 32)):
        os.utime(folder.folder / key, (1000, 1000))
    assert await found(folder, 2000, "files") == [old, half]
    assert await found(folder, 1000, "files") == []
    assert await found(folder, 2000, "output") == []
    await folder.remove([old, half, "files/no/ne"])
    assert left_in(folder) == [kept, other, new_key("index", "b" * 32)]


async def test_only_keys_of_our_own_shape_are_found(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs_module, "LISTED", 2)
    ours = [new_key("files", new_id()) for _ in range(5)]
    theirs = [
        "files/report.pdf",
        "files/ab/report.pdf",
        "files/ab/" + "c" * 32,
        "files/AB/" + "A" * 30,
        "files/ab/ab" + "c" * 31,
        "files/aa/" + "a" * 32 + ".bak",
        "files/deeper/aa/" + "a" * 32,
        "elsewhere/aa/" + "a" * 32,
        new_key("output", "a" * 32),
    ]
    for key in ours + theirs:
        await write_whole(blobs, key, [b"x"])
    assert await found(blobs, time.time() + 100, "files") == sorted(ours)
    assert await found(blobs, time.time() - 100, "files") == []
    await blobs.remove(ours)
    assert await found(blobs, time.time() + 100, "files") == []
    for key in theirs:
        assert await whole(blobs, key) == b"x"


async def test_a_small_object_is_written_once(blobs: BlobStore) -> None:
    assert await blobs.peek("mark") is None
    await blobs.put_new("mark", b"first")
    await blobs.put_new("mark", b"second")
    small = await blobs.peek("mark")
    assert small is not None
    assert small.content == b"first"
    assert abs(small.written_at - time.time()) < 60


@pytest.mark.parametrize("size", [0, MIB, 5 * MIB, 12 * MIB, 17 * MIB])
async def test_what_is_given_up_leaves_nothing_in_a_bucket(s3: str, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Not even an upload in parts, which nobody sees and everybody pays for."""
    in_bucket(s3, monkeypatch)
    prefix = new_id()
    bucket = open_url(f"s3://bucket/{prefix}")
    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")

    async def give_up() -> None:
        async with bucket.write("files/ab/c") as writer:
            for _ in range(size // MIB):
                await writer.write(b"x" * MIB)
            if size > 2 * blobs_module.PIECE:
                assert client.list_multipart_uploads(Bucket="bucket", Prefix=prefix).get("Uploads")
            raise KeyError

    with pytest.raises(KeyError):
        await give_up()
    assert not client.list_multipart_uploads(Bucket="bucket", Prefix=prefix).get("Uploads")
    assert not client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents")


async def test_deleting_goes_on_after_a_failure(folder: BlobStore) -> None:
    keys = [f"a/b/{i}" for i in range(40)]
    for key in keys:
        await write_whole(folder, key, [b"x"])
    assert folder.folder is not None
    (folder.folder / "a/b/3").unlink()
    (folder.folder / "a/b/3/in/the/way").mkdir(parents=True)
    with pytest.raises(StoreError):
        await folder.delete(keys)
    assert left_in(folder) == []


async def pieces_of(blobs: BlobStore, key: str) -> AsyncIterator[int]:
    async for piece in blobs.stream(key):
        yield len(piece)


async def test_a_blob_streams_in_small_pieces(blobs: BlobStore) -> None:
    await write_whole(blobs, "a/b/c", [b"x" * (2 * blobs_module.READ + 1)])
    assert [size async for size in pieces_of(blobs, "a/b/c")] == [blobs_module.READ, blobs_module.READ, 1]


# Addresses.


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    assert open_url(f"file://{tmp_path}/new/folder").folder == tmp_path / "new/folder"
    assert (tmp_path / "new/folder").is_dir()


@pytest.mark.parametrize("url", ["", "blobs", "ftp://h/x", "s3:", "bucket/prefix"])
def test_an_address_that_names_no_store(url: str) -> None:
    with pytest.raises(ValueError, match="store URL"):
        open_url(url)


def test_keys_are_spread_over_folders() -> None:
    assert new_key("files", "abcdef") == "files/ab/abcdef"
