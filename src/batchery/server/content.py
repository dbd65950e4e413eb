"""`GET /files/{id}/content`: finished files from the blob store, growing ones from the result log.

Both are read in pieces as the client takes them, never with a transaction open. A line never changes its place, so an
answer that began with the log can end with the blob that the log was joined into meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.server.context import Context
from batchery.server.parameters import Parameters
from batchery.store import files, results
from batchery.store.errors import StoreError, StoreUnavailable
from batchery.store.files import FileRow
from batchery.store.results import Lines
from batchery.wire.errors import BadRequest
from batchery.wire.results import Kind

SEGMENTS = 4
SEGMENT_BYTES = 1024 * 1024
"""Segments of the log that are read, and so held, at a time: fewer where the one before had so many bytes that these
would have more than `SEGMENT_BYTES`, but at least one, which may have some megabytes."""


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


async def stream(context: Context, row: FileRow, part: Slice) -> AsyncIterator[bytes]:
    """The bytes of a slice of a file: from its blob as far as that goes, then from the log.

    With each look into the log goes one at the file's row, in the same transaction: the log may have been joined into a
    blob meanwhile, and what is in it now may belong to a later file of the same batch.

    Raises:
        StoreUnavailable: the file's content cannot be read, or is gone.
    """
    position = part.first
    count = 1
    while position < part.end:
        if row.blob_key is not None and position < row.blob_lines:
            end = min(part.end, row.blob_lines)
            async for piece in _lines_of_blob(context, row, position, end):
                yield piece
            position = end
            continue
        async with context.database.read() as connection:
            row = await _as_it_is_now(connection, row)
            segments = await _log_from(connection, row, position, count)
        if not segments and (row.blob_key is None or row.blob_lines <= position):
            raise StoreUnavailable(
                f"the lines of file {row.id} from {position} on are neither in the log nor in a blob"
            )
        while segments:
            segment = segments.pop(0)
            if segment.position > position:
                break
            count = min(SEGMENTS, max(1, SEGMENT_BYTES // max(1, len(segment.body))))
            skip = position - segment.position
            take = min(len(segment.ends), part.end - segment.position)
            yield segment.body[segment.ends[skip - 1] if skip else 0 : segment.ends[take - 1]]
            position = segment.position + take
            if position >= part.end:
                return


async def _log_from(connection: AsyncConnection, row: FileRow, position: int, count: int) -> list[Lines]:
    """Segments of the log from the one that holds this line on; none when it is not there, or not this file's."""
    if not row.grows or position < row.blob_lines:
        return []
    assert row.batch_id is not None
    kind: Kind = "output" if row.purpose == "batch_output" else "error"
    segments = await results.read(connection, row.batch_id, kind, position, segments=count)
    return segments if segments and segments[0].position <= position else []


async def _as_it_is_now(connection: AsyncConnection, row: FileRow) -> FileRow:
    now = await files.get(connection, row.id)
    if now is None:
        raise StoreUnavailable(f"the file {row.id} has been deleted while it was read")
    return now


async def stream_bytes(context: Context, row: FileRow, start: int, end: int) -> AsyncIterator[bytes]:
    """The bytes of a file's blob from `start` up to, not including, `end`.

    The blob may be replaced while it is read: a batch that is run again gets a new blob at its next end, which begins
    with the bytes of the old one, and the old one is deleted some time later.

    Raises:
        StoreUnavailable: the blob cannot be read, or the file has been deleted.
    """
    while start < end:
        assert row.blob_key is not None
        try:
            async for piece in context.blobs.stream(row.blob_key, start, end):
                start += len(piece)
                yield piece
        except StoreError:
            async with context.database.read() as connection:
                now = await _as_it_is_now(connection, row)
            if now.blob_key == row.blob_key or now.blob_key is None or now.blob_size < end:
                raise
            row = now


async def _lines_of_blob(context: Context, row: FileRow, first: int, end: int) -> AsyncIterator[bytes]:
    """The lines of a blob from `first` up to, not including, `end`; what lies before is read and counted."""
    passed = 0  # lines before the current piece
    async for piece in stream_bytes(context, row, 0, row.blob_size):
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
