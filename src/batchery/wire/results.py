"""Result lines: what a finished request becomes in the output or the error file.

An upstream's body goes into its line as the bytes it came in, whenever they are safe inside JSONL. They are changed
only to remove raw line breaks and the characters U+2028, U+2029 and U+0085, on which official clients split lines; such
a body still parses to the same value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from batchery.wire import strict_json

Kind = Literal["output", "error"]


class Usage(msgspec.Struct):
    """Tokens, summed over requests; the shape of a batch's `usage` without its nesting."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def add(self, other: Usage) -> None:
        """Add another's tokens to these."""
        self.input_tokens += other.input_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens
        self.reasoning_tokens += other.reasoning_tokens

    def add_all(self, others: Sequence[Usage]) -> None:
        """Add the tokens of many to these."""
        self.input_tokens += sum([other.input_tokens for other in others])
        self.cached_tokens += sum([other.cached_tokens for other in others])
        self.output_tokens += sum([other.output_tokens for other in others])
        self.reasoning_tokens += sum([other.reasoning_tokens for other in others])


class InvalidBody(ValueError):
    """A 2xx answer that is not JSON; the message says why."""


class Failure(msgspec.Struct, frozen=True):
    """Why a request has no good answer: the `error` of its line.

    Attributes:
        code: the upstream's own, or one of ours: `upstream_timeout`, `upstream_unreachable`,
            `invalid_upstream_response`, `batch_expired`, `batch_cancelled`.
        message: for people.
    """

    code: str
    message: str


_Tokens = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]


class _InputDetails(msgspec.Struct, gc=False):
    cached_tokens: _Tokens = 0


class _OutputDetails(msgspec.Struct, gc=False):
    reasoning_tokens: _Tokens = 0


class _PlainUsage(msgspec.Struct, gc=False):
    prompt_tokens: _Tokens | None = None
    input_tokens: _Tokens | None = None
    completion_tokens: _Tokens | None = None
    output_tokens: _Tokens | None = None
    prompt_tokens_details: _InputDetails | None = None
    input_tokens_details: _InputDetails | None = None
    completion_tokens_details: _OutputDetails | None = None
    output_tokens_details: _OutputDetails | None = None

    def read(self) -> Usage:
        into = self.input_tokens if self.prompt_tokens is None else self.prompt_tokens
        out = self.output_tokens if self.completion_tokens is None else self.completion_tokens
        from_cache = self.prompt_tokens_details or self.input_tokens_details
        thought = self.completion_tokens_details or self.output_tokens_details
        return Usage(
            into or 0,
            0 if from_cache is None else from_cache.cached_tokens,
            out or 0,
            0 if thought is None else thought.reasoning_tokens,
        )


class _PlainAnswer(msgspec.Struct, gc=False):
    """What nearly all answers are; others are read as `_AnyUsage`, to the same effect."""

    usage: _PlainUsage


class _AnyUsage(msgspec.Struct):
    usage: Any = None


_decode_plain = msgspec.json.Decoder(_PlainAnswer).decode
_decode_usage = msgspec.json.Decoder(_AnyUsage).decode
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode

BOM = b"\xef\xbb\xbf"
_WHITESPACE = b" \t\r\n"
_MAX_TOKENS = 1 << 40  # more is nonsense, and a sum over millions of answers must fit 64 bits
MAX_CODE = 128
MAX_MESSAGE = 4_096

# As bytes: U+2028 and U+2029 are E2 80 A8 and E2 80 A9, U+0085 is C2 85. UTF-8 never has these inside another
# character, and JSON has raw \n and \r only between tokens, so replacing bytes cannot touch anything else.
_UNSAFE = re.compile(rb"[\n\r]|\xe2\x80[\xa8\xa9]|\xc2\x85")
_SAFE = {
    b"\n": b" ",
    b"\r": b" ",
    b"\xe2\x80\xa8": rb"\u2028",
    b"\xe2\x80\xa9": rb"\u2029",
    b"\xc2\x85": rb"\u0085",
}


def one_line(json: bytes) -> bytes:
    """Valid JSON as one line that no client splits; the same object when it already is one."""
    if b"\n" not in json and b"\r" not in json and (json.isascii() or not (b"\xe2\x80" in json or b"\xc2\x85" in json)):
        return json
    return _UNSAFE.sub(lambda match: _SAFE[match[0]], json)


def _bare(body: bytes) -> bytes:
    """A body without a leading BOM (some servers send one, most clients skip it) and the whitespace around it."""
    return body.removeprefix(BOM).strip(_WHITESPACE)


def check_answer(body: bytes) -> tuple[bytes, Usage | None]:
    """A 2xx body, fit for its line, and the tokens that it reports.

    What is JSON by the grammar passes, whatever is in it: the answer is paid for.

    Raises:
        InvalidBody: it is not strict UTF-8 JSON, or nested deeper than the interpreter can follow (hundreds of levels).
    """
    body = _bare(body)
    try:
        if not body.isascii():
            body.decode()
    except UnicodeDecodeError as error:
        raise InvalidBody(f"the answer is not UTF-8 at byte {error.start}") from None
    try:
        plain = _decode_plain(body).usage.read()
        if plain.input_tokens or plain.output_tokens:
            return one_line(body), plain
    except (msgspec.MsgspecError, RecursionError):
        pass
    try:
        usage = _decode_usage(body).usage
    except (msgspec.MsgspecError, RecursionError):
        usage = _odd_usage(body)
    return one_line(body), _read_usage(usage)


def _odd_usage(body: bytes) -> Any:
    """The usage of JSON that is more than an object of ordinary values: an array or scalar (rerankers answer with
    arrays), half a surrogate pair somewhere, a number beyond a float inside `usage`."""
    try:
        strict_json.check_grammar(body)
    except strict_json.NotJson as error:
        raise InvalidBody(f"the answer is not JSON: {error}") from None
    try:
        return _decode_usage(strict_json.mask_surrogates(body)).usage
    except msgspec.MsgspecError:
        return None


def _read_usage(usage: Any) -> Usage | None:
    if type(usage) is not dict:
        return None
    read = Usage(
        input_tokens=_count(usage, "prompt_tokens", "input_tokens"),
        output_tokens=_count(usage, "completion_tokens", "output_tokens"),
        cached_tokens=_count(_details(usage, "prompt_tokens_details", "input_tokens_details"), "cached_tokens"),
        reasoning_tokens=_count(
            _details(usage, "completion_tokens_details", "output_tokens_details"), "reasoning_tokens"
        ),
    )
    if not read.input_tokens and not read.output_tokens:  # some rerankers give nothing but the total
        read.input_tokens = _count(usage, "total_tokens")
    return read if read != Usage() else None


def _details(usage: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        details = usage.get(name)
        if type(details) is dict:
            return details
    return {}


def _count(counts: dict[str, Any], *names: str) -> int:
    for name in names:
        count = counts.get(name)
        if type(count) is int and 0 <= count < _MAX_TOKENS:
            return count
    return 0


def success_line(id: str, custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """A line of the output file, with its line break.

    Args:
        id: the request's own, `batch_req_...`.
        custom_id: as the input had it.
        status: the upstream's HTTP status, 2xx.
        request_id: the upstream's, or one made for it.
        body: from `check_answer`.
    """
    name = id.encode()
    return b'{"id":"%b","custom_id":%b,"response":{"status_code":%d,"request_id":%b,"body":%b},"error":null}\n' % (
        name,
        _text(custom_id),
        status,
        b'"%b"' % name if request_id is id else _text(request_id),
        body,
    )


def failure_line(
    id: str,
    custom_id: str | None,
    failure: Failure,
    *,
    status: int | None = None,
    request_id: str = "",
    body: bytes = b"null",
    line: int | None = None,
) -> bytes:
    """A line of the error file, with its line break: the union of what clients look for.

    Args:
        id: the request's own.
        custom_id: as the input had it; None when it could not be read.
        failure: the cause.
        status: of the HTTP answer; None when there was none, and then `response` is null.
        request_id: of that answer.
        body: of that answer, from `error_body`.
        line: the physical input line, for a line that never was a request.
    """
    response = (
        b"null"
        if status is None
        else b'{"status_code":%d,"request_id":%b,"body":%b}' % (status, _text(request_id), body)
    )
    return b'{"id":"%b","custom_id":%b,"response":%b,"error":{"code":%b,"message":%b}%b}\n' % (
        id.encode(),
        b"null" if custom_id is None else _text(custom_id),
        response,
        _text(failure.code),
        _text(failure.message),
        b"" if line is None else b',"line":%d' % line,
    )


def reissued(line: bytes, of: tuple[str, str], to: tuple[str, str]) -> bytes:
    """A result line as the line of another request that has the same result.

    Args:
        line: from `success_line` or `failure_line`.
        of: the id and the `custom_id` that it was made with.
        to: those of the other request.
    """
    return _begin(*to) + line[len(_begin(*of)) :]


def _begin(id: str, custom_id: str) -> bytes:
    return b'{"id":"%b","custom_id":%b' % (id.encode(), _text(custom_id))


def _text(value: str) -> bytes:
    try:
        text = _encode(value)
        return text if text.isascii() else one_line(text)  # what is not for one line is escaped where it is ASCII
    except UnicodeEncodeError:  # a lone surrogate, as of a header with raw bytes
        return one_line(_encode(value.encode(errors="replace").decode()))


def error_body(body: bytes) -> bytes:
    """The body of a 4xx or 5xx, fit for its line: itself when it is JSON, else `{"raw": "..."}`."""
    bare = _bare(body)
    if not strict_json.is_json(bare):
        return one_line(_encode({"raw": body.decode(errors="replace")}))
    return one_line(bare)


def failure_of(status: int, body: bytes) -> Failure:
    """The cause that a 4xx or 5xx answer states, else one made from its status.

    Servers differ: OpenAI nests `{"error": {code, type, message}}`, vLLM has had the same keys at the top and a number
    as code, FastAPI says `detail` (a text, or a list of `{loc, msg, type}`), Google puts the answer into a list, others
    put a text under `error`. A numeric code gives way to the type, or is its digits as text. The code is cut at
    `MAX_CODE` and the message at `MAX_MESSAGE` characters; the line's body has all of it.
    """
    try:
        value = _decode(strict_json.mask_surrogates(_bare(body)))
    except (msgspec.MsgspecError, RecursionError, ValueError):
        value = None
    if type(value) is list and value:
        value = value[0]
    error = value
    if type(value) is dict and type(value.get("error")) in (dict, str) and value["error"]:
        error = value["error"]
    code = _code(error) if type(error) is dict else None
    message = _message(error, 4)
    return Failure(
        _cut(code or STATUS_CODES.get(status, f"http_{status}"), MAX_CODE),
        _cut(message or f"The upstream answered with HTTP status {status}.", MAX_MESSAGE),
    )


def _code(error: dict[str, Any]) -> str | None:
    code, kind = error.get("code"), error.get("type")
    if type(code) is str and code:
        return code
    if type(kind) is str and kind:
        return kind
    if type(code) is float and code.is_integer():
        code = int(code)
    return str(code) if type(code) in (int, float) else None


def _message(value: Any, depth: int) -> str | None:
    """The first text where servers put one, at most so many levels down."""
    if type(value) is str:
        return value
    if depth and type(value) is list and value:
        return _message(value[0], depth - 1)
    if depth and type(value) is dict:
        for name in ("message", "msg", "detail", "error"):
            found = _message(value.get(name), depth - 1)
            if found:
                return found
    return None


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


STATUS_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    402: "insufficient_quota",
    403: "permission_denied",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "request_too_large",
    415: "unsupported_media_type",
    422: "unprocessable_entity",
    429: "rate_limit_exceeded",
    500: "server_error",
    502: "bad_gateway",
    503: "service_unavailable",
    504: "gateway_timeout",
}
"""The `code` of a failure whose answer names none."""
