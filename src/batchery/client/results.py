"""What became of a request, told from its result line: well, or failed and why, and whether another try may help.

Servers differ in which of status, error and body they use; this module knows the shapes. Pure functions of one line.
"""

from __future__ import annotations

import json
import math
from enum import StrEnum
from typing import Any

import msgspec

from batchery.client.objects import Usage, read_usage

_LONGEST_MESSAGE = 160


class Cause(StrEnum):
    """How a request ended, and so what can be done about it.

    `transient`: a limit, a timeout or a fault that may have passed; another try may go well. `expired`: the window
    ended first. `cancelled`: the user did not want it any more. `permanent`: the same request will fail again.
    """

    ok = "ok"
    transient = "transient"
    expired = "expired"
    cancelled = "cancelled"
    permanent = "permanent"


_CODES = {
    "batch_expired": Cause.expired,
    "batch_cancelled": Cause.cancelled,
    "batch_canceled": Cause.cancelled,
    "batchterminated": Cause.cancelled,
    "insufficient_quota": Cause.permanent,
    "invalid_upstream_response": Cause.permanent,
    "upstream_timeout": Cause.transient,
    "upstream_unreachable": Cause.transient,
    "rate_limit_exceeded": Cause.transient,
    "rate_limit_error": Cause.transient,
    "server_error": Cause.transient,
    "internal_error": Cause.transient,
    "internal_server_error": Cause.transient,
    "service_unavailable": Cause.transient,
    "overloaded_error": Cause.transient,
    "timeout": Cause.transient,
    "networkerror": Cause.transient,
    "retriablehttpstatus": Cause.transient,
    "taskterminated": Cause.transient,
}
"""Codes that say more than the status; in lower case."""

_PASSING = frozenset({408, 409, 425, 429})


class Result(msgspec.Struct, frozen=True):
    """What a result line says.

    Attributes:
        custom_id: whose it is; None where it cannot be read.
        cause: how it ended.
        status: of HTTP; None where there was no answer.
        code, message: of the failure; empty for a success.
        usage: tokens; None where it names none.
        model: that answered; empty where it names none.
    """

    custom_id: str | None
    cause: Cause
    status: int | None = None
    code: str = ""
    message: str = ""
    usage: Usage | None = None
    model: str = ""


class Reason(msgspec.Struct, frozen=True):
    """Why some rows failed.

    Attributes:
        text: status, code and the first message seen with them.
        rows: how many.
        cause: whether another try may help.
    """

    text: str
    rows: int
    cause: Cause = Cause.permanent


class Tally(msgspec.Struct, frozen=True):
    """The rows of a job.

    Attributes:
        rows: requests in the inputs.
        ok: answered with 2xx.
        failed: answered otherwise, or tried in vain.
        not_run: never run, or without a result line.
        usage: tokens, summed over the results; None where none names any.
        reasons: why rows failed, the commonest first.
        models: tokens by the model that answered.
    """

    rows: int
    ok: int
    failed: int
    not_run: int
    usage: Usage | None
    reasons: tuple[Reason, ...]
    models: tuple[tuple[str, Usage], ...] = ()


class _Body(msgspec.Struct):
    error: Any = None
    usage: Any = None
    model: Any = None


class _Response(msgspec.Struct):
    status_code: int
    body: _Body


class _Success(msgspec.Struct):
    custom_id: str
    response: _Response
    error: None = None


_read_success = msgspec.json.Decoder(_Success).decode
_read_any = msgspec.json.Decoder().decode


def read_result(line: bytes) -> Result:
    """Read a result line, whatever it is."""
    try:
        # Nearly all lines are such, and this leaves the answer itself undecoded.
        success = _read_success(line)
        if 200 <= success.response.status_code < 300 and not success.response.body.error:
            usage = read_usage(success.response.body.usage)
            model = success.response.body.model
            return Result(
                success.custom_id,
                Cause.ok,
                success.response.status_code,
                usage=usage,
                model=model if isinstance(model, str) else "",
            )
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    record = read_record(line)
    status, code, message = judge(record)
    custom_id = record.get("custom_id")
    body = _dict(_dict(record.get("response")).get("body"))
    usage, model = read_usage(body.get("usage")), body.get("model")
    return Result(
        custom_id if isinstance(custom_id, str) else None,
        Cause.ok if code is None else classify(status, code, message),
        status,
        code or "",
        message,
        usage,
        model if isinstance(model, str) else "",
    )


def read_record(line: bytes) -> dict[str, Any]:
    """A result line as it is, decoded; where it is no JSON object, one that says so."""
    try:
        record = _read_any(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        record = _decode_leniently(line)
    if not isinstance(record, dict):
        return {"error": {"code": "unreadable_result", "message": "the server sent a line that is not a JSON object"}}
    return record


def classify(status: int | None, code: str, message: str) -> Cause:
    """The cause of a failure.

    Args:
        status: of HTTP, if there was an answer.
        code: the error's code or type.
        message: the error's; Doubleword's holds JSON, whose `type` is as good as a code.
    """
    for text in (code, _type_in(message)):
        if text.lower() in _CODES:
            return _CODES[text.lower()]
    if status is None:
        return Cause.permanent
    return Cause.transient if status in _PASSING or status >= 500 else Cause.permanent


def _type_in(message: str) -> str:
    if not message.startswith('{"type"'):
        return ""
    return message.removeprefix('{"type"').lstrip(': "').partition('"')[0]


def judge(record: dict[str, Any]) -> tuple[int | None, str | None, str]:
    """Status, code and message of a result line; the code is None if it is a success.

    A line has failed if its status is not 2xx, or it or its answer's body names an error: servers differ in which of
    the three they use.
    """
    response, body = _dict(record.get("response")), _dict(_dict(record.get("response")).get("body"))
    status = response.get("status_code")
    status = status if isinstance(status, int) and status else None
    error = record.get("error") or body.get("error")
    if status is not None and 200 <= status < 300 and not error:
        return status, None, ""
    details = _dict(error)
    inner = _dict(body.get("error"))
    code = next((v for d in (details, inner) for v in (d.get("code"), d.get("type")) if isinstance(v, str) and v), "")
    message = next((d["message"] for d in (details, inner) if isinstance(d.get("message"), str)), "")
    if not message and isinstance(error, str):
        message = error
    return status, whole_characters(code) or "error", whole_characters(" ".join(message.split())[:_LONGEST_MESSAGE])


def whole_characters(text: str) -> str:
    """A text that can be written: half of a surrogate pair, as of an emoji cut in two, becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _decode_leniently(line: bytes) -> Any:
    """A line that msgspec refuses: half of a surrogate pair and numbers beyond any float are JSON too, and some servers
    send NaN. None if it is something else. What is no number to others becomes null.
    """
    try:
        return json.loads(line, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
