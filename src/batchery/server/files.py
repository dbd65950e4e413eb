"""The routes of files: upload, list, get, delete, content."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import structlog
from litestar import Response, delete, get, post
from litestar.params import FromPath
from litestar.response import Stream

from batchery.server.compress import compressed
from batchery.server.content import read_slice, slice_of, stream, stream_bytes
from batchery.server.context import AnyRequest, Context, context_of, owner_of
from batchery.server.download import delivery, piecemeal
from batchery.server.exchange import at_end, is_head
from batchery.server.parameters import parameters_of
from batchery.server.places import Downloads
from batchery.server.render import file_object, file_page
from batchery.server.upload import store_upload
from batchery.store import batches, files
from batchery.store import idempotency as idempotency_keys
from batchery.store.errors import StoreError
from batchery.store.files import FileRow
from batchery.wire import ids
from batchery.wire.errors import BadRequest, Conflict, NotFound
from batchery.wire.objects import DeletedFile, FileList, FileObject

MAX_PAGE = 10_000
PURPOSES = ("batch", "batch_output", "batch_error")
NDJSON = "application/x-ndjson"

log = structlog.get_logger()


def no_such_file(id: str, param: str = "id") -> NotFound:
    """The answer for a file that does not exist, or is somebody else's."""
    return NotFound(f"No such File object: {id[:100]}", param=param)


@post("/files", status_code=200)
async def create_file(request: AnyRequest) -> FileObject:
    """Upload a file of requests."""
    return file_object(await store_upload(request))


@get("/files")
async def list_files(request: AnyRequest) -> FileList:
    """List the files."""
    parameters = parameters_of(request)
    limit = parameters.whole("limit", 1, MAX_PAGE) or MAX_PAGE
    newest_first = parameters.choice("order", ("asc", "desc")) != "asc"
    purpose = parameters.choice("purpose", PURPOSES)
    after = parameters.text("after")
    owner, now = owner_of(request), context_of(request).now()
    async with context_of(request).database.read() as connection:
        seq = None
        if after is not None:
            key = ids.parse("file", after)
            row = await files.get(connection, key, at=now) if key is not None else None
            if row is None or row.owner != owner:
                raise BadRequest(
                    f"after must be the id of one of your files, not {after[:100]!r}.", param="after", code="not_found"
                )
            seq = row.seq
        rows = await files.page(
            connection, owner, limit=limit + 1, after=seq, newest_first=newest_first, purpose=purpose, at=now
        )
    return file_page(rows, limit)


async def _owned(request: AnyRequest, id: str) -> FileRow:
    key = ids.parse("file", id)
    if key is None:
        raise no_such_file(id)
    context = context_of(request)
    async with context.database.read() as connection:
        row = await files.get(connection, key, at=context.now())
    if row is None or row.owner != owner_of(request):
        raise no_such_file(id)
    return row


@get("/files/{id:str}")
async def get_file(request: AnyRequest, id: FromPath[str]) -> FileObject:
    """Get a file's description."""
    return file_object(await _owned(request, id))


@delete("/files/{id:str}", status_code=200)
async def delete_file(request: AnyRequest, id: FromPath[str]) -> DeletedFile:
    """Delete a file that no live batch uses."""
    context = context_of(request)
    row = await _owned(request, id)
    async with context.database.write() as connection:
        # A batch that is just being created over the file holds the same lock.
        if not await files.lock(connection, row.id):
            raise no_such_file(id)
        if await batches.live_of_file(connection, row.id):
            raise Conflict(
                f"The file {ids.show('file', row.id)} is used by a batch that has not ended; cancel the batch or wait "
                "for its end.",
                param="id",
                code="file_in_use",
            )
        gone = await files.delete(connection, row.id, context.clock())
        await idempotency_keys.forget(connection, row.id)
    try:
        await context.blobs.delete(gone.blob_keys)
    except StoreError as error:  # the file is gone all the same, and its blobs are noted dead
        log.warning("the blobs of a deleted file are left to the sweep", file=row.id, cause=str(error))
    return DeletedFile(id=ids.show("file", row.id))


@get("/files/{id:str}/content")
async def get_content(request: AnyRequest, id: FromPath[str]) -> Response[Any]:
    """Download a file, also while it grows."""
    offset, limit = read_slice(parameters_of(request))
    row = await _owned(request, id)
    part = slice_of(row.lines, growing=row.grows, offset=offset, limit=limit)
    head = is_head(request)
    if part.whole and offset == 0 and limit is None:
        sent = delivery(row, lambda name: ", ".join(request.headers.getall(name, ())) or None, head=head)
    else:
        sent = piecemeal(row, part)
    headers = sent.headers | {
        "X-Last-Line": str(part.last_line),
        "X-Incomplete": "true" if part.incomplete else "false",
        "Content-Disposition": "attachment",
        "X-Content-Type-Options": "nosniff",
    }
    if sent.status == 304 or part.first >= part.end:
        return Response(b"", status_code=sent.status, headers=headers, media_type=NDJSON)
    if head:  # no length is made up where GET has none
        return Stream((), headers=headers, media_type=NDJSON)
    context = context_of(request)
    downloads: Downloads = request.app.state.downloads
    downloads.take()
    at_end(request, downloads.give_back)
    pieces = stream_bytes(context, row, sent.start, sent.end) if part.whole else stream(context, row, part)
    body = await _begun(context, row, pieces)
    if sent.coding is not None:
        body = compressed(sent.coding, body)
    return Stream(body, status_code=sent.status, headers=headers, media_type=NDJSON)


async def _begun(context: Context, row: FileRow, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The content, of which the first piece has been read: a file that cannot be read is still an error answer."""
    try:
        first = await anext(pieces)
    except StoreError:
        async with context.database.read() as connection:
            if await files.get(connection, row.id) is None:  # deleted a moment ago
                raise no_such_file(ids.show("file", row.id)) from None
        raise

    async def rest() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return rest()
