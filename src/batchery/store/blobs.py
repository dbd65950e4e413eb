"""The blob store: whole files under keys, through obstore, in a folder or an S3-compatible bucket.

A blob appears whole or not at all, and once `Writer.close` returns it survives a power cut. In a folder that takes two
things obstore leaves to us: syncing the file and the folders that lead to it, and sweeping up what a crash left of
unfinished writes. In a bucket, what a crash leaves of an upload in parts can be neither seen nor removed through
obstore; a lifecycle rule of the bucket has to (`docs/server.md`).
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from batchery.store.errors import StoreError, StoreUnavailable, classify

PIECE = 5 * 1024 * 1024  # the smallest part that S3 accepts
READ = 512 * 1024

KINDS = ("files", "index", "output", "error", "parts", "results")
"""What a key of ours begins with."""

LISTED = 1000
"""Keys that are listed at a time."""

DELETES = 16
"""Blobs that are deleted at the same time."""

PUTS = 16
"""Blobs that are written to a bucket at the same time."""

PUT_THREADS = 4
"""Threads that write to a folder at the same time: most of it is waiting for the disk."""

AT_HAND = 1024 * 1024
"""Bytes up to which a range is read in the event loop, where the system has it in memory."""

RANGES = 16
"""Ranges of a blob that are read from a bucket at the same time."""

# As `new_key` makes them; a folder also has `KEY#1`, an unfinished write. Whatever else is in the store is not ours.
_OURS = re.compile(rf"(?:{'|'.join(KINDS)})/([0-9a-f]{{2}})/\1[0-9a-f]{{30}}(?:#[0-9]+)?")


def new_key(kind: str, id: str) -> str:
    """A blob's key: two digits of the id spread the blobs over 256 folders."""
    return f"{kind}/{id[:2]}/{id}"


@contextmanager
def _translated() -> Any:
    try:
        yield
    except (BaseError, OSError) as error:
        raise classify(error) from error


class Writer:
    """Writes one blob; counts and hashes what passes.

    Use it as an async context manager: leaving the block without `close` gives the blob up.

    Attributes:
        key: the blob's.
        size: bytes written so far.
    """

    def __init__(self, store: BlobStore, key: str) -> None:
        self._store = store
        self.key = key
        self.size = 0
        self._hash = hashlib.sha256()
        self._buffer: list[bytes] = []
        self._buffered = 0
        self._sent = 0  # bytes that the store has taken; 0 once it has failed
        self._file = obstore.open_writer_async(store.objects, key, buffer_size=PIECE, max_concurrency=2)
        self._open = True

    async def __aenter__(self) -> Writer:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._open:
            await self.abort()

    @property
    def sha256(self) -> str:
        """Of what was written so far, as hex."""
        return self._hash.hexdigest()

    async def write(self, data: bytes) -> None:
        """Append to the blob.

        Raises:
            StoreFull, StoreUnavailable: it failed; the blob will not appear.
        """
        self.size += len(data)
        self._buffer.append(data)
        self._buffered += len(data)
        if self._buffered >= 1024 * 1024:
            await self._flush()

    async def _flush(self) -> None:
        data = self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer)
        self._buffer, self._buffered = [], 0
        if not data:
            return
        await asyncio.to_thread(self._hash.update, data)
        sent, self._sent = self._sent, 0
        with _translated():
            await self._file.write(data)
        self._sent = sent + len(data)

    async def close(self) -> None:
        """The blob is complete: make it appear, durably.

        Raises:
            StoreFull, StoreUnavailable: it failed; the blob does not exist.
        """
        await self._flush()
        self._sent = 0
        with _translated():
            await self._file.close()
        try:
            await self._store.sync(self.key)
        except StoreError:
            await self._store.delete([self.key])
            raise
        self._open = False

    async def abort(self) -> None:
        """Give the blob up. What a crash leaves of an unfinished one is swept in a folder at the next start."""
        self._open = False
        self._buffer.clear()
        if self._store.folder is None and self._sent >= PIECE:
            # An upload in parts has begun, and obstore cannot break it off: it is ended, and what came of it deleted.
            with suppress(StoreError):
                with _translated():
                    await self._file.close()
                await self._store.delete([self.key])
        del self._file
        await self._store.remove_unfinished(self.key)


class Small(msgspec.Struct, frozen=True):
    """An object that is small enough to be read at once.

    Attributes:
        content: its bytes.
        written_at: when it was last written, in Unix seconds by the store's clock.
    """

    content: bytes
    written_at: float


class BlobStore:
    """Blobs through obstore.

    Args:
        objects: the store.
        folder: its folder, where it is one, so that writes can be made durable.
    """

    def __init__(self, objects: ObjectStore, folder: Path | None = None) -> None:
        self.objects = objects
        self.folder = folder
        self._durable: set[str] = set()  # folders of which it is known that a power cut leaves them
        self._asks_memory = folder is not None and hasattr(os, "RWF_NOWAIT")

    def write(self, key: str) -> Writer:
        """Begin a blob; it appears when the writer is closed."""
        return Writer(self, key)

    async def read(self, key: str, start: int, length: int) -> bytes:
        """A range of a blob, which must begin inside it; shorter where the blob ends."""
        if length <= 0:
            return b""
        with _translated():
            return bytes(await obstore.get_range_async(self.objects, key, start=start, length=length))

    async def read_at_once(self, key: str, start: int, length: int) -> bytes:
        """The same, in the event loop itself where the system has the range in memory. Not for one piece after the
        other: whoever never waits lets nobody else go on, nor see that nobody listens any more."""
        if self._asks_memory and 0 < length <= AT_HAND and (found := self._at_hand(key, start, length)) is not None:
            return found
        return await self.read(key, start, length)

    def _at_hand(self, key: str, start: int, length: int) -> bytes | None:
        """A range that need not be waited for, since the system has it in memory; None where it has not, or where
        anything else is in the way. That takes a twentieth of what it takes to wake a thread for it."""
        data = bytearray(length)
        try:
            descriptor = os.open(f"{self.folder}/{key}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                read = os.preadv(descriptor, [data], start, os.RWF_NOWAIT)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._asks_memory = error.errno != errno.EOPNOTSUPP  # not every file system can say
            return None
        return bytes(data) if read == length else None

    async def read_whole(self, key: str) -> bytes:
        """A whole blob, which fits into memory."""
        with _translated():
            found = await obstore.get_async(self.objects, key)
            return bytes(await found.bytes_async())

    async def read_each(self, key: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Several ranges of a blob, far apart: from a folder at once, else some at a time."""
        if self.folder is not None:
            with _translated():
                found = await obstore.get_ranges_async(self.objects, key, starts=starts, lengths=lengths)
            return [bytes(piece) for piece in found]
        pieces: list[bytes] = []
        for some in range(0, len(starts), RANGES):
            pairs = zip(starts[some : some + RANGES], lengths[some : some + RANGES], strict=True)
            pieces += await asyncio.gather(*(self.read(key, start, length) for start, length in pairs))
        return pieces

    async def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """A blob's bytes from `start` up to, not including, `end`, in pieces."""
        if end is None:
            with _translated():
                end = (await obstore.head_async(self.objects, key))["size"]
        while start < end:
            piece = await self.read(key, start, min(READ, end - start))
            if not piece:
                raise StoreUnavailable(f"the blob {key} ends before byte {end}")
            start += len(piece)
            yield piece

    async def delete(self, keys: Iterable[str]) -> None:
        """Delete blobs; those that do not exist are passed over.

        Raises:
            StoreUnavailable: some could not be deleted; all have been tried.
        """
        wanted = list(keys)
        failed: BaseException | None = None
        for start in range(0, len(wanted), DELETES):
            some = (self._delete(key) for key in wanted[start : start + DELETES])
            for outcome in await asyncio.gather(*some, return_exceptions=True):
                failed = failed or outcome
        if failed is not None:
            raise failed

    async def _delete(self, key: str) -> None:
        try:
            await obstore.delete_async(self.objects, key)
        except FileNotFoundError:
            pass
        except (BaseError, OSError) as error:
            raise classify(error) from error

    async def peek(self, key: str) -> Small | None:
        """A small object; None when there is none with this key."""
        try:
            found = await obstore.get_async(self.objects, key)
            return Small(bytes(await found.bytes_async()), found.meta["last_modified"].timestamp())
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise classify(error) from error

    async def put_new(self, key: str, content: bytes) -> None:
        """Write a small object, unless there is one with this key."""
        try:
            await obstore.put_async(self.objects, key, content, mode="create")
        except AlreadyExistsError:
            pass
        except (BaseError, OSError) as error:
            raise classify(error) from error

    async def put_many(self, blobs: Sequence[tuple[str, bytes]]) -> None:
        """Write several blobs whose bytes are at hand: together, so that they wait for the disk together.

        Raises:
            StoreFull, StoreUnavailable: it failed; none of them exists.
        """
        try:
            with _translated():
                if self.folder is not None:
                    folder = self.folder
                    parts = [blobs[first::PUT_THREADS] for first in range(PUT_THREADS)]
                    await all_of(asyncio.to_thread(_write_synced, folder, part) for part in parts if part)
                    await self._sync(folder, [], [key for key, _ in blobs])
                else:
                    for start in range(0, len(blobs), PUTS):
                        some = blobs[start : start + PUTS]
                        await all_of(obstore.put_async(self.objects, key, content) for key, content in some)
        except StoreError:
            with suppress(StoreError):
                await self.delete([key for key, _ in blobs])
            raise

    async def ping(self) -> None:
        """Learn whether the store answers."""
        try:
            await obstore.head_async(self.objects, "ping")
        except FileNotFoundError:
            if self.folder is not None and not self.folder.is_dir():
                raise StoreUnavailable(f"the folder {self.folder} is gone") from None
        except (BaseError, OSError) as error:
            raise classify(error) from error

    async def sync(self, key: str) -> None:
        """Make a blob that was just written survive a power cut."""
        if self.folder is not None:
            with _translated():
                await self._sync(self.folder, [key], [key])

    async def _sync(self, folder: Path, blobs: Sequence[str], keys: Sequence[str]) -> None:
        """Sync some blobs, then the folders that `keys` lie in, and above these each that a new one may lie in."""
        wanted: dict[str, None] = {}
        for key in keys:
            path = key.rpartition("/")[0]
            wanted[path] = None
            while path and path not in self._durable:
                path = path.rpartition("/")[0]
                wanted[path] = None
        await asyncio.to_thread(_fsync, [folder / path for path in (*blobs, *wanted)])
        self._durable.update(wanted)

    async def remove_unfinished(self, key: str) -> None:
        """Remove what an unfinished write of this key has left in a folder."""
        if self.folder is not None:
            await asyncio.to_thread(_remove_unfinished, (self.folder / key).parent, (self.folder / key).name)

    async def older_than(self, moment: float, kind: str) -> AsyncIterator[list[str]]:
        """The keys of one kind of our blobs last written before a moment, some at a time.

        In a folder, unfinished writes are among them.

        Args:
            moment: Unix seconds.
            kind: one of `KINDS`.
        """
        if self.folder is not None:
            keys = await asyncio.to_thread(_older_than, self.folder, kind, moment)
            for start in range(0, len(keys), LISTED):
                yield keys[start : start + LISTED]
            return
        with _translated():
            async for chunk in obstore.list(self.objects, prefix=kind, chunk_size=LISTED):
                yield [
                    meta["path"]
                    for meta in chunk
                    if meta["last_modified"].timestamp() < moment and _OURS.fullmatch(meta["path"])
                ]

    async def remove(self, keys: Sequence[str]) -> None:
        """Remove what `older_than` gave, in a folder unfinished writes too."""
        if self.folder is None:
            await self.delete(keys)
        else:
            await asyncio.to_thread(_remove, [self.folder / key for key in keys])


async def all_of(steps: Iterable[Awaitable[object]]) -> None:
    """Wait for all, even if one fails or this task is cancelled: whoever cleans up must find nobody at work.

    Raises:
        Exception: the first that one of them raised.
    """
    for outcome in await asyncio.gather(*steps, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def _write_synced(folder: Path, blobs: Iterable[tuple[str, bytes]]) -> None:
    # With plain calls: each lets go of the interpreter's lock, for which the event loop then has to queue, and pathlib
    # and a file object make twice as many.
    for key, content in blobs:
        path = f"{folder}/{key}"
        unfinished = f"{path}#1"  # as obstore calls it, so that it is swept after a crash
        try:
            descriptor = _create(unfinished)
            try:
                left = memoryview(content)
                while left:
                    left = left[os.write(descriptor, left) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(unfinished, path)  # noqa: PTH104
        except OSError:
            Path(unfinished).unlink(missing_ok=True)
            raise


def _create(path: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:  # the first in its folder
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)


def _fsync(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_unfinished(folder: Path, name: str) -> None:
    # obstore writes to `name#1` and renames at the end.
    for path in folder.glob(f"{name}#*"):
        path.unlink(missing_ok=True)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _older_than(folder: Path, kind: str, moment: float) -> list[str]:
    keys = []
    for path in (folder / kind).rglob("*"):
        key = path.relative_to(folder).as_posix()
        try:
            if _OURS.fullmatch(key) and path.is_file() and path.stat().st_mtime < moment:
                keys.append(key)
        except FileNotFoundError:
            continue
    return keys


def open_folder(folder: Path) -> BlobStore:
    """The blob store in a folder, which is made if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    return BlobStore(LocalStore(folder), folder)


def open_url(url: str) -> BlobStore:
    """The blob store at a URL: `s3://bucket/prefix` and the like, or `file:///folder`.

    Credentials and endpoint come from the environment, as for the store's own tools (`AWS_ACCESS_KEY_ID`,
    `AWS_ENDPOINT_URL`, ...).

    Raises:
        ValueError: the URL names no store.
    """
    if url.startswith("file://"):
        return open_folder(Path(url.removeprefix("file://")))
    try:
        return BlobStore(from_url(url))
    except (BaseError, ValueError) as error:
        raise ValueError(f"{url!r} is not a store URL, such as s3://bucket/prefix: {error}") from error


async def write_whole(blobs: BlobStore, key: str, pieces: Iterable[bytes]) -> Writer:
    """Write a blob whose bytes are at hand.

    Returns:
        The closed writer, for the blob's size and hash.
    """
    async with blobs.write(key) as writer:
        for piece in pieces:
            await writer.write(piece)
        await writer.close()
    return writer
