"""Compressing a body piece by piece, off the event loop, with little memory however long the body is.

gzip is by far the slower of the two, and what most clients ask for. So several pieces are compressed at a time, each by
itself, and joined into one gzip member: a deflate stream may end one block at a byte boundary and begin the next
anywhere else (RFC 1951), and one member it must be, because many clients stop at the end of the first.
"""

from __future__ import annotations

import asyncio
import os
import struct
import zlib
from collections import deque
from collections.abc import AsyncIterator
from typing import Literal

from batchery.server.zstd import ZstdCompressor

Coding = Literal["zstd", "gzip"]

CODINGS: tuple[Coding, ...] = ("zstd", "gzip")
"""Content codings on offer, the better one first."""

GZIP_LEVEL = 1
ZSTD_LEVEL = 1

AT_ONCE = min(4, os.cpu_count() or 1)
"""Pieces of one body that are compressed at the same time."""

# RFC 1952: magic, deflate, no flags, no time, fastest, unknown system.
_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x04\xff"
_TRAILER = struct.Struct("<II")


def compressed(coding: Coding, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A body in a content coding. What reading the pieces raises comes through, and leaves the result cut off.

    Args:
        coding: which.
        pieces: the body.
    """
    return _gzip(pieces) if coding == "gzip" else _zstd(pieces)


async def _zstd(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    compressor = ZstdCompressor(level=ZSTD_LEVEL)
    async for piece in pieces:
        yield await asyncio.to_thread(compressor.compress, piece, ZstdCompressor.FLUSH_BLOCK)
    yield await asyncio.to_thread(compressor.flush)


async def _gzip(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    pending: deque[asyncio.Future[bytes]] = deque()
    checksum = length = 0
    yield _HEADER
    try:
        async for piece in pieces:
            if len(pending) == AT_ONCE:
                yield await pending.popleft()
            pending.append(loop.run_in_executor(None, _deflate, piece, zlib.Z_SYNC_FLUSH))
            checksum = await loop.run_in_executor(None, zlib.crc32, piece, checksum)
            length += len(piece)
        while pending:
            yield await pending.popleft()
    finally:
        for left in pending:  # the reader is gone, or nothing more can be read
            left.cancel()
    yield _deflate(b"", zlib.Z_FINISH) + _TRAILER.pack(checksum, length & 0xFFFFFFFF)


def _deflate(piece: bytes, end: int) -> bytes:
    compressor = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    return compressor.compress(piece) + compressor.flush(end)
