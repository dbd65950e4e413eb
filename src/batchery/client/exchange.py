"""One exchange with a server: send, and turn what comes back, or does not, into a value or a typed error.

It never tries twice (that is `http`'s business), never hands out an error answer as a result, and never shows a key.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
from pyreqwest.exceptions import ClientClosedError, PyreqwestError, RequestError
from pyreqwest.request import SyncRequestBuilder
from pyreqwest.response import SyncResponse

from batchery.client.errors import (
    ApiError,
    BrokenOffError,
    ClientError,
    ConnectionLostError,
    DetachedError,
    UnexpectedAnswerError,
    error_for_status,
)
from batchery.client.retry import Failure, parse_retry_after

_decode = msgspec.json.Decoder().decode


class Content:
    """The body of a file on its way.

    Attributes:
        last_line: `X-Last-Line`, lines from the start of the file to the end of this body; None on a server that does
            not number lines.
        incomplete: `X-Incomplete`: the file is still growing, or this body is only a part of it.
    """

    def __init__(self, response: SyncResponse) -> None:
        last_line = response.get_header("x-last-line")
        self.last_line = int(last_line) if last_line and last_line.isdecimal() else None
        self.incomplete = (response.get_header("x-incomplete") or "").lower() == "true"
        self._reader = response.body_reader

    def chunks(self) -> Iterator[bytes]:
        """The bytes as they arrive.

        Raises:
            BrokenOffError: the body ended too early; what came before is good.
            DetachedError: the client was closed.
        """
        try:
            while (chunk := self._reader.read_chunk()) is not None:
                yield bytes(chunk)
        except ClientClosedError:
            raise DetachedError("stopped while reading results") from None
        except RequestError as error:
            raise BrokenOffError(f"the results broke off: {_cause(error)}") from None


class TryFailedError(Exception):
    """One try failed: how, for the decision to retry, and with what, for the caller if there is none."""

    def __init__(self, failure: Failure, error: ClientError) -> None:
        super().__init__(str(error))
        self.failure = failure
        self.error = error


@contextmanager
def opened(request: SyncRequestBuilder) -> Iterator[SyncResponse]:
    """Send, and give the answer while its body is still to be read; only a success gets that far."""
    with ExitStack() as stack:
        try:
            response = stack.enter_context(request.build_streamed())
            body = b"" if response.status < 300 else bytes(response.bytes())
        except ClientClosedError:
            raise
        except RequestError as error:
            raise TryFailedError(Failure(), ConnectionLostError(_cause(error))) from None
        if response.status >= 300:
            raise _refused(response, body)
        yield response


def exchange(request: SyncRequestBuilder) -> tuple[Any, SyncResponse]:
    """Send, and read the whole answer as JSON."""
    with opened(request) as response:
        try:
            body = bytes(response.bytes())
        except ClientClosedError:
            raise
        except RequestError as error:
            raise TryFailedError(Failure(), ConnectionLostError(_cause(error))) from None
        if not body:
            return None, response
        try:
            return _decode(body), response
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise UnexpectedAnswerError(
                f"what answered does not speak the batch API: no JSON, but {_excerpt(body)!r}. Is the base URL right?"
            ) from None


def _refused(response: SyncResponse, body: bytes) -> TryFailedError:
    status = response.status
    advice = (response.get_header("x-should-retry") or "").lower()
    failure = Failure(
        status,
        retry_after(response),
        {"true": True, "false": False}.get(advice),
    )
    if status < 400:
        location = response.get_header("location") or "another address"
        text = f"the server redirects to {location}, which is not followed; is that the right base URL?"
        return TryFailedError(failure, ApiError(text, status=status))
    message, code, param = read_error(body)
    request_id = response.get_header("x-request-id")
    asked = "" if request_id is None else f", request {request_id}"
    text = f"{message or 'the server gave no reason'} (HTTP {status}{asked})"
    kind = error_for_status(status)
    return TryFailedError(failure, kind(text, status=status, code=code, request_id=request_id, param=param))


def retry_after(response: SyncResponse) -> float | None:
    """When the server wants to be asked again, in seconds from now; None where it does not say."""
    return parse_retry_after(response.get_header("retry-after"), datetime.now(UTC))


def read_error(body: bytes) -> tuple[str, str | None, str | None]:
    """The message, the code and the field (`param`) of an error answer, in any of the shapes that servers use; plain
    text is a message.
    """
    try:
        value = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _excerpt(body), None, None
    if isinstance(value, dict):
        value = value.get("error", value.get("detail", value.get("message", value)))
    if isinstance(value, dict):
        code = value.get("code") or value.get("type")
        message, param = value.get("message"), value.get("param")
        return (
            message if isinstance(message, str) else _excerpt(body),
            code if isinstance(code, str) else None,
            param if isinstance(param, str) else None,
        )
    return value if isinstance(value, str) else _excerpt(body), None, None


def _excerpt(body: bytes) -> str:
    return " ".join(body[:1000].decode("utf-8", "replace").split())[:300]


def _cause(error: PyreqwestError) -> str:
    """The innermost cause, which says more than `error sending request`."""
    details = getattr(error, "details", None)
    causes = details.get("causes") if isinstance(details, dict) else None
    return causes[-1]["message"] if causes else str(error)
