"""A line of a batch input file: what it must be, and reading it.

Pure functions of one line's bytes: any bytes either are a request or a located problem. `validation` applies them to a
whole file as it streams by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from batchery.wire import strict_json

MIB = 1024 * 1024

MAX_FILE_BYTES = 200 * MIB
MAX_LINE_BYTES = 10 * MIB
MAX_REQUESTS = 50_000
MAX_CUSTOM_ID = 64
MAX_PROBLEMS = 1_000
MAX_MODEL = 256
MAX_MODELS = 1_000

URLS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/moderations",
    "/v1/rerank",
    "/v1/score",
)

BOM = b"\xef\xbb\xbf"


class Limits(msgspec.Struct, frozen=True):
    """What one input file may be.

    Attributes:
        file_bytes: the whole file, in bytes.
        line_bytes: one line without its line break, in bytes.
        requests: the number of requests.
    """

    file_bytes: int = MAX_FILE_BYTES
    line_bytes: int = MAX_LINE_BYTES
    requests: int = MAX_REQUESTS


class Problem(msgspec.Struct, frozen=True, omit_defaults=False):
    """Something wrong with an input file.

    Attributes:
        code: one of the validation codes of the wire contract.
        message: names the line, what is wrong and what would be accepted.
        param: the field, such as `custom_id` or `body.model`.
        line: the physical line, from 1; None where the whole file is meant.
        custom_id: the line's own, where it could be read.
    """

    code: str
    message: str
    param: str | None = None
    line: int | None = None
    custom_id: str | None = None


class Request(msgspec.Struct, frozen=True):
    """A good line: what is to be sent, and under which name the answer is wanted."""

    custom_id: str
    url: str
    model: str


class RawRequest(msgspec.Struct, frozen=True):
    """A line that was found good before, read again to be sent: the body stays the bytes of the file."""

    custom_id: str
    url: str
    body: msgspec.Raw


read_request: Callable[[bytes | memoryview], RawRequest] = msgspec.json.Decoder(RawRequest).decode
"""Read a validated line again, without building its body."""


def parse_line(line: bytes, number: int, limits: Limits) -> Request | Problem:
    """One line of an input file, without its line break.

    Args:
        line: the bytes; not blank, no BOM.
        number: the physical line, from 1, for the problem's text.
        limits: only `line_bytes` is looked at here.
    """
    if len(line) > limits.line_bytes:
        return line_too_large(number, limits)
    try:
        value = strict_json.loads(line)
    except strict_json.NotUtf8 as error:
        return Problem("invalid_utf8", f"Line {number} is {error} of the line. Save the file as UTF-8.", line=number)
    except strict_json.NotJson as error:
        return Problem(
            "invalid_json_line",
            f"Line {number} is not valid JSON: {error}. Each line must be one JSON object.",
            line=number,
        )
    if type(value) is not dict:
        return Problem(
            "invalid_json_line",
            f"Line {number} is JSON but not an object. Each line must be one JSON object with custom_id, method, url "
            "and body.",
            line=number,
        )
    return _check_fields(value, number)


def line_too_large(number: int, limits: Limits) -> Problem:
    """The problem of a line over the limit, whose content is not looked at."""
    return Problem(
        "line_too_large",
        f"Line {number} is longer than {limits.line_bytes} bytes, the most one request may have.",
        line=number,
    )


def _check_fields(value: dict[str, Any], number: int) -> Request | Problem:
    custom_id = value.get("custom_id")
    known = custom_id if type(custom_id) is str and 1 <= len(custom_id) <= MAX_CUSTOM_ID else None

    def problem(code: str, param: str, text: str) -> Problem:
        return Problem(code, f"Line {number}: {text}", param, number, known)

    for field in ("custom_id", "method", "url", "body"):
        if field not in value:
            return problem(
                "missing_required_parameter",
                field,
                f"the field {field!r} is missing. A line needs custom_id, method, url and body.",
            )
    if known is None:
        return problem(
            "invalid_custom_id",
            "custom_id",
            f"custom_id must be a string of 1 to {MAX_CUSTOM_ID} characters; {_describe_custom_id(custom_id)}.",
        )
    method, url, body = value["method"], value["url"], value["body"]
    if method != "POST":
        return problem("invalid_method", "method", f"method must be 'POST', not {strict_json.describe(method)}.")
    if type(url) is not str or url not in URLS:
        return problem(
            "invalid_url", "url", f"url {strict_json.describe(url)} is not supported; use one of: {', '.join(URLS)}."
        )
    if type(body) is not dict:
        return problem(
            "missing_required_parameter",
            "body",
            f"body must be a JSON object with a model, not {strict_json.kind(body)}.",
        )
    model = body.get("model")
    if type(model) is not str or not model:
        found = (
            "it is missing" if "model" not in body else f"it is {strict_json.describe(model)}"
        )  # an empty string, or no string
        return problem(
            "missing_required_parameter", "body.model", f"body.model must be a string that names a model; {found}."
        )
    if len(model) > MAX_MODEL:
        return problem("missing_required_parameter", "body.model", f"body.model is longer than {MAX_MODEL} characters.")
    if "\0" in model:  # no database keeps it
        return problem("missing_required_parameter", "body.model", "body.model must not contain U+0000.")
    if body.get("stream") is True:
        return problem(
            "streaming_unsupported",
            "body.stream",
            "body.stream is true, but a batch returns whole answers. Leave stream out or set it to false.",
        )
    return Request(known, url, model)


def _describe_custom_id(value: Any) -> str:
    if type(value) is not str:
        return f"this one is {strict_json.kind(value)}"
    return f"this one has {len(value)}"
