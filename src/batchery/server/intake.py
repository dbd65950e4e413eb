"""Taking in an uploaded file: while one piece arrives, the one before it is written to the store and validated.

Never more than three pieces are held, so memory is flat; validation runs in a thread, so other requests go on. What
is not kept at the end is removed.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

import msgspec
import structlog

from batchery.store import line_index
from batchery.store.blobs import BlobStore, Writer, new_key, write_whole
from batchery.store.errors import StoreError
from batchery.wire.errors import TooLarge
from batchery.wire.lines import Limits
from batchery.wire.validation import LineValidator, Report

PIECE = 1024 * 1024

log = structlog.get_logger()


class TakenIn(msgspec.Struct, frozen=True):
    """A file that is in the store.

    Attributes:
        key: its blob.
        index_key: its line index; None for a file of which nothing can run.
        size: in bytes.
        sha256: as hex.
        lines: physical lines; the last one counts also without a line break.
        report: what validation found.
    """

    key: str
    index_key: str | None
    size: int
    sha256: str
    lines: int
    report: Report


def file_too_large(limits: Limits) -> TooLarge:
    """The error for a file over its limit."""
    return TooLarge(
        f"The file is larger than {limits.file_bytes} bytes, the most that one file may have. Nothing was stored; "
        "split it into smaller files.",
        param="file",
    )


class Intake:
    """Takes in one file; use it as an async context manager, and call `keep` once the file has its row.

    Args:
        blobs: where it goes.
        id: the file's, bare.
        limits: what it may be.
    """

    def __init__(self, blobs: BlobStore, id: str, limits: Limits) -> None:
        self._blobs = blobs
        self._key = new_key("files", id)
        self._index_key = new_key("index", id)
        self._limits = limits
        self._validator = LineValidator(limits)
        self._arriving = bytearray()
        self._size = 0
        self._breaks = 0
        self._ends_with_break = True
        self._task: asyncio.Task[None] | None = None
        self._writer: Writer | None = None
        self._made: list[str] = []
        self._kept = False

    async def __aenter__(self) -> Intake:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        if self._writer is not None:
            await self._writer.abort()
        if not self._kept and self._made:
            try:
                await self._blobs.delete(self._made)
            except StoreError as failure:  # the sweep of remnants finds them
                log.warning("blobs of a refused upload are left", keys=self._made, cause=str(failure))

    def keep(self) -> None:
        """The file has its row, or may have: leave its blobs where they are."""
        self._kept = True

    async def add(self, data: bytes) -> None:
        """The next bytes of the file; waits while there is a piece in hand.

        Raises:
            TooLarge: the file is over its limit.
            StoreFull, StoreUnavailable: writing failed.
        """
        self._size += len(data)
        if self._size > self._limits.file_bytes:
            raise file_too_large(self._limits)
        self._arriving += data
        if len(self._arriving) >= PIECE:
            await self._hand_on()

    async def _hand_on(self) -> None:
        piece = bytes(self._arriving)
        self._arriving.clear()
        await self._settle()
        self._task = asyncio.create_task(self._take(piece))

    async def _settle(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            await task

    async def _take(self, piece: bytes) -> None:
        if self._writer is None:
            self._writer = self._blobs.write(self._key)
        # Both are waited for even if one fails: whoever cleans up must find nobody at work.
        done = await asyncio.gather(
            asyncio.to_thread(self._look, piece), self._writer.write(piece), return_exceptions=True
        )
        for failure in done:
            if failure is not None:
                raise failure

    def _look(self, piece: bytes) -> None:
        self._breaks += piece.count(b"\n")
        self._ends_with_break = piece.endswith(b"\n")
        self._validator.feed(piece)

    async def finish(self) -> TakenIn:
        """The file is complete: make it durable, and give the verdict.

        Raises:
            StoreFull, StoreUnavailable: writing failed.
        """
        if self._arriving:
            await self._hand_on()
        await self._settle()
        writer = self._writer if self._writer is not None else self._blobs.write(self._key)
        self._writer = writer
        await writer.close()
        self._writer = None
        self._made.append(self._key)
        report = await asyncio.to_thread(self._validator.finish, self._reader())
        if report.can_skip:
            self._made.append(self._index_key)
            await write_whole(self._blobs, self._index_key, line_index.encode(report.index))
        return TakenIn(
            key=self._key,
            index_key=self._index_key if report.can_skip else None,
            size=self._size,
            sha256=writer.sha256,
            lines=self._breaks + (0 if self._ends_with_break else 1),
            report=report,
        )

    def _reader(self) -> _Reader:
        return _Reader(self._blobs, self._key, asyncio.get_running_loop())


class _Reader:
    """Reads the blob back from the thread that validates, through the loop."""

    def __init__(self, blobs: BlobStore, key: str, loop: asyncio.AbstractEventLoop) -> None:
        self._blobs = blobs
        self._key = key
        self._loop = loop

    def __call__(self, start: int, length: int) -> bytes:
        return asyncio.run_coroutine_threadsafe(self._blobs.read(self._key, start, length), self._loop).result()
