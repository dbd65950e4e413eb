"""What a gathered request is answered: out of its result line, or, without one, out of how its batch ended. Pure."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from batchery.client.errors import ApiError, ClientError, DetachedError, SettingsError
from batchery.client.job import Outcome
from batchery.client.results import read_record, whole_characters


class Answer(msgspec.Struct, frozen=True):
    """What a request was answered.

    Attributes:
        status: of HTTP.
        body: JSON, as the model's server or the batch server wrote it.
        request_id: of that server; None where it gave none.
    """

    status: int
    body: bytes
    request_id: str | None = None


class NoAnswerError(ClientError):
    """A request has no answer: its time ended, or it got lost on the way.

    Args:
        code: for programs, such as `batch_expired` or `upstream_timeout`.
        message: for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code

    @property
    def is_timeout(self) -> bool:
        """Whether it was time that ran out."""
        return self.code == "batch_expired" or "timeout" in self.code


class _Response(msgspec.Struct):
    status_code: int | None = None
    body: msgspec.Raw = msgspec.Raw(b"null")
    request_id: Any = None


class _Line(msgspec.Struct):
    response: _Response | None = None
    error: Any = None


def answer_of(line: bytes) -> Answer | NoAnswerError:
    """What a result line says to whoever asked, whatever it is."""
    try:
        found = msgspec.json.decode(line, type=_Line, strict=False)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        found = _read_leniently(line)
    response = found.response
    if response is not None and response.status_code and bytes(response.body) != b"null":
        request_id = response.request_id if isinstance(response.request_id, str) else None
        return Answer(response.status_code, bytes(response.body), request_id)
    details = found.error if isinstance(found.error, dict) else {}
    code = whole_characters(str(details.get("code") or "error"))
    message = whole_characters(str(details.get("message") or "the request failed"))
    if response is not None and response.status_code and response.status_code >= 400:
        return refusal(response.status_code, message, code)
    return NoAnswerError(code, message)


def _read_leniently(line: bytes) -> _Line:
    """A line that msgspec refuses, such as one with half of an emoji, or with fields of other types."""
    record = read_record(line)
    response = record.get("response")
    if not isinstance(response, dict):
        return _Line(None, record.get("error"))
    status, body = response.get("status_code"), msgspec.Raw(json.dumps(response.get("body")).encode())
    return _Line(
        _Response(status if isinstance(status, int) else None, body, response.get("request_id")), record.get("error")
    )


def without_result(outcome: Outcome | None, error: Exception | None) -> Answer | NoAnswerError:
    """What is said to a request whose batch ended without a result for it."""
    if isinstance(error, ApiError):
        return refusal(error.status, str(error), error.code)
    if isinstance(error, SettingsError):  # such as a window that the server does not offer: asking again is no help
        return refusal(400, str(error), "invalid_settings")
    if isinstance(error, DetachedError):
        return NoAnswerError("closed", "the client was closed")
    if error is not None:
        code = "connection_lost" if isinstance(error, ClientError) else "client_error"
        return NoAnswerError(code, str(error) or type(error).__name__)
    problems = [problem for batch in outcome.batches for problem in batch.problems] if outcome else []
    if problems:
        return refusal(400, "; ".join(problems[:3]), "batch_failed")
    statuses = ", ".join(dict.fromkeys(batch.status for batch in outcome.batches)) if outcome else "ended"
    code = "batch_expired" if "expired" in statuses else "no_result"
    return NoAnswerError(code, f"the batch is {statuses}, and has no result for this request")


def refusal(status: int, message: str, code: str | None, param: str | None = None) -> Answer:
    """An answer in the form of the API's errors."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return Answer(status, msgspec.json.encode({"error": error}))
