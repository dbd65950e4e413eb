"""`GET /batches/{id}/results`: one line for each request, in input order, whether it has ended or not.

What ended is the line of its file with some keys more, spliced from its bytes and never decoded. Where each line is
comes from the result index of an ended batch, and while a batch runs from the log. The answer is a picture of one
moment: what ends while it is sent stays pending in it.
"""

from __future__ import annotations

import asyncio
import re
from array import array
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from heapq import merge
from typing import Any

import msgspec
from litestar import Response, get
from litestar.params import FromPath
from litestar.response import Stream

from batchery.engine.reader import Reader, read_results
from batchery.server.batches import no_such_batch, owned_batch
from batchery.server.content import read_slice
from batchery.server.context import AnyRequest, Context, context_of, owner_of
from batchery.server.exchange import at_end, is_head
from batchery.server.parameters import parameters_of
from batchery.server.places import Downloads
from batchery.store import batches, files, results
from batchery.store.batches import BatchRow
from batchery.store.errors import StoreUnavailable
from batchery.store.result_index import CODES, STATUSES, ResultIndex
from batchery.store.schema import LIVE
from batchery.wire.errors import NotFound
from batchery.wire.results import Kind

NDJSON = "application/x-ndjson"

PIECE_REQUESTS = 256
PIECE_BYTES = 4 * 1024 * 1024
GAP = 32 * 1024
"""Bytes between two lines that are read together rather than apart."""

READS = 16
SEGMENT_CACHE = 16 * 1024 * 1024

_PREFIX = len(b'{"id":"batch_req_' + b"0" * 32 + b'","custom_id":')
_CUSTOM_ID = re.compile(rb'null|"(?:[^"\\]|\\.)*"')

_COMPLETED = CODES["completed"]
_PENDING = CODES["pending"]
_SHOWN = tuple("failed" if status == "invalid" else status for status in STATUSES)
"""A bad line that was passed over is shown as failed: its error says what is wrong with it."""


class _Picture(msgspec.Struct):
    """How a batch's requests stand, and where their lines are.

    Attributes:
        row: the batch.
        index: of its finished files; entries of requests in the log have no meaning but their status and attempts.
        logged: for each request, 1 + the number of the segment that its line is in; 0 for a line in a finished file.
        segments: the segments of the log that hold lines: kind and position.
        keys: the blobs of the output and the error file; None where there is none.
    """

    row: BatchRow
    index: ResultIndex
    logged: array[int]
    segments: list[tuple[Kind, int]]
    keys: dict[Kind, str | None]

    def kind(self, request: int) -> Kind:
        """Which file an ended request's line is in."""
        return "output" if self.index.statuses[request] == _COMPLETED else "error"


@get("/batches/{id:str}/results")
async def list_results(request: AnyRequest, id: FromPath[str]) -> Response[Any]:
    """List a batch's results in input order."""
    context, owner = context_of(request), owner_of(request)
    parameters = parameters_of(request)
    offset, limit = read_slice(parameters)
    status = parameters.choice("status", tuple(dict.fromkeys(_SHOWN)))
    async with context.database.read() as connection:
        row = await owned_batch(connection, id, owner)
    downloads: Downloads = request.app.state.downloads
    downloads.take()
    at_end(request, downloads.give_back)
    picture = await _picture(context, row)
    wanted = list(_in_order(picture, status))
    first = min(offset, len(wanted))
    end = len(wanted) if limit is None else min(len(wanted), first + limit)
    headers = {
        "X-Last-Line": str(end),
        "X-Incomplete": "true" if picture.row.status in LIVE or end < len(wanted) else "false",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    }
    if first >= end or is_head(request):
        return Response(b"", headers=headers, media_type=NDJSON)
    _check_files(picture, wanted[first:end])
    return Stream(await begun(_Sender(context, picture).lines(wanted[first:end])), headers=headers, media_type=NDJSON)


def _check_files(picture: _Picture, requests: list[int]) -> None:
    """Make sure that the files are there whose lines are wanted.

    Raises:
        NotFound: one was deleted or has expired.
    """
    statuses = picture.index.statuses
    for kind, key in picture.keys.items():
        if key is None and any(
            statuses[request] != _PENDING and not picture.logged[request] and picture.kind(request) == kind
            for request in requests
        ):
            raise NotFound(
                f"The {kind} file of this batch was deleted or has expired, and these results with it.", param="id"
            )


async def begun(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same pieces, the first of which has been made: what cannot be read is still an error answer."""
    first = await anext(pieces)

    async def rest() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return rest()


async def _picture(context: Context, row: BatchRow) -> _Picture:
    """Look where a batch's results are.

    Raises:
        NotFound: the batch was deleted meanwhile.
        StoreUnavailable: its indexes cannot be read.
    """
    for _ in range(3):
        async with context.database.read() as connection:
            current = await batches.get(connection, row.id)
            if current is None:
                raise no_such_batch(row.id)
            logs: list[tuple[Kind, list[results.Layout]]] = []
            keys: dict[Kind, str | None] = {"output": None, "error": None}
            file_ids: dict[Kind, str | None] = {"output": current.output_file, "error": current.error_file}
            for kind, file_id in file_ids.items():
                file = None if file_id is None else await files.get(connection, file_id)
                keys[kind] = None if file is None else file.blob_key
                if current.status in LIVE:
                    beginning = file.blob_lines if file is not None and file.blob_key is not None else 0
                    logs.append((kind, await _whole_layout(connection, current.id, kind, beginning)))
        try:
            index = await _index(context, current)
        except StoreUnavailable:  # a batch that has ended in between has another index now
            continue
        return _placed(current, index, logs, keys)
    raise StoreUnavailable(f"the results of batch {row.id} cannot be read")


async def _whole_layout(connection: Any, batch: str, kind: Kind, first: int) -> list[results.Layout]:
    found: list[results.Layout] = []
    while some := await results.layout(connection, batch, kind, first):
        found += some
        first = some[-1].position + len(some[-1].ends)
    return found


async def _index(context: Context, row: BatchRow) -> ResultIndex:
    index = await read_results(context.database, context.blobs, row)
    if index is not None:
        return index
    if row.total == 0:  # its file was bad: it has no requests
        return ResultIndex.empty(array("I"))
    return ResultIndex.empty(await Reader(context.database, context.blobs).numbers(row.id))


def _placed(
    row: BatchRow, index: ResultIndex, logs: list[tuple[Kind, list[results.Layout]]], keys: dict[Kind, str | None]
) -> _Picture:
    """What the index says of the time before, and what the log says of now."""
    picture = _Picture(row, index, array("I", bytes(4 * len(index))), [], keys)
    if row.status not in LIVE:
        return picture
    for request in index.to_retry():  # what ended without an answer before a retry is open again
        index.put(request, "pending", 0, 0, 0)
    good = row.total - row.invalid
    for request in range(good, row.total):
        index.statuses[request] = _PENDING
    for kind, segments in logs:
        for segment in segments:
            picture.segments.append((kind, segment.position))
            number = len(picture.segments)
            index.put_lines(kind, 0, segment.requests, segment.ends, segment.attempts, good)
            for request in segment.requests:
                picture.logged[request] = number
    return picture


def _in_order(picture: _Picture, status: str | None) -> Iterator[int]:
    """The requests with a status, or all of them, by their lines in the input file."""
    index = picture.index
    good = picture.row.total - picture.row.invalid if len(index) else 0
    ordered: Iterator[int] = iter(range(good))
    if good < len(index):
        ordered = merge(ordered, range(good, len(index)), key=index.numbers.__getitem__)
    if status is None:
        return ordered
    codes = {code for code, shown in enumerate(_SHOWN) if shown == status}
    return (request for request in ordered if index.statuses[request] in codes)


class _Sender:
    """Sends the lines of one answer.

    Args:
        context: where the files are.
        picture: where the lines are; replaced when the batch ends meanwhile and its log is dropped.
    """

    def __init__(self, context: Context, picture: _Picture) -> None:
        self._context = context
        self._picture = picture
        self._statuses = bytes(picture.index.statuses)
        self._reader = Reader(context.database, context.blobs)
        self._bodies: OrderedDict[tuple[Kind, int], bytes] = OrderedDict()

    async def lines(self, requests: list[int]) -> AsyncIterator[bytes]:
        """The lines of these requests, some at a time."""
        place = 0
        while place < len(requests):
            piece: list[int] = []
            size = 0
            while place < len(requests) and len(piece) < PIECE_REQUESTS and size < PIECE_BYTES:
                piece.append(requests[place])
                size += self._picture.index.lengths[requests[place]]
                place += 1
            try:
                yield b"".join(await self._piece(piece))
            except StoreUnavailable:
                # The batch has ended since: its log is gone, and its lines are in files. Or it was a real failure,
                # which then comes again.
                await self._look_again()
                yield b"".join(await self._piece(piece))

    async def _look_again(self) -> None:
        self._picture = await _picture(self._context, self._picture.row)
        self._bodies.clear()

    async def _piece(self, requests: list[int]) -> list[bytes]:
        pending = [request for request in requests if self._statuses[request] == _PENDING]
        found: dict[int, bytes] = {}
        if pending:
            good = self._picture.row.total - self._picture.row.invalid
            runnable = [request for request in pending if request < good]
            custom_ids = await self._reader.custom_ids(self._picture.row.id, runnable)
            known = dict(zip(runnable, custom_ids, strict=True))
            for request in pending:
                found[request] = self._pending_line(request, known.get(request))
        ended = [request for request in requests if self._statuses[request] != _PENDING]
        in_log = [request for request in ended if self._picture.logged[request]]
        for request in in_log:
            found[request] = self._line(request, await self._from_log(request))
        in_files = [request for request in ended if not self._picture.logged[request]]
        for kind in ("output", "error"):
            some = [request for request in in_files if self._picture.kind(request) == kind]
            if some:
                for request, line in (await self._from_file(kind, some)).items():
                    found[request] = self._line(request, line)
        return [found[request] for request in requests]

    def _pending_line(self, request: int, custom_id: str | None) -> bytes:
        return b'{"custom_id":%b,"line":%d,"status":"pending","response":null,"error":null,"attempts":0}\n' % (
            msgspec.json.encode(custom_id),
            self._picture.index.numbers[request],
        )

    def _line(self, request: int, line: bytes) -> bytes:
        index = self._picture.index
        return result_line(
            line,
            number=index.numbers[request],
            status=_SHOWN[self._statuses[request]],
            attempts=index.attempts[request],
        )

    async def _from_log(self, request: int) -> bytes:
        picture = self._picture
        kind, position = picture.segments[picture.logged[request] - 1]
        body = self._bodies.get((kind, position))
        if body is None:
            async with self._context.database.read() as connection:
                body = await results.body(connection, picture.row.id, kind, position)
            if body is None:
                raise StoreUnavailable(f"a segment of the log of batch {picture.row.id} is gone")
            self._bodies[kind, position] = body
            while len(self._bodies) > 1 and sum(map(len, self._bodies.values())) > SEGMENT_CACHE:
                self._bodies.popitem(last=False)
        start = picture.index.starts[request]
        return body[start : start + picture.index.lengths[request]]

    async def _from_file(self, kind: Kind, requests: list[int]) -> dict[int, bytes]:
        """Lines of a finished file, of which those that lie close together are read together."""
        index, key = self._picture.index, self._picture.keys[kind]
        if key is None:
            raise StoreUnavailable(f"the {kind} file of batch {self._picture.row.id} is gone")
        runs: list[list[int]] = []
        end = -1
        for request in sorted(requests, key=index.starts.__getitem__):
            if runs and index.starts[request] - end <= GAP:
                runs[-1].append(request)
            else:
                runs.append([request])
            end = index.starts[request] + index.lengths[request]
        found: dict[int, bytes] = {}
        for some in range(0, len(runs), READS):
            reads = (self._read_run(key, run) for run in runs[some : some + READS])
            for lines in await asyncio.gather(*reads):
                found |= lines
        return found

    async def _read_run(self, key: str, run: list[int]) -> dict[int, bytes]:
        index = self._picture.index
        first, last = index.starts[run[0]], run[-1]
        data = await self._context.blobs.read(key, first, index.starts[last] + index.lengths[last] - first)
        lines = {}
        for request in run:
            start = index.starts[request] - first
            lines[request] = data[start : start + index.lengths[request]]
            if len(lines[request]) != index.lengths[request]:
                raise StoreUnavailable(f"the blob {key} is shorter than its index says")
        return lines


def result_line(line: bytes, *, number: int, status: str, attempts: int) -> bytes:
    """A line of `/results` from the line of its file, spliced and not decoded, as an answer may hold any JSON there is.

    Args:
        line: as `wire.results` writes it, with its line break.
        number: the physical line of the request in the input file.
        status: how it ended.
        attempts: how often it was sent.
    """
    custom_id = _CUSTOM_ID.match(line, _PREFIX)
    if custom_id is None:
        raise StoreUnavailable(f"a result line begins with {line[:_PREFIX]!r}, which it never should")
    rest = line[custom_id.end() : -2].removesuffix(b',"line":%d' % number)
    return b'{"custom_id":%b,"line":%d,"status":"%b"%b,"attempts":%d}\n' % (
        custom_id[0],
        number,
        status.encode(),
        rest,
        attempts,
    )
