"""The error tree: the JSON of each answer, and the headers that official clients act on."""

from __future__ import annotations

import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.wire.errors import (
    ApiError,
    BadRequest,
    Conflict,
    InternalError,
    MethodNotAllowed,
    NotFound,
    RangeNotSatisfiable,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)

from .json_texts import prove

any_text = st.text(st.characters())  # with lone surrogates, as a path or a query of raw bytes may have


def shown(error: ApiError) -> dict[str, object]:
    answer = json.loads(msgspec.json.encode(error.envelope()))
    assert list(answer) == ["error"]
    inner: dict[str, object] = answer["error"]
    return inner


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "headers"),
    [
        (BadRequest("m"), 400, "invalid_request_error", None, {}),
        (Unauthorized("m"), 401, "invalid_request_error", "invalid_api_key", {"WWW-Authenticate": "Bearer"}),
        (NotFound("m"), 404, "invalid_request_error", "not_found", {}),
        (MethodNotAllowed("m"), 405, "invalid_request_error", "method_not_allowed", {}),
        (Conflict("m"), 409, "invalid_request_error", "conflict", {"x-should-retry": "false"}),
        (TooLarge("m"), 413, "invalid_request_error", "request_too_large", {}),
        (
            RangeNotSatisfiable("m", size=7),
            416,
            "invalid_request_error",
            "range_not_satisfiable",
            {"Content-Range": "bytes */7"},
        ),
        (TooManyRequests("m"), 429, "rate_limit_error", "rate_limit_exceeded", {"Retry-After": "5"}),
        (InternalError("m"), 500, "server_error", "internal_error", {}),
        (Unavailable("m"), 503, "server_error", "service_unavailable", {"Retry-After": "5"}),
    ],
)
def test_each_error(error: ApiError, status: int, kind: str, code: str | None, headers: dict[str, str]) -> None:
    assert error.status == status
    assert error.headers() == headers
    assert shown(error) == {"message": "m", "type": kind, "param": error.param, "code": code}
    assert str(error) == "m"


@prove
@given(any_text, st.none() | any_text, st.none() | any_text)
def test_any_text_can_be_sent(message: str, param: str | None, code: str | None) -> None:
    """A caller's own bytes in a message must not turn a 400 into a 500."""
    inner = shown(BadRequest(message, param=param, code=code))
    assert list(inner) == ["message", "type", "param", "code"]
    for given_, sent in ((message, inner["message"]), (param, inner["param"]), (code, inner["code"])):
        assert sent == (None if given_ is None else given_.encode(errors="replace").decode())


def test_a_code_takes_the_place_of_the_default() -> None:
    assert NotFound("m", param="batch_id", code="batch_not_found").envelope().error.code == "batch_not_found"
    assert Conflict("m").envelope().error.code == "conflict"


@pytest.mark.parametrize(
    ("seconds", "sent"),
    [
        (0, "1"),
        (0.2, "1"),
        (1.2, "2"),  # up: a client that comes early is refused again
        (59.5, "60"),
        (60, "60"),
        (61, "60"),  # official clients do not wait for more
        (-5, "1"),
        (10**400, "60"),
        (math.inf, "60"),
        (-math.inf, "1"),
        (math.nan, "1"),
    ],
)
@pytest.mark.parametrize("kind", [TooManyRequests, Unavailable])
def test_retry_after_is_a_whole_number_up_to_60(
    kind: type[TooManyRequests | Unavailable], seconds: float, sent: str
) -> None:
    error = kind("m", retry_after=seconds)
    assert error.headers() == {"Retry-After": sent}
    assert str(error.retry_after) == sent


@prove
@given(st.floats() | st.integers())
def test_no_retry_after_raises(seconds: float) -> None:
    assert 1 <= int(TooManyRequests("m", retry_after=seconds).headers()["Retry-After"]) <= 60
