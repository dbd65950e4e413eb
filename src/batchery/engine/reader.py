"""The reader: turns places in a plan into requests, by reading their lines from the input file.

Lines that lie together are read together, up to about a megabyte at a time, so memory does not depend on how long a
shard's lines are. Indexes are kept while there is room for them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from operator import add

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.engine.work import LeasedShard, Work
from batchery.store import batches, files, line_index, result_index, small_indexes
from batchery.store.batches import BatchRow
from batchery.store.blobs import BlobStore
from batchery.store.database import Database
from batchery.store.errors import StoreError, StoreUnavailable
from batchery.store.result_index import ResultIndex
from batchery.wire import ids
from batchery.wire.file_index import FileIndex, problem_of
from batchery.wire.lines import read_request
from batchery.wire.results import Failure, failure_line

PIECE_BYTES = 1024 * 1024
PIECE_REQUESTS = 256
ALIKE_REQUESTS = 16
INDEX_CACHE_BYTES = 48 * 1024 * 1024
INVALID_PIECE = 1_000


PLACES = 10_000
"""Batches of which it is kept in mind where their inputs are."""


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
        self._places: OrderedDict[str, files.Place] = OrderedDict()  # by batch
        self._inputs: OrderedDict[str, _Input] = OrderedDict()  # by blob, since batches may share one

    async def locate(self, connection: AsyncConnection, rows: Sequence[BatchRow]) -> None:
        """Look up where the inputs of some batches are, all in one query.

        Raises:
            StoreError: the database failed.
        """
        missing = [row for row in rows if row.id not in self._places]
        if not missing:
            return
        found = await files.places(connection, sorted({row.input_file for row in missing}))
        for row in missing:
            if row.input_file in found:
                self._places[row.id] = found[row.input_file]
        while len(self._places) > PLACES:
            self._places.popitem(last=False)

    async def note_prefixes(self, shards: Iterable[LeasedShard]) -> None:
        """Note with which beginning each of these shards goes on, as far as it can be read just now."""
        for shard in shards:
            with suppress(StoreError):
                _note_prefix(shard, (await self._input(shard.batch_id)).index)

    async def take(self, shard: LeasedShard, *, alike: bool = False, keyed: bool = False) -> list[Work]:
        """The shard's next requests, which it then no longer lists as unread.

        Args:
            alike: go not far beyond those whose prompts begin like the first one's.
            keyed: say with each how its prompt begins.

        Raises:
            StoreError: they cannot be read just now; the shard is as before.
        """
        source = await self._input(shard.batch_id)
        lengths, prefixes = source.index.lengths, source.index.prefixes
        first = prefixes.key(shard.unread[-1][1])
        piece = shard.unread[: -PIECE_REQUESTS - 1 : -1]
        ends = list(accumulate([lengths[request] for _, request in piece]))
        del piece[bisect_left(ends, PIECE_BYTES) + 1 :]
        if alike:
            for count in range(ALIKE_REQUESTS, len(piece)):
                if prefixes.key(piece[count][1]) != first:
                    del piece[count:]
                    break
        lines = await self._lines(source, [request for _, request in piece], at_once=True)
        works = []
        for (place, request), line in zip(piece, lines, strict=True):
            read = read_request(line)
            body = bytes(read.body)  # copied out of the line, which is let go with all that is around it
            works.append(Work(shard, place, request, read.custom_id, read.url, body, len(body)))
        if keyed:
            for work in works:
                work.prefix = prefixes.key(work.request)
        if shard.copies is not None:
            for work in works:
                work.copies = shard.copies.get(work.place, ())
        del shard.unread[-len(piece) :]
        _note_prefix(shard, source.index)
        return works

    async def lines(self, batch: str, requests: Sequence[int]) -> AsyncIterator[tuple[Sequence[int], list[bytes]]]:
        """The lines of some requests of a batch, in file order, a piece at a time.

        Raises:
            StoreError: they cannot be read just now.
        """
        source = await self._input(batch)
        lengths = source.index.lengths
        first, total = 0, 0
        for place, request in enumerate(requests):
            total += lengths[request]
            if total >= PIECE_BYTES:
                yield requests[first : place + 1], await self._lines(source, list(requests[first : place + 1]))
                first, total = place + 1, 0
        if first < len(requests):
            yield requests[first:], await self._lines(source, list(requests[first:]))

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

    async def invalid_lines(self, row: BatchRow, first: int) -> AsyncIterator[list[bytes]]:
        """The error lines for the bad lines of a batch's input file, in file order, a piece at a time.

        Args:
            first: leave out so many of them.

        Raises:
            StoreError: they cannot be read just now.
        """
        source = await self._input(row.id)
        good = row.total - row.invalid
        bad = source.index.bad
        lines: list[bytes] = []
        for place in range(first, len(bad)):
            read = not bad.is_too_large(place)
            text = await self._read(source, bad.starts[place], bad.lengths[place]) if read else b""
            problem = problem_of(source.index, place, text)
            lines.append(
                failure_line(
                    ids.request_id(row.id, good + place),
                    problem.custom_id,
                    Failure(problem.code, problem.message),
                    line=problem.line,
                )
            )
            if len(lines) >= INVALID_PIECE:
                yield lines
                lines = []
        if lines:
            yield lines

    async def results(self, row: BatchRow) -> ResultIndex | None:
        """How the requests of a batch ended that has ended before; None where there is no such index.

        Raises:
            StoreError: it cannot be read just now.
        """
        return await read_results(self._database, self._blobs, row)

    async def _lines(self, source: _Input, requests: list[int], *, at_once: bool = False) -> list[bytes]:
        """The lines of some requests: in one read where they lie close together, else in several at a time.

        Args:
            at_once: if they can be had without waiting, do not; for who does not read on and on.
        """
        if not requests:
            return []
        index = source.index
        starts = [index.starts[request] for request in requests]
        lengths = [index.lengths[request] for request in requests]
        ends = list(map(add, starts, lengths))
        first, end = min(starts), max(ends)
        if end - first <= 2 * sum(lengths) + PIECE_BYTES // 4:
            data = await self._read(source, first, end - first, at_once=at_once)
            return [data[start - first : end - first] for start, end in zip(starts, ends, strict=True)]
        lines = await self._blobs.read_each(source.blob_key, starts, lengths)
        if list(map(len, lines)) != lengths:
            raise _short(source)
        return lines

    async def _read(self, source: _Input, start: int, length: int, *, at_once: bool = False) -> bytes:
        read = self._blobs.read_at_once if at_once else self._blobs.read
        data = await read(source.blob_key, start, length)
        if len(data) != length:
            raise _short(source)
        return data

    async def index(self, batch: str) -> FileIndex:
        """The index of a batch's input file.

        Raises:
            StoreError: it cannot be read just now.
        """
        return (await self._input(batch)).index

    async def numbers(self, batch: str) -> array[int]:
        """The physical line of each request of a batch, bad lines after the good ones.

        Raises:
            StoreError: it cannot be read just now.
        """
        index = (await self._input(batch)).index
        numbers = index.numbers if index.numbers is not None else array("I", range(1, len(index) + 1))
        return numbers + index.bad.numbers

    async def _input(self, batch: str) -> _Input:
        place = self._places.get(batch)
        if place is None:
            async with self._database.read() as connection:
                row = await batches.get(connection, batch)
                await self.locate(connection, [] if row is None else [row])
            place = self._places.get(batch)
        if place is None:
            raise StoreUnavailable(f"the input file of batch {batch} is gone")
        source = self._inputs.get(place.blob_key)
        if source is not None:
            self._inputs.move_to_end(place.blob_key)
            return source
        content = await self._blobs.read_whole(place.index_key)
        try:
            source = _Input(place.blob_key, line_index.decode(content))
        except line_index.InvalidIndexError as error:
            raise StoreUnavailable(f"the input file of batch {batch} cannot be used: {error}") from error
        self._inputs[place.blob_key] = source
        while len(self._inputs) > 1 and sum(_size(item.index) for item in self._inputs.values()) > INDEX_CACHE_BYTES:
            self._inputs.popitem(last=False)
        return source


async def read_results(database: Database, blobs: BlobStore, row: BatchRow) -> ResultIndex | None:
    """The result index of a batch, wherever it is; None where the batch has none.

    Raises:
        StoreError: it cannot be read just now.
    """
    key = row.result_index
    if key is None:
        return None
    content: bytes | None
    if key == small_indexes.HERE:
        async with database.read() as connection:
            content = await small_indexes.get(connection, row.seq)
        if content is None:  # the batch has another one now, or is gone
            raise StoreUnavailable(f"the result index of batch {row.id} is gone")
    else:
        content = b"".join([piece async for piece in blobs.stream(key)])
    try:
        return result_index.decode(content)
    except result_index.DamagedIndexError as error:
        raise StoreUnavailable(f"the result index of batch {row.id} cannot be used: {error}") from error


def _note_prefix(shard: LeasedShard, index: FileIndex) -> None:
    if shard.unread:
        shard.prefix = index.prefixes.key(shard.unread[-1][1])


def _short(source: _Input) -> StoreUnavailable:
    return StoreUnavailable(f"the blob {source.blob_key} is shorter than its index says")


def _size(index: FileIndex) -> int:
    each = 16 + 4 * (index.numbers is not None) + 2 * (index.prefixes.groups is not None)
    return each * len(index) + 8 * len(index.prefixes.keys) + 1024
