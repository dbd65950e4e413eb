"""`POST /files`: a multipart upload becomes a row and its blobs, or nothing at all."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

from batchery.server import body
from batchery.server.context import AnyRequest, Context, context_of, owner_of
from batchery.server.form import FILE, Form, boundary_of, read_form
from batchery.server.intake import Intake, TakenIn, file_too_large
from batchery.store import files
from batchery.store.errors import StoreError
from batchery.store.files import FileProblems, FileRow
from batchery.store.ids import new_id
from batchery.wire.errors import BadRequest
from batchery.wire.lines import Limits
from batchery.wire.objects import check_expires_after

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
        TooLarge: the file is over its limit; said before reading where the client announced its length.
        StoreFull, StoreUnavailable: the store failed. Whatever is raised, nothing is left.
    """
    context = context_of(request)
    boundary = boundary_of(request.headers.get("content-type", ""))
    announced = body.content_length(request)
    if announced is not None and announced > context.limits.file_bytes + OVERHEAD:
        raise file_too_large(context.limits)
    id = new_id()
    async with Intake(context.blobs, id, context.limits) as intake:
        form = await read_form(_bounded(body.chunks(request), context.limits), boundary, intake, _check_field)
        if form.filename is None:
            raise BadRequest(
                f"The form has no file; send it in a part named {FILE!r}.",
                param=FILE,
                code="missing_required_parameter",
            )
        expires_after = _expires_after(form, context)
        taken = await intake.finish()
        values = _columns(id, owner_of(request), form.filename, taken, context.now(), expires_after)
        try:
            async with context.database.write() as connection:
                await files.insert(connection, **values)
                row = await files.get(connection, id)
        except Exception:
            if await _may_exist(context, id):
                intake.keep()
            raise
        intake.keep()
    assert row is not None
    return row


async def _bounded(chunks: AsyncIterator[bytes], limits: Limits) -> AsyncIterator[bytes]:
    """The body, as long as it can still be a file within the limit."""
    left = limits.file_bytes + OVERHEAD
    async for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            raise file_too_large(limits)
        yield chunk


def _check_field(name: str, value: str) -> None:
    if name == "purpose" and value != PURPOSE:
        raise BadRequest(
            f"purpose {value[:64]!r} is not supported; use {PURPOSE!r}.", param="purpose", code="invalid_value"
        )


def _expires_after(form: Form, context: Context) -> int | None:
    """After how many seconds the file expires."""
    anchor = next((form.fields[name] for name in _ANCHOR if name in form.fields), None)
    seconds = next((form.fields[name] for name in _SECONDS if name in form.fields), None)
    if anchor is None and seconds is None:
        return context.file_expiry
    number = int(seconds) if seconds is not None and _WHOLE.fullmatch(seconds) else None
    return check_expires_after(anchor, number, "expires_after").seconds


def _columns(id: str, owner: str, filename: str, taken: TakenIn, now: int, expires_after: int | None) -> dict[str, Any]:
    report = taken.report
    return {
        "id": id,
        "owner": owner,
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
        "index_key": taken.index_key,
        "problems": None if report.ok else files.encode_problems(FileProblems(report.problem_count, report.problems)),
    }


async def _may_exist(context: Context, id: str) -> bool:
    """Whether a row whose commit failed may be there all the same, as when the answer to the commit was lost."""
    try:
        async with context.database.read() as connection:
            return await files.get(connection, id) is not None
    except StoreError:
        return True
