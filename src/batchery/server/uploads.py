"""The routes of uploads in parts: create, look, add a part, cancel. `complete_upload` has the last one.

Parts may come at the same time and in any order; which of them make the file, and in which order, is said at the end.
A client that lost the answer to a part sends it again, so an upload may hold more bytes than its file will have.
"""

from __future__ import annotations

import asyncio
import hashlib
from types import TracebackType

import structlog
from litestar import get, post
from litestar.params import FromPath
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.server import body, limits
from batchery.server.context import AnyRequest, Caller, Context, caller_of, context_of, owner_of
from batchery.server.form import Form, boundary_of, clean_filename, read_form
from batchery.server.intake import file_too_large
from batchery.server.render import part_object, upload_object, upload_with_parts
from batchery.server.upload import OVERHEAD, bounded, kept_in_doubt
from batchery.store import files, uploads
from batchery.store.blobs import BlobStore, Writer, new_key
from batchery.store.errors import StoreError
from batchery.store.files import FileRow
from batchery.store.ids import new_id
from batchery.store.uploads import Held, PartRow, UploadRow
from batchery.wire import ids
from batchery.wire.errors import ApiError, BadRequest, Conflict, NotFound, TooLarge
from batchery.wire.uploads import (
    MAX_PARTS,
    PartObject,
    UploadObject,
    UploadWithParts,
    check_md5,
    parse_create_upload,
)

LIFETIME = 3_600
"""Seconds from an upload's creation in which it can be completed, as OpenAI has it."""

MAX_PART = 64 * 1024 * 1024
"""Bytes of one part, as OpenAI has it."""

MOST = 2
"""How many times the announced size the parts of an upload may have together, so that lost ones can be sent again."""

MAX_BODY = 64 * 1024
PIECE = 1024 * 1024
DATA = "data"
MD5 = "md5"
CONTENT_MD5 = "Content-MD5"

log = structlog.get_logger()


async def owned_upload(connection: AsyncConnection, id: str, owner: str, *, lock: bool = False) -> UploadRow:
    """The upload with this id (as it came in a path).

    Raises:
        NotFound: it does not exist, or is somebody else's.
    """
    key = ids.parse("upload", id)
    row = await uploads.get(connection, key, lock=lock) if key is not None else None
    if row is None or row.owner != owner:
        raise NotFound(f"No such Upload object: {id[:100]}", param="id")
    return row


def check_pending(row: UploadRow, now: int) -> None:
    """Make sure that an upload has not ended.

    Raises:
        Conflict: it has.
    """
    status = row.status_at(now)
    if status != "pending":
        raise Conflict(
            f"The upload {ids.show('upload', row.id)} is {status}"
            + (f": it could be completed for {LIFETIME} seconds" if status == "expired" else "")
            + ". Create a new one to upload another file.",
            param="id",
            code=f"upload_{status}",
        )


async def file_of(connection: AsyncConnection, row: UploadRow, now: int) -> FileRow | None:
    """The file that an upload has become; None when there is none, or it was deleted or has expired."""
    return None if row.file_id is None else await files.get(connection, row.file_id, at=now)


@post("/uploads", status_code=200)
async def create_upload(request: AnyRequest) -> UploadObject:
    """Begin to upload a file in parts."""
    context, caller = context_of(request), caller_of(request)
    wanted = parse_create_upload(await body.read_whole(request, MAX_BODY))
    if wanted.bytes > context.limits.file_bytes:
        raise file_too_large(context.limits)
    id, now = new_id(), context.now()
    async with context.database.write() as connection:
        await limits.check_new_upload(connection, caller, wanted.bytes)
        await uploads.insert(
            connection,
            id=id,
            owner=caller.owner,
            api_key=caller.key,
            filename=clean_filename(wanted.filename),
            mime_type=wanted.mime_type,
            bytes=wanted.bytes,
            file_expires_after=context.file_expiry if wanted.expires_after is None else wanted.expires_after.seconds,
            status="pending",
            created_at=now,
            expires_at=now + LIFETIME,
        )
        row = await owned_upload(connection, id, caller.owner)
    return upload_object(row, None, now)


@get("/uploads/{id:str}")
async def get_upload(request: AnyRequest, id: FromPath[str]) -> UploadWithParts:
    """Get an upload's state and, while it is pending, the parts that it has."""
    context = context_of(request)
    now = context.now()
    async with context.database.read() as connection:
        row = await owned_upload(connection, id, owner_of(request))
        parts = await uploads.parts(connection, row.id) if row.status_at(now) == "pending" else []
        return upload_with_parts(row, await file_of(connection, row, now), parts, now)


@post("/uploads/{id:str}/cancel", status_code=200)
async def cancel_upload(request: AnyRequest, id: FromPath[str]) -> UploadObject:
    """Give up an upload that has not ended; its parts are dropped."""
    context, owner = context_of(request), owner_of(request)
    async with context.database.write() as connection:
        now = context.now()
        row = await owned_upload(connection, id, owner, lock=True)
        check_pending(row, now)
        await uploads.end(connection, row.id, "cancelled", context.clock())
        return upload_object(await owned_upload(connection, id, owner), None, now)


@post("/uploads/{id:str}/parts", status_code=200)
async def add_part(request: AnyRequest, id: FromPath[str]) -> PartObject:
    """Add a part to an upload."""
    context, caller = context_of(request), caller_of(request)
    boundary = boundary_of(request.headers.get("content-type", ""))
    announced = body.content_length(request)
    if announced is not None and announced > MAX_PART + OVERHEAD:
        raise _part_too_large()
    expected = [check_md5(value, CONTENT_MD5) for value in request.headers.getall(CONTENT_MD5, [])]
    async with context.database.read() as connection:  # refused before its bytes are taken, where that is certain
        upload = await owned_upload(connection, id, caller.owner)
        check_pending(upload, context.now())
        _check_room(upload, await uploads.held(connection, upload.id), max(0, (announced or 0) - OVERHEAD))
        room = await limits.upload_room(connection, caller)
    most: int = MAX_PART + OVERHEAD
    error: ApiError = _part_too_large()
    if room is not None and room < MAX_PART:
        most, error = room + OVERHEAD, limits.no_upload_room(caller, room)
        if announced is not None and announced > most:
            raise error
    async with _Incoming(context.blobs, new_id()) as incoming:
        with body.upload(request) as chunks:
            form = await read_form(bounded(chunks, most, error), boundary, incoming, lambda *_: None, file=DATA)
        if form.filename is None:
            raise BadRequest(
                f"The form has no part; send its bytes under the name {DATA!r}.",
                param=DATA,
                code="missing_required_parameter",
            )
        await incoming.finish(expected, form)
        return part_object(await _insert(context, caller, incoming, id))


async def _insert(context: Context, caller: Caller, incoming: _Incoming, upload: str) -> PartRow:
    """Give a part its row, if its upload still takes it."""
    doubt = kept_in_doubt(context, incoming.keep, lambda connection: uploads.get_part(connection, incoming.id))
    async with doubt, context.database.write() as connection:
        now = context.now()
        row = await owned_upload(connection, upload, caller.owner, lock=True)
        check_pending(row, now)
        _check_room(row, await uploads.held(connection, row.id), incoming.size)
        await limits.check_new_upload(connection, caller, incoming.size)
        await uploads.insert_part(
            connection,
            id=incoming.id,
            upload_id=row.id,
            bytes=incoming.size,
            md5=incoming.md5,
            blob_key=incoming.key,
            created_at=now,
        )
        part = await uploads.get_part(connection, incoming.id)
    incoming.keep()
    assert part is not None
    return part


def _check_room(upload: UploadRow, held: Held, more: int) -> None:
    """Whether an upload may have one more part of so many bytes."""
    if held.parts >= MAX_PARTS:
        raise BadRequest(
            f"The upload has {held.parts} parts, the most that one may have. Complete it with those, or create a new "
            "one with larger parts.",
            code="too_many_parts",
        )
    if held.bytes + more > MOST * upload.bytes:
        raise TooLarge(
            f"The upload was created for {upload.bytes} bytes, has parts of {held.bytes} bytes and would have "
            f"{held.bytes + more}; it may have {MOST} times what it was created for, so that lost parts can be sent "
            "again. The part was not stored. GET /uploads/{id} lists the parts that are there.",
            param=DATA,
            code="upload_too_large",
        )


def _part_too_large() -> TooLarge:
    return TooLarge(
        f"A part may have at most {MAX_PART} bytes. This one was not stored; split it into smaller parts.", param=DATA
    )


class _Incoming:
    """A part on its way into the store; use it as an async context manager, and call `keep` once it has its row.

    Args:
        blobs: where it goes.
        id: the part's, bare.
    """

    def __init__(self, blobs: BlobStore, id: str) -> None:
        self.id = id
        self.key = new_key("parts", id)
        self.size = 0
        self._blobs = blobs
        self._hash = hashlib.md5(usedforsecurity=False)
        self._arriving = bytearray()
        self._writer: Writer | None = None
        self._stored = False
        self._kept = False

    async def __aenter__(self) -> _Incoming:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            await self._writer.abort()
        if self._stored and not self._kept:
            try:
                await self._blobs.delete([self.key])
            except StoreError as failure:  # the sweep of orphans finds it
                log.warning("the blob of a refused part is left", key=self.key, cause=str(failure))

    @property
    def md5(self) -> str:
        """Of what has arrived, as hex."""
        return self._hash.hexdigest()

    def keep(self) -> None:
        """The part has its row, or may have: leave its blob where it is."""
        self._kept = True

    async def add(self, data: bytes) -> None:
        """The next bytes of the part.

        Raises:
            TooLarge: the part is over its limit.
            StoreFull, StoreUnavailable: writing failed.
        """
        self.size += len(data)
        if self.size > MAX_PART:
            raise _part_too_large()
        self._arriving += data
        if len(self._arriving) >= PIECE:
            await self._flush()

    async def _flush(self) -> None:
        piece = bytes(self._arriving)
        self._arriving.clear()
        if self._writer is None:
            self._writer = self._blobs.write(self.key)
        await asyncio.to_thread(self._hash.update, piece)
        await self._writer.write(piece)

    async def finish(self, expected: list[str], form: Form) -> None:
        """The part is complete: check it and make it durable.

        Args:
            expected: MD5s that it must have, as hex.
            form: what came with it, which may have one more.

        Raises:
            BadRequest: it has another.
            StoreFull, StoreUnavailable: writing failed.
        """
        await self._flush()
        assert self._writer is not None
        if MD5 in form.fields:
            expected = [*expected, check_md5(form.fields[MD5], MD5)]
        for md5 in expected:
            if md5 != self.md5:
                raise BadRequest(
                    f"The part should have the MD5 {md5}, but what arrived, {self.size} bytes, has {self.md5}. It was "
                    "not stored; send it again.",
                    param=DATA,
                    code="checksum_mismatch",
                )
        await self._writer.close()
        self._writer = None
        self._stored = True
