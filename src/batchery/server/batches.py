"""The routes of batches: create, list, get, cancel."""

from __future__ import annotations

from typing import Any

from litestar import get, post
from litestar.params import FromPath

from batchery.engine import lifecycle
from batchery.server import body
from batchery.server.context import AnyRequest, Context, context_of, owner_of
from batchery.server.files import no_such_file
from batchery.server.parameters import parameters_of
from batchery.server.render import batch_object, batch_page
from batchery.store import batches, files
from batchery.store.batches import BatchRow
from batchery.store.blobs import new_key, write_whole
from batchery.store.files import FileRow
from batchery.store.ids import new_id
from batchery.wire import ids
from batchery.wire.errors import BadRequest, NotFound
from batchery.wire.lines import Problem
from batchery.wire.objects import BatchError, BatchList, BatchObject, CreateBatch, parse_create_batch
from batchery.wire.results import Failure, failure_line
from batchery.wire.windows import require_window

MAX_BODY = 1024 * 1024
MAX_PAGE = 100
DEFAULT_PAGE = 20


@post("/batches", status_code=200)
async def create_batch(request: AnyRequest) -> BatchObject:
    """Create a batch over an uploaded file."""
    context, owner = context_of(request), owner_of(request)
    wanted = parse_create_batch(await body.read_whole(request, MAX_BODY))
    window = require_window(wanted.completion_window, context.windows)
    async with context.database.read() as connection:
        key = ids.parse("file", wanted.input_file_id)
        file = await files.get(connection, key) if key is not None else None
    if file is None or file.owner != owner:
        raise no_such_file(wanted.input_file_id, "input_file_id")
    if file.purpose != "batch":
        raise BadRequest(
            f"input_file_id names a file with purpose {file.purpose!r}; a batch needs one that was uploaded "
            "with purpose 'batch'.",
            param="input_file_id",
            code="invalid_value",
        )
    if file.status == "error":
        return batch_object(await _create_failed(context, file, wanted, window))
    row = await _create_good(context, file, wanted, window)
    context.wake()
    return batch_object(row)


def _columns(file: FileRow, wanted: CreateBatch, window: int, now: int) -> dict[str, Any]:
    """What a new batch has in any case."""
    expiry = wanted.output_expires_after
    return {
        "id": new_id(),
        "owner": file.owner,
        "endpoint": wanted.endpoint,
        "input_file": file.id,
        "window": wanted.completion_window,
        "output_file": new_id(),
        "output_expires_after": None if expiry is None else expiry.seconds,
        "created_at": now,
        "expires_at": now + window,
        "metadata": batches.encode_metadata(wanted.metadata or {}),
    }


def _output_file(columns: dict[str, Any]) -> dict[str, Any]:
    """The output file of a new batch: no content yet, and for a failed batch for ever."""
    return files.growing_file(
        id=columns["output_file"],
        owner=columns["owner"],
        purpose="batch_output",
        batch=columns["id"],
        created_at=columns["created_at"],
    )


async def _insert(
    context: Context, file: FileRow, columns: dict[str, Any], produced: list[dict[str, Any]], param: str
) -> BatchRow:
    """Add a batch and its files, unless the input file was deleted meanwhile."""
    async with context.database.write() as connection:
        if not await files.lock(connection, file.id):
            raise no_such_file(ids.show("file", file.id), param)
        await batches.insert(connection, **columns)
        for values in produced:
            await files.insert(connection, **values)
        row = await batches.get(connection, columns["id"])
    assert row is not None
    return row


async def _create_good(context: Context, file: FileRow, wanted: CreateBatch, window: int) -> BatchRow:
    models = files.decode_models(file.models) if file.models is not None else ()
    columns = _columns(file, wanted, window, context.now()) | {
        "status": "validating",
        "model": models[0] if len(models) == 1 else None,
        "total": file.requests,
        "has_log": True,
    }
    return await _insert(context, file, columns, [_output_file(columns)], "input_file_id")


async def _create_failed(context: Context, file: FileRow, wanted: CreateBatch, window: int) -> BatchRow:
    """A batch over a file with bad lines has failed from the start, and says why for each of them."""
    problems = files.decode_problems(file.problems).data if file.problems is not None else ()
    now = context.now()
    columns = _columns(file, wanted, window, now) | {
        "status": "failed",
        "failed_at": now,
        "error_file": new_id(),
        "errors": batches.encode_errors([_batch_error(problem) for problem in problems]),
        "total": 0,
        "has_log": False,
    }
    expiry = columns["output_expires_after"]
    expires = {"expires_at": None if expiry is None else now + expiry}
    blob_key = new_key("error", columns["error_file"])
    lines = [_error_line(columns["id"], problem) for problem in problems]
    blob = await write_whole(context.blobs, blob_key, lines)
    error_file = files.growing_file(
        id=columns["error_file"], owner=file.owner, purpose="batch_error", batch=columns["id"], created_at=now
    ) | {"blob_key": blob_key, "bytes": blob.size, "lines": len(lines), "sha256": blob.sha256}
    try:
        return await _insert(
            context, file, columns, [_output_file(columns) | expires, error_file | expires], "input_file_id"
        )
    except NotFound:
        await context.blobs.delete([blob_key])
        raise


def _batch_error(problem: Problem) -> BatchError:
    return BatchError(code=problem.code, message=problem.message, param=problem.param, line=problem.line)


def _error_line(batch: str, problem: Problem) -> bytes:
    return failure_line(
        ids.request_id(batch, problem.line or 0),
        problem.custom_id,
        Failure(problem.code, problem.message),
        line=problem.line,
    )


@get("/batches")
async def list_batches(request: AnyRequest) -> BatchList:
    """List the batches, newest first."""
    parameters = parameters_of(request)
    limit = parameters.whole("limit", 1, MAX_PAGE) or DEFAULT_PAGE
    after = parameters.text("after")
    owner = owner_of(request)
    async with context_of(request).database.read() as connection:
        seq = None
        if after is not None:
            key = ids.parse("batch", after)
            row = await batches.get(connection, key) if key is not None else None
            if row is None or row.owner != owner:
                raise BadRequest(
                    f"after must be the id of one of your batches, not {after[:100]!r}.",
                    param="after",
                    code="not_found",
                )
            seq = row.seq
        rows = await batches.page(connection, owner, limit=limit + 1, after=seq)
    return batch_page(rows, limit)


def _no_such_batch(id: str) -> NotFound:
    return NotFound(f"No batch found with id '{id[:100]}'.", param="id")


def _key(id: str) -> str:
    key = ids.parse("batch", id)
    if key is None:
        raise _no_such_batch(id)
    return key


@get("/batches/{id:str}")
async def get_batch(request: AnyRequest, id: FromPath[str]) -> BatchObject:
    """Get a batch."""
    async with context_of(request).database.read() as connection:
        row = await batches.get(connection, _key(id))
    if row is None or row.owner != owner_of(request):
        raise _no_such_batch(id)
    return batch_object(row)


@post("/batches/{id:str}/cancel", status_code=200)
async def cancel_batch(request: AnyRequest, id: FromPath[str]) -> BatchObject:
    """Cancel a batch; what has finished stays."""
    context, owner, key = context_of(request), owner_of(request), _key(id)
    async with context.database.write() as connection:
        row = await batches.get(connection, key, lock=True)
        if row is None or row.owner != owner:
            raise _no_such_batch(id)
        changes = lifecycle.cancelled_by_caller(row.status, now=context.now())
        if changes is not None:
            await batches.change(connection, key, expect=row.status, changes=changes)
            row = await batches.get(connection, key)
            assert row is not None
    if changes is not None:
        context.wake()
    return batch_object(row)
