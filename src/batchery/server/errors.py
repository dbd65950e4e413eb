"""Every failure as one JSON answer: `{"error": {"message", "type", "param", "code"}}`.

This is the only place that turns an exception into HTTP. What the caller did wrong was said where it was understood, as
an `ApiError`; what the store could not do is 503; anything else is a defect of ours, which is logged whole and shown
to the caller as nothing but a request id.
"""

from __future__ import annotations

from typing import Any

import msgspec
import structlog
from litestar import Response
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException

from batchery.server.context import AnyRequest
from batchery.store.errors import StoreError, StoreFull
from batchery.wire.errors import (
    ApiError,
    BadRequest,
    InternalError,
    MethodNotAllowed,
    NotFound,
    TooLarge,
    Unavailable,
)

log = structlog.get_logger()

_encode = msgspec.json.Encoder().encode


class Refused(ApiError):
    """A refusal that HTTP has a status for and the API no class: 408, 414, 431.

    Args:
        status: the HTTP status, 4xx.
    """

    type = "invalid_request_error"

    def __init__(self, status: int, message: str, *, code: str) -> None:
        super().__init__(message, code=code)
        self.status = status


class CutOff(BadRequest):
    """The client went away, or broke HTTP's framing, before the end of its body. Most often nobody reads the answer."""

    default_code = "incomplete_body"

    def __init__(self) -> None:
        super().__init__("The request body ended before it was complete; nothing was stored. Send it again.")


class _WrongMethod(MethodNotAllowed):
    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message)
        self._allowed = allowed

    def headers(self) -> dict[str, str]:
        return {"Allow": self._allowed}


def understood(error: Exception) -> ApiError:
    """The answer to any exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StoreFull):
        return Unavailable(
            "The server's disk is full. Nothing was stored; try again once there is room.",
            retry_after=30,
            code="storage_full",
        )
    if isinstance(error, StoreError):
        return Unavailable(
            "The server's database or file store does not answer just now. Nothing was changed; try again.",
            code="storage_unavailable",
        )
    if isinstance(error, HTTPException):
        return _of_framework(error) or _defect()
    return _defect()


def _defect() -> ApiError:
    return InternalError("The server failed on this request. Its log has the cause, under the id in x-request-id.")


def _of_framework(error: HTTPException) -> ApiError | None:
    """What the router and the framework's parsers raise."""
    if isinstance(error, NotFoundException):
        return NotFound("There is nothing at this path.", code="unknown_path")
    if isinstance(error, MethodNotAllowedException):
        methods = (error.headers or {}).get("allow", "").split(", ")
        if "GET" in methods:
            methods.append("HEAD")
        allowed = ", ".join(sorted(filter(None, methods)))
        return _WrongMethod(f"This path does not take this method; it takes: {allowed}.", allowed)
    if error.status_code == 413:
        return TooLarge("The request body is too large.")
    if error.status_code == 400:
        return BadRequest(f"The request is malformed: {error.detail}.")
    if 400 <= error.status_code < 500:
        return Refused(error.status_code, str(error.detail), code="invalid_request")
    return None


def rendered(error: ApiError) -> tuple[int, dict[str, str], bytes]:
    """An error as status, headers and body."""
    return error.status, {"content-type": "application/json", **error.headers()}, _encode(error.envelope())


def to_response(request: AnyRequest, error: Exception) -> Response[Any]:
    """The framework's hook: answer an exception, and log it where it is ours."""
    answer = understood(error)
    if isinstance(answer, InternalError):
        log.error("request failed", request_id=request.state.request_id, path=request.url.path, exc_info=error)
    elif isinstance(error, StoreError):
        log.warning("store failed", request_id=request.state.request_id, path=request.url.path, cause=str(error))
    status, headers, body = rendered(answer)
    return Response(body, status_code=status, headers=headers, media_type="application/json")
