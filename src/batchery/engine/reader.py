"""The reader: turns places in a plan into requests, by reading their lines from the input file.

Lines that lie together are read together, up to about a megabyte at a time, so memory does not depend on how long a
shard's lines are. Indexes are kept while there is room for them.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

import msgspec

from batchery.engine.work import LeasedShard, Work
from batchery.store import batches, files, line_index
from batchery.store.blobs import BlobStore
from batchery.store.database import Database
from batchery.store.errors import StoreUnavailable
from batchery.wire.lines import read_request
from batchery.wire.validation import FileIndex

PIECE_BYTES = 1024 * 1024
PIECE_REQUESTS = 128
INDEX_CACHE_BYTES = 48 * 1024 * 1024
SPARSE_READS = 16


class _Input(msgspec.Struct, frozen=True):
    blob_key: str
    index: FileIndex


class Reader:
    """Reads requests for one worker.

    Args:
        database: for where a batch's input lies.
        blobs: the input files and their indexes.
    """

    def __init__(self, database: Database, blobs: BlobStore) -> None:
        self._database = database
        self._blobs = blobs
        self._inputs: OrderedDict[str, _Input] = OrderedDict()

    async def take(self, shard: LeasedShard) -> list[Work]:
        """The shard's next requests, which it then no longer lists as unread.

        Raises:
            StoreError: they cannot be read just now; the shard is as before.
        """
        source = await self._input(shard.batch_id)
        lengths = source.index.lengths
        piece: list[tuple[int, int]] = []
        total = 0
        for place, request in reversed(shard.unread):
            piece.append((place, request))
            total += lengths[request]
            if total >= PIECE_BYTES or len(piece) >= PIECE_REQUESTS:
                break
        lines = await self._lines(source, [request for _, request in piece])
        works = []
        for (place, request), line in zip(piece, lines, strict=True):
            read = read_request(line)
            works.append(
                Work(shard, place, request, custom_id=read.custom_id, url=read.url, body=memoryview(read.body))
            )
        del shard.unread[-len(piece) :]
        return works

    async def custom_ids(self, batch: str, requests: list[int]) -> list[str]:
        """The `custom_id` of some requests of a batch, for lines that say why they never ran.

        Raises:
            StoreError: they cannot be read just now.
        """
        source = await self._input(batch)
        found: list[str] = []
        piece: list[int] = []
        total = 0
        for request in requests:
            piece.append(request)
            total += source.index.lengths[request]
            if total >= PIECE_BYTES:
                found += [read_request(line).custom_id for line in await self._lines(source, piece)]
                piece, total = [], 0
        found += [read_request(line).custom_id for line in await self._lines(source, piece)]
        return found

    async def _lines(self, source: _Input, requests: list[int]) -> list[bytes]:
        """The lines of some requests: in one read where they lie close together, else in several at a time."""
        if not requests:
            return []
        starts, lengths = source.index.starts, source.index.lengths
        first = min(starts[request] for request in requests)
        end = max(starts[request] + lengths[request] for request in requests)
        if end - first <= 2 * sum(lengths[request] for request in requests) + PIECE_BYTES // 4:
            data = await self._read(source, first, end - first)
            return [data[starts[request] - first : starts[request] - first + lengths[request]] for request in requests]
        lines: list[bytes] = []
        for some in range(0, len(requests), SPARSE_READS):
            reads = (self._read(source, starts[i], lengths[i]) for i in requests[some : some + SPARSE_READS])
            lines += await asyncio.gather(*reads)
        return lines

    async def _read(self, source: _Input, start: int, length: int) -> bytes:
        data = await self._blobs.read(source.blob_key, start, length)
        if len(data) != length:
            raise StoreUnavailable(f"the blob {source.blob_key} is shorter than its index says")
        return data

    async def index(self, batch: str) -> FileIndex:
        """The index of a batch's input file.

        Raises:
            StoreError: it cannot be read just now.
        """
        return (await self._input(batch)).index

    async def _input(self, batch: str) -> _Input:
        source = self._inputs.get(batch)
        if source is not None:
            self._inputs.move_to_end(batch)
            return source
        async with self._database.read() as connection:
            row = await batches.get(connection, batch)
            file = None if row is None else await files.get(connection, row.input_file)
        if file is None or file.blob_key is None or file.index_key is None:
            raise StoreUnavailable(f"the input file of batch {batch} is gone")
        pieces = [piece async for piece in self._blobs.stream(file.index_key)]
        try:
            source = _Input(file.blob_key, line_index.decode(b"".join(pieces)))
        except line_index.InvalidIndexError as error:
            raise StoreUnavailable(f"the input file of batch {batch} cannot be used: {error}") from error
        self._inputs[batch] = source
        while len(self._inputs) > 1 and sum(_size(item.index) for item in self._inputs.values()) > INDEX_CACHE_BYTES:
            self._inputs.popitem(last=False)
        return source


def _size(index: FileIndex) -> int:
    return (20 if index.numbers is not None else 16) * len(index) + 1024
