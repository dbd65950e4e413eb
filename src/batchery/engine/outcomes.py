"""Outcomes: what becomes of a request that has come to its end, as a result with its line.

Pure; whether a request has come to its end is for `retry` to say.
"""

from __future__ import annotations

from batchery.engine.work import Result, Work
from batchery.upstreams.base import Answer, Fault
from batchery.wire import ids
from batchery.wire.results import (
    Failure,
    InvalidBody,
    check_answer,
    error_body,
    failure_line,
    failure_of,
    success_line,
)

FAULT_CODES = {
    "timeout": "upstream_timeout",
    "unreachable": "upstream_unreachable",
    "broken": "upstream_unreachable",
}


def success(work: Work, answer: Answer) -> Result:
    """The result of a 2xx answer: an output line, or, when it is not JSON, a final failure."""
    id = ids.request_id(work.shard.batch_id, work.request)
    request_id = answer.request_id or id
    try:
        body, usage = check_answer(answer.body)
    except InvalidBody as error:
        line = failure_line(
            id,
            work.custom_id,
            Failure("invalid_upstream_response", f"The upstream answered {answer.status}, but {error}."),
            status=answer.status,
            request_id=request_id,
            body=error_body(answer.body),
        )
        return Result(work, "error", line, None)
    return Result(work, "output", success_line(id, work.custom_id, answer.status, request_id, body), usage)


def failure(work: Work, outcome: Answer | Fault) -> Result:
    """The result of an outcome that is not tried again."""
    id = ids.request_id(work.shard.batch_id, work.request)
    if isinstance(outcome, Fault):
        cause = Failure(FAULT_CODES[outcome.kind], outcome.message)
        return Result(work, "error", failure_line(id, work.custom_id, cause), None)
    line = failure_line(
        id,
        work.custom_id,
        failure_of(outcome.status, outcome.body),
        status=outcome.status,
        request_id=outcome.request_id or id,
        body=error_body(outcome.body),
    )
    return Result(work, "error", line, None)


def unsent_failure(work: Work, reason: Failure) -> Result:
    """The result of a request that was not sent, because it could only fail; its batch shows the reason too."""
    id = ids.request_id(work.shard.batch_id, work.request)
    return Result(work, "error", failure_line(id, work.custom_id, reason), None, reason)
