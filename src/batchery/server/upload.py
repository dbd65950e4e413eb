"""`POST /files`: a multipart upload becomes a row and its blobs, or nothing at all."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.server import body, idempotency, limits
from batchery.server.context import AnyRequest, Caller, Context, caller_of, context_of
from batchery.server.form import FILE, Form, boundary_of, read_form
from batchery.server.intake import Intake, TakenIn, file_too_large
from batchery.store import files
from batchery.store import idempotency as idempotency_keys
from batchery.store.errors import StoreError
from batchery.store.files import FileProblems, FileRow
from batchery.store.idempotency import Use
from batchery.store.ids import new_id
from batchery.wire.bodies import check_expires_after
from batchery.wire.errors import ApiError, BadRequest

OVERHEAD = 64 * 1024
"""What a form may have besides the file: fields, part headers and boundaries, in bytes."""

PURPOSE = "batch"

_ANCHOR = ("expires_after[anchor]", "expires_after.anchor")
_SECONDS = ("expires_after[seconds]", "expires_after.seconds")
_WHOLE = re.compile(r"[0-9]{1,10}", re.ASCII)


async def store_upload(request: AnyRequest) -> FileRow:
    """Take in the file that a request carries.

    Raises:
        BadRequest: the form or one of its fields is wrong, or was cut off.
        Conflict: the idempotency key was used for another file.
        TooLarge: the file is over its limit; said before reading where the client announced its length.
        TooManyRequests: the caller's key has no room for it, or too many upload just now.
        StoreFull, StoreUnavailable: the store failed. Whatever is raised, nothing is left.
    """
    context, caller = context_of(request), caller_of(request)
    key = idempotency.key_of(request)
    boundary = boundary_of(request.headers.get("content-type", ""))
    announced = body.content_length(request)
    if announced is not None and announced > context.limits.file_bytes + OVERHEAD:
        raise file_too_large(context.limits)
    most, error = await _most(context, caller, key)
    if announced is not None and announced > most:
        raise error
    id = new_id()
    async with Intake(context.blobs, id, context.limits) as intake:
        with body.upload(request) as chunks:
            form = await read_form(bounded(chunks, most, error), boundary, intake, _check_field)
        if form.filename is None:
            raise BadRequest(
                f"The form has no file; send it in a part named {FILE!r}.",
                param=FILE,
                code="missing_required_parameter",
            )
        wanted = _expires_after(form)
        expires_after = context.file_expiry if wanted is None else wanted
        taken = await intake.finish()
        columns = columns_of(id, caller, form.filename, taken, context.now(), expires_after)
        use = None
        if key is not None:
            content = idempotency.fingerprint(form.filename, PURPOSE, wanted, taken.sha256)
            use = Use(caller.owner, "file", key, content)
        return await _insert(context, caller, intake, columns, use)


async def _most(context: Context, caller: Caller, key: str | None) -> tuple[int, ApiError]:
    """How long the body may be, and the error for a longer one."""
    if caller.max_upload_bytes is not None:
        async with context.database.read() as connection:
            room = await limits.upload_room(connection, caller)
            # Who repeats an upload that came through needs no room for it.
            repeats = key is not None and await idempotency_keys.find(
                connection, caller.owner, "file", key, context.now()
            )
        if room is not None and room < context.limits.file_bytes and not repeats:
            return room + OVERHEAD, limits.no_upload_room(caller, room)
    return context.limits.file_bytes + OVERHEAD, file_too_large(context.limits)


async def _insert(
    context: Context, caller: Caller, intake: Intake, columns: dict[str, Any], use: Use | None
) -> FileRow:
    """Give a file its row, unless its idempotency key has made one that is still there."""
    doubt = kept_in_doubt(context, intake.keep, lambda connection: files.get(connection, columns["id"]))
    async with doubt, context.database.write() as connection:
        if use is not None:
            made = await _made_before(connection, use, columns["id"], columns["created_at"])
            if made is not None:
                return made
        await limits.check_new_upload(connection, caller, columns["bytes"])
        await files.insert(connection, **columns)
        row = await files.get(connection, columns["id"])
    intake.keep()
    assert row is not None
    return row


async def _made_before(connection: AsyncConnection, use: Use, id: str, now: int) -> FileRow | None:
    """The file that an idempotency key has made; None when it makes this new one.

    Raises:
        Conflict: it has made a file of other content.
    """
    while (made := await idempotency_keys.claim(connection, use, id, now)) is not None:
        row = await files.get(connection, made.object_id, at=now)
        if row is not None:
            idempotency.same(made, use)
            return row
        await idempotency_keys.forget(connection, made.object_id)
    return None


@asynccontextmanager
async def kept_in_doubt(
    context: Context, keep: Callable[[], None], find: Callable[[AsyncConnection], Awaitable[object | None]]
) -> AsyncIterator[None]:
    """Around the transaction that gives blobs their row: when it fails, and the row may be there all the same (as when
    the answer to the commit was lost), the blobs are kept.

    Args:
        keep: keeps them.
        find: gives the row, if it is there.
    """
    try:
        yield
    except Exception:
        if await _may_exist(context, find):
            keep()
        raise
    except BaseException:  # cancelled, perhaps inside the commit; if there is no row, the sweep of orphans finds them
        keep()
        raise


async def _may_exist(context: Context, find: Callable[[AsyncConnection], Awaitable[object | None]]) -> bool:
    try:
        async with context.database.read() as connection:
            return await find(connection) is not None
    except StoreError:
        return True


async def bounded(chunks: AsyncIterator[bytes], most: int, error: ApiError) -> AsyncIterator[bytes]:
    """A request's body, of which more than so many bytes are an error."""
    left = most
    async for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            raise error
        yield chunk


def _check_field(name: str, value: str) -> None:
    if name == "purpose" and value != PURPOSE:
        raise BadRequest(
            f"purpose {value[:64]!r} is not supported; use {PURPOSE!r}.", param="purpose", code="invalid_value"
        )


def _expires_after(form: Form) -> int | None:
    """After how many seconds the file is to expire; None when the form does not say."""
    anchor = next((form.fields[name] for name in _ANCHOR if name in form.fields), None)
    seconds = next((form.fields[name] for name in _SECONDS if name in form.fields), None)
    if anchor is None and seconds is None:
        return None
    number = int(seconds) if seconds is not None and _WHOLE.fullmatch(seconds) else None
    return check_expires_after(anchor, number, "expires_after").seconds


def columns_of(
    id: str, caller: Caller, filename: str, taken: TakenIn, now: int, expires_after: int | None
) -> dict[str, Any]:
    """The row of a file that was taken in.

    Args:
        expires_after: seconds; None for never.
    """
    report = taken.report
    return {
        "id": id,
        "owner": caller.owner,
        "api_key": caller.key,
        "purpose": PURPOSE,
        "filename": filename,
        "status": "processed" if report.ok else "error",
        "status_details": report.summary(),
        "bytes": taken.size,
        "created_at": now,
        "expires_at": None if expires_after is None else now + expires_after,
        "blob_key": taken.key,
        "sha256": taken.sha256,
        "lines": taken.lines,
        "requests": len(report.index),
        "models": files.encode_models(report.index.models),
        "groups": files.encode_groups(report.groups),
        "index_key": taken.index_key,
        "problems": None if report.ok else files.encode_problems(FileProblems(report.problem_count, report.problems)),
    }
