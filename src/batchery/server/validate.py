"""`POST /batches/validate`: what would become of a batch, without making it. Nothing is created or changed, and no byte
of the file is read: what is told was counted when it was uploaded.
"""

from __future__ import annotations

import math

from litestar import post

from batchery.server import body
from batchery.server.context import AnyRequest, caller_of, context_of
from batchery.server.create_batch import MAX_BODY, batch_error, input_file
from batchery.server.forecast import MIN_RATE, SILENT
from batchery.store import estimates, files, workers
from batchery.store.files import FileProblems
from batchery.wire import ids
from batchery.wire.bodies import parse_validate_batch
from batchery.wire.estimates import estimate_groups, total_of
from batchery.wire.objects import BatchErrors, BatchValidation, Load, ValidationCounts
from batchery.wire.windows import require_window


@post("/batches/validate", status_code=200)
async def validate_batch(request: AnyRequest) -> BatchValidation:
    """Say what would become of a batch over an uploaded file: what is wrong with the file, what it would take in tokens
    and money, and when it would be done. Nothing is created.
    """
    context, caller = context_of(request), caller_of(request)
    wanted = parse_validate_batch(await body.read_whole(request, MAX_BODY))
    window = wanted.completion_window or context.windows[0]
    seconds = require_window(window, context.windows)
    now = context.now()
    async with context.database.read() as connection:
        file = await input_file(connection, wanted.input_file_id, caller.owner, now)
        history = await estimates.output_tokens(connection, caller.owner)
        queued = await estimates.queued_requests(connection, now + seconds)
        rate = await workers.total_rate(connection, context.clock() - SILENT) or await estimates.recent_rate(connection)
    valid = file.status == "processed"
    runnable = valid or (wanted.on_invalid_line == "skip" and file.index_key is not None)
    problems = files.decode_problems(file.problems) if file.problems is not None else FileProblems(0, ())
    groups = None
    if file.groups is not None:
        groups = estimate_groups(files.decode_groups(file.groups), history, context.prices, window)
    total = None if groups is None else total_of(groups)
    load = Load(queued_requests=queued, requests_per_second=rate if rate is not None and rate >= MIN_RATE else None)
    return BatchValidation(
        input_file_id=ids.show("file", file.id),
        valid=valid,
        runnable=runnable,
        errors=BatchErrors(data=[batch_error(problem) for problem in problems.data]) if problems.data else None,
        error_count=problems.count,
        request_counts=ValidationCounts(total=file.requests),
        groups=groups,
        estimated_input_tokens=None if total is None else total.input_tokens,
        estimated_output_tokens=None if total is None else total.output_tokens,
        estimate_basis=None if total is None else total.basis,
        estimated_cost=None if total is None else total.cost,
        completion_window=window,
        expires_at_if_created_now=now + seconds,
        load=load,
        estimated_completion_at=_done_at(load, file.requests, now) if runnable else None,
    )


def _done_at(load: Load, requests: int, now: int) -> int | None:
    """When so many requests more would be done, if all that is due before them is done first."""
    if load.requests_per_second is None:
        return None
    return now + math.ceil((load.queued_requests + requests) / load.requests_per_second)
