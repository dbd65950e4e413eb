"""`POST /batches`: a batch over an uploaded file."""

from __future__ import annotations

from typing import Any

from litestar import post
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.engine import egress, lifecycle
from batchery.server import body, idempotency, limits
from batchery.server.batches import owned_batch
from batchery.server.context import AnyRequest, Caller, Context, caller_of, context_of
from batchery.server.files import no_such_file
from batchery.server.render import batch_object
from batchery.store import batches, files, webhooks
from batchery.store import idempotency as idempotency_keys
from batchery.store.batches import BatchRow
from batchery.store.blobs import new_key, write_whole
from batchery.store.files import FileRow
from batchery.store.idempotency import Use
from batchery.store.ids import new_id
from batchery.wire import ids
from batchery.wire.bodies import CreateBatch, parse_create_batch
from batchery.wire.errors import ApiError, BadRequest
from batchery.wire.lines import Problem
from batchery.wire.objects import BatchError, BatchObject
from batchery.wire.results import Failure, failure_line
from batchery.wire.windows import require_window

MAX_BODY = 1024 * 1024


@post("/batches", status_code=200)
async def create_batch(request: AnyRequest) -> BatchObject:
    """Create a batch over an uploaded file."""
    context, caller = context_of(request), caller_of(request)
    key = idempotency.key_of(request)
    wanted = parse_create_batch(await body.read_whole(request, MAX_BODY))
    window = require_window(wanted.completion_window, context.windows)
    use = None if key is None else Use(caller.owner, "batch", key, idempotency.fingerprint(wanted))
    if use is not None:
        row = await _made_before(context, use)
        if row is not None:
            return batch_object(row, await context.forecast.of_committed(row))
    file = await context.database.look(
        lambda connection: input_file(connection, wanted.input_file_id, caller.owner, context.now())
    )
    new = _New(context, caller, file, wanted, window, use)
    row = await (new.failed() if file.status == "error" and wanted.on_invalid_line == "fail" else new.good())
    if row.status == "validating" or row.webhook_url is not None:
        context.wake()
    return batch_object(row, await context.forecast.of_committed(row))


async def _made_before(context: Context, use: Use) -> BatchRow | None:
    """What an idempotency key has made before."""
    async with context.database.read() as connection:
        made = await idempotency_keys.find(connection, use.owner, use.kind, use.key, context.now())
        return None if made is None else await owned_batch(connection, idempotency.same(made, use), use.owner)


async def input_file(connection: AsyncConnection, id: str, owner: str, now: int) -> FileRow:
    """The file that a batch is to be made over.

    Raises:
        NotFound: it does not exist, has expired, or is somebody else's.
        BadRequest: it is the result of a batch.
    """
    key = ids.parse("file", id)
    file = await files.get(connection, key) if key is not None else None
    if file is None or file.owner != owner or (file.expires_at is not None and file.expires_at <= now):
        raise no_such_file(id, "input_file_id")
    if file.purpose != "batch":
        raise BadRequest(
            f"input_file_id names a file with purpose {file.purpose!r}; a batch needs one that was uploaded "
            "with purpose 'batch'.",
            param="input_file_id",
            code="invalid_value",
        )
    return file


class _New:
    """A batch that is being made.

    Args:
        context: what to work with.
        caller: who wants it.
        file: its input.
        wanted: what was asked for.
        window: its completion window, in seconds.
        use: the idempotency key; None for none.
    """

    def __init__(
        self, context: Context, caller: Caller, file: FileRow, wanted: CreateBatch, window: int, use: Use | None
    ) -> None:
        self._context = context
        self._caller = caller
        self._file = file
        self._use = use
        now = context.now()
        expiry = wanted.output_expires_after
        url, secret = _webhook(context, caller, wanted)
        self._columns: dict[str, Any] = {
            "id": new_id(),
            "owner": caller.owner,
            "api_key": caller.key,
            "endpoint": wanted.endpoint,
            "input_file": file.id,
            "window": wanted.completion_window,
            "output_file": new_id(),
            "output_expires_after": None if expiry is None else expiry.seconds,
            "created_at": now,
            "expires_at": now + window,
            "metadata": batches.encode_metadata(wanted.metadata or {}),
            "skip_invalid": wanted.on_invalid_line == "skip",
            "deduplicate": wanted.deduplicate,
            "webhook_url": url,
            "webhook_secret": secret,
        }
        # The output file has no content yet, and for a failed batch never gets any.
        self._output = files.growing_file(
            id=self._columns["output_file"],
            owner=caller.owner,
            purpose="batch_output",
            batch=self._columns["id"],
            created_at=now,
        )

    async def good(self) -> BatchRow:
        """A batch that runs."""
        file = self._file
        if file.status == "error" and file.index_key is None:  # nothing in it can be told apart from the bad
            return await self.failed()
        models = files.decode_models(file.models) if file.models is not None else ()
        invalid = files.decode_problems(file.problems).count if file.problems is not None else 0
        self._columns |= {
            "status": "validating",
            "model": models[0] if len(models) == 1 else None,
            "total": file.requests + invalid,
            "invalid": invalid,
            "has_log": True,
        }
        return await self._insert([self._output])

    async def failed(self) -> BatchRow:
        """A batch over a file with bad lines, which has failed from the start, and says why for each of them."""
        context, file, columns = self._context, self._file, self._columns
        problems = files.decode_problems(file.problems).data if file.problems is not None else ()
        now, expiry = columns["created_at"], columns["output_expires_after"]
        columns |= {
            "status": "failed",
            "failed_at": now,
            "error_file": new_id(),
            "errors": batches.encode_errors([batch_error(problem) for problem in problems]),
            "total": 0,
            "has_log": False,
        }
        expires = {"expires_at": None if expiry is None else now + expiry}
        blob_key = new_key("error", columns["error_file"])
        lines = [_error_line(columns["id"], problem) for problem in problems]
        blob = await write_whole(context.blobs, blob_key, lines)
        error_file = files.growing_file(
            id=columns["error_file"], owner=file.owner, purpose="batch_error", batch=columns["id"], created_at=now
        ) | {"blob_key": blob_key, "bytes": blob.size, "lines": len(lines), "sha256": blob.sha256}
        try:
            row = await self._insert([self._output | expires, error_file | expires])
        except ApiError:
            await context.blobs.delete([blob_key])
            raise
        if row.id != columns["id"]:
            await context.blobs.delete([blob_key])
        return row

    async def _insert(self, produced: list[dict[str, Any]]) -> BatchRow:
        """Add the batch and its files, unless its idempotency key has made one meanwhile.

        Raises:
            NotFound: the input file was deleted meanwhile.
            TooManyRequests: the caller's key may not have one more.
        """
        return await self._context.database.write_at_once(lambda connection: self._add(connection, produced))

    async def _add(self, connection: AsyncConnection, produced: list[dict[str, Any]]) -> BatchRow:
        columns = self._columns
        if not await files.lock(connection, self._file.id):
            raise no_such_file(ids.show("file", self._file.id), "input_file_id")
        if self._use is not None:
            made = await idempotency_keys.claim(connection, self._use, columns["id"], columns["created_at"])
            if made is not None:
                return await owned_batch(connection, idempotency.same(made, self._use), self._caller.owner)
        if columns["status"] == "validating":
            await limits.check_new_batch(connection, self._caller, columns["total"])
        row = await batches.insert(connection, **columns)
        for values in produced:
            await files.insert(connection, **values)
        if lifecycle.is_terminal(columns["status"]):
            await webhooks.tell(connection, columns["id"], columns["created_at"])
        return row


def _webhook(context: Context, caller: Caller, wanted: CreateBatch) -> tuple[str | None, str | None]:
    """Where the batch's end is told and what that is signed with: what the body says, else what the key says.

    Raises:
        BadRequest: nothing is sent to that host, or there would be nothing to sign with.
    """
    target = wanted.webhook
    if target is None:
        return caller.webhook_url, caller.webhook_secret
    try:
        egress.check(egress.parse_target(target.url), context.webhook_networks)
    except egress.RefusedError as error:
        raise BadRequest(
            f"webhook.url cannot be used: {error}. Use a host that the public internet can reach, or ask the server's "
            "operator to allow its network with --webhook-networks.",
            param="webhook.url",
            code="invalid_value",
        ) from None
    secret = target.secret or caller.webhook_secret
    if secret is None:
        raise BadRequest(
            "webhook.secret is required: every webhook is signed, and the API key has no secret of its own. Send "
            "whsec_ and the base64 of 24 to 64 random bytes.",
            param="webhook.secret",
            code="missing_required_parameter",
        )
    return target.url, secret


def batch_error(problem: Problem) -> BatchError:
    """A problem of a file as the API shows it."""
    return BatchError(code=problem.code, message=problem.message, param=problem.param, line=problem.line)


def _error_line(batch: str, problem: Problem) -> bytes:
    return failure_line(
        ids.request_id(batch, problem.line or 0),
        problem.custom_id,
        Failure(problem.code, problem.message),
        line=problem.line,
    )
