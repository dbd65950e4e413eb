"""`GET /files/{id}/content`: finished files from the blob store, growing ones from the result log.

Both are read in pieces as the client takes them, never with a transaction open. A line never changes its place, so an
answer that began with the log can end with the blob that the log was joined into meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from batchery.engine.lifecycle import is_terminal
from batchery.server.context import Context
from batchery.server.parameters import Parameters
from batchery.store import files, results
from batchery.store.blobs import BlobStore
from batchery.store.errors import StoreUnavailable
from batchery.store.files import FileRow
from batchery.wire.errors import BadRequest
from batchery.wire.results import Kind

SEGMENTS = 4
"""Segments of the log that are read, and so held, at a time."""


class Slice(msgspec.Struct, frozen=True):
    """The lines of a file that an answer holds.

    Attributes:
        first: lines before the first of them.
        end: lines up to the end of the last; not less than `first`.
        last_line: for `X-Last-Line`.
        incomplete: for `X-Incomplete`: there is or may come more.
        whole: it is every line of a file that grows no more.
    """

    first: int
    end: int
    last_line: int
    incomplete: bool
    whole: bool


def read_slice(parameters: Parameters) -> tuple[int, int | None]:
    """The lines to leave out, and the most to send, as the query says.

    Raises:
        BadRequest: `offset` and `skip` differ, or one of the numbers is none.
    """
    offset = parameters.whole("offset", 0)
    skip = parameters.whole("skip", 0)
    if offset is not None and skip is not None and offset != skip:
        raise BadRequest(
            f"offset ({offset}) and skip ({skip}) mean the same but differ; give one of them.",
            param="skip",
            code="invalid_value",
        )
    limit = parameters.whole("limit", 1)
    return (offset if offset is not None else skip) or 0, limit


def slice_of(lines: int, *, growing: bool, offset: int, limit: int | None) -> Slice:
    """What is sent of a file. Pure.

    Args:
        lines: that the file has just now.
        growing: more may come.
        offset: lines to leave out.
        limit: the most lines to send; None for all.
    """
    first = min(offset, lines)
    end = lines if limit is None else min(lines, first + limit)
    return Slice(
        first=first,
        end=end,
        last_line=end,
        incomplete=growing or end < lines,
        whole=first == 0 and end == lines and not growing,
    )


def still_grows(row: FileRow) -> bool:
    """Whether lines may yet be added to a file."""
    return row.batch_status is not None and not is_terminal(row.batch_status)


async def stream(context: Context, row: FileRow, part: Slice) -> AsyncIterator[bytes]:
    """The bytes of a slice of a file.

    Raises:
        StoreUnavailable: the file's content cannot be read, or is gone.
    """
    if row.blob_key is None:
        async for piece in _from_log(context, row, part.first, part.end):
            yield piece
    elif part.whole:
        async for piece in context.blobs.stream(row.blob_key, 0, row.size):
            yield piece
    else:
        async for piece in _from_blob(context.blobs, row.blob_key, row.size, part.first, part.end):
            yield piece


async def _from_log(context: Context, row: FileRow, position: int, end: int) -> AsyncIterator[bytes]:
    assert row.batch_id is not None
    kind: Kind = "output" if row.purpose == "batch_output" else "error"
    while position < end:
        async with context.database.read() as connection:
            segments = await results.read(connection, row.batch_id, kind, position, segments=SEGMENTS)
        if not segments or segments[0].position > position:
            async for piece in _from_successor(context, row, position, end):
                yield piece
            return
        for segment in segments:
            if segment.position > position:  # dropped while we read: look again, and find the blob
                break
            skip = position - segment.position
            take = min(len(segment.ends), end - segment.position)
            yield segment.body[segment.ends[skip - 1] if skip else 0 : segment.ends[take - 1]]
            position = segment.position + take
            if position >= end:
                return


async def _from_successor(context: Context, row: FileRow, position: int, end: int) -> AsyncIterator[bytes]:
    """The rest of a file whose log is gone, because it has been joined into a blob."""
    async with context.database.read() as connection:
        now = await files.get(connection, row.id)
    if now is None or now.blob_key is None:
        raise StoreUnavailable(f"the lines of file {row.id} from {position} on are neither in the log nor in a blob")
    async for piece in _from_blob(context.blobs, now.blob_key, now.size, position, end):
        yield piece


async def _from_blob(blobs: BlobStore, key: str, size: int, first: int, end: int) -> AsyncIterator[bytes]:
    """The lines of a blob from `first` up to, not including, `end`; what lies before is read and counted."""
    if first >= end:
        return
    passed = 0  # lines before the current piece
    async for piece in blobs.stream(key, 0, size):
        breaks = piece.count(b"\n")
        start = 0
        if passed < first:
            if passed + breaks < first:
                passed += breaks
                continue
            start = after_lines(piece, first - passed)
        if passed + breaks >= end:
            yield piece[start : after_lines(piece, end - passed)]
            return
        passed += breaks
        if start < len(piece):
            yield piece[start:] if start else piece


def after_lines(piece: bytes, lines: int) -> int:
    """Where in a piece the line after so many line breaks begins, found by halving: a piece may be all line breaks."""
    low, high = 0, len(piece)  # the wanted break lies in piece[low:high]
    while lines and high - low > 1:
        middle = (low + high) // 2
        left = piece.count(b"\n", low, middle)
        if left >= lines:
            high = middle
        else:
            lines -= left
            low = middle
    return high if lines else 0
