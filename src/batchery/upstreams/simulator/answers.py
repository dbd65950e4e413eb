"""The bodies of answers: OpenAI's objects, filled with text and vectors that follow from the prompt alone.

Pure: the same request gives the same answer, so a test that holds a request's body can say which answer belongs to it
(`expected_text`, `expected_vectors`). Every text says that it is simulated; none must ever pass for a model's.
"""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Mapping
from hashlib import shake_128
from typing import Any

import msgspec

from batchery.upstreams.simulator.behaviour import Behaviour
from batchery.upstreams.simulator.outcomes import Dice
from batchery.upstreams.simulator.requests import (
    Endpoint,
    Request,
    input_fingerprints,
    prompt_fingerprint,
    token_limit,
)
from batchery.wire.errors import ErrorBody, ErrorEnvelope

OWNER = "batchery-simulator"

_SYLLABLES = ("ba", "ko", "mi", "ter", "lu", "sen", "do", "ri", "van", "pel", "na", "os", "tri", "fe", "gu", "zal")
_WORDS = [first + second for first in _SYLLABLES for second in _SYLLABLES]
_HEADER_TOKENS = 3
_SEPARATORS = "line\u2028paragraph\u2029next\u0085"

_encode = msgspec.json.Encoder().encode


class _PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class _CompletionDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: _PromptDetails = _PromptDetails()
    completion_tokens_details: _CompletionDetails = _CompletionDetails()


class _Message(msgspec.Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class _ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: _Message
    finish_reason: str
    logprobs: None = None


class _TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: str
    logprobs: None = None


class _Completion(msgspec.Struct, frozen=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[_ChatChoice] | list[_TextChoice]
    usage: _Usage
    system_fingerprint: str = OWNER


class _OutputText(msgspec.Struct, frozen=True):
    text: str
    type: str = "output_text"
    annotations: tuple[()] = ()


class _OutputMessage(msgspec.Struct, frozen=True):
    id: str
    status: str
    content: list[_OutputText]
    type: str = "message"
    role: str = "assistant"


class _ResponseUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: _PromptDetails = _PromptDetails()
    output_tokens_details: _CompletionDetails = _CompletionDetails()


class _Incomplete(msgspec.Struct, frozen=True):
    reason: str = "max_output_tokens"


class _Response(msgspec.Struct, frozen=True):
    id: str
    created_at: int
    model: str
    status: str
    output: list[_OutputMessage]
    usage: _ResponseUsage
    incomplete_details: _Incomplete | None
    object: str = "response"
    error: None = None
    instructions: None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    temperature: float = 1.0
    tool_choice: str = "auto"
    tools: tuple[()] = ()
    top_p: float = 1.0


class _Embedding(msgspec.Struct, frozen=True):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class _EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class _Embeddings(msgspec.Struct, frozen=True):
    model: str
    data: list[_Embedding]
    usage: _EmbeddingUsage
    object: str = "list"


class _Model(msgspec.Struct, frozen=True):
    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = OWNER


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model]
    object: str = "list"


def fingerprint(body: Mapping[str, Any]) -> str:
    """The 16 hexadecimal digits by which answers name the prompt of a request body.

    Raises:
        ValueError: the body has no prompt.
    """
    return f"{prompt_fingerprint(body):016x}"


def expected_text(body: Mapping[str, Any], behaviour: Behaviour | None = None) -> str:
    """The text of every choice in the answer to a chat, completions or responses request.

    Args:
        body: the request's body.
        behaviour: of the simulator that answers; only `tokens`, `seed` and `line_separator` matter. None: the defaults.

    Raises:
        ValueError: the body has no prompt.
    """
    behaviour = behaviour or Behaviour()
    number = prompt_fingerprint(body)
    tokens, _ = allowed(Dice(behaviour).tokens(number), token_limit(body))
    return answer_text(number, tokens, behaviour.line_separator)


def expected_vectors(body: Mapping[str, Any], behaviour: Behaviour | None = None) -> list[list[float]]:
    """The vectors in the answer to an embeddings request, one for each input, in order.

    Args:
        body: the request's body.
        behaviour: of the simulator that answers; only `dimensions` matters. None: the defaults.
    """
    dimensions = body.get("dimensions") or (behaviour or Behaviour()).dimensions
    return [list(_vector(number, dimensions)) for number in input_fingerprints(body["input"])]


def allowed(tokens: int, limit: int | None) -> tuple[int, bool]:
    """The tokens that an answer has under a request's limit, and whether the limit cut it."""
    return (tokens, False) if limit is None or tokens <= limit else (limit, True)


def answer_text(number: int, tokens: int, line_separator: bool) -> str:
    """The answer to the prompt with the fingerprint `number`.

    A token is a word. The header, which names the fingerprint, counts as three and is whole even where there are fewer.
    """
    start = number % len(_WORDS)
    count = max(0, tokens - _HEADER_TOKENS)
    words = (_WORDS * ((start + count) // len(_WORDS) + 1))[start : start + count]
    separators = _SEPARATORS + " " if line_separator else ""
    return f"simulated answer {number:016x}: {separators}{' '.join(words)}"


def answer_body(
    request: Request, tokens: int, attempt: int, created: int, behaviour: Behaviour, *, cached: int = 0
) -> tuple[bytes, int]:
    """The JSON body of a whole answer, and the completion tokens that it bills.

    Args:
        tokens: drawn for the prompt; the request's own limit is applied here.
        attempt: of this prompt, from 1; part of the answer's id.
        created: Unix seconds.
        cached: prompt tokens that were in the prefix cache.
    """
    tokens, cut = allowed(tokens, request.limit)
    name = f"sim-{request.fingerprint:016x}-{attempt}"
    answer: msgspec.Struct
    if request.endpoint is Endpoint.EMBEDDINGS:
        answer, billed = _embeddings(request, behaviour.dimensions), 0
    else:
        text = answer_text(request.fingerprint, tokens, behaviour.line_separator)
        billed = tokens * request.choices
        make = _response if request.endpoint is Endpoint.RESPONSES else _completion
        details = _PromptDetails(cached)
        answer = make(request, text, details, name=name, billed=billed, cut=cut, created=created)
    body = _encode(answer)
    return (msgspec.json.format(body, indent=2), billed) if behaviour.line_separator else (body, billed)


def _completion(
    request: Request, text: str, details: _PromptDetails, *, name: str, billed: int, cut: bool, created: int
) -> _Completion:
    reason = "length" if cut else "stop"
    usage = _Usage(request.prompt_tokens, billed, request.prompt_tokens + billed, details)
    if request.endpoint is Endpoint.CHAT:
        message = _Message(text)
        chat = [_ChatChoice(index, message, reason) for index in range(request.choices)]
        return _Completion("chatcmpl-" + name, "chat.completion", created, request.model, chat, usage)
    texts = [_TextChoice(index, text, reason) for index in range(request.choices)]
    return _Completion("cmpl-" + name, "text_completion", created, request.model, texts, usage)


def _response(
    request: Request, text: str, details: _PromptDetails, *, name: str, billed: int, cut: bool, created: int
) -> _Response:
    status = "incomplete" if cut else "completed"
    return _Response(
        "resp_" + name,
        created,
        request.model,
        status,
        [_OutputMessage("msg_" + name, status, [_OutputText(text)])],
        _ResponseUsage(request.prompt_tokens, billed, request.prompt_tokens + billed, details),
        _Incomplete() if cut else None,
    )


def _embeddings(request: Request, default_dimensions: int) -> _Embeddings:
    vectors = (_vector(number, request.dimensions or default_dimensions) for number in request.inputs)
    data = [
        _Embedding(index, base64.b64encode(vector.tobytes()).decode() if request.base64 else list(vector))
        for index, vector in enumerate(vectors)
    ]
    return _Embeddings(request.model, data, _EmbeddingUsage(request.prompt_tokens, request.prompt_tokens))


def _vector(number: int, dimensions: int) -> array[float]:
    """A vector of length 1 and single precision (what base64 carries), drawn from the input's fingerprint."""
    noise = array("h", shake_128(number.to_bytes(8)).digest(2 * dimensions))
    length = math.sqrt(sum(value * value for value in noise)) or 1.0
    return array("f", [value / length for value in noise])


def models_body(models: tuple[str, ...]) -> bytes:
    """The list of models; a simulator that serves any names one, so that a client which asks has something to use."""
    return _encode(_Models([_Model(name) for name in models or ("simulated",)]))


_ERRORS: dict[int, tuple[str, str | None, str]] = {
    400: ("invalid_request_error", "invalid_value", "The request is refused"),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided"),
    403: ("permission_error", "permission_denied", "The key may not do this"),
    404: ("invalid_request_error", "model_not_found", "The model does not exist"),
    408: ("timeout_error", "request_timeout", "The request took too long"),
    409: ("conflict_error", "conflict", "The resource is busy"),
    413: ("invalid_request_error", "request_too_large", "The request is too large"),
    422: ("invalid_request_error", "unprocessable_entity", "The request cannot be processed"),
    429: ("rate_limit_error", "rate_limit_exceeded", "Rate limit reached"),
    500: ("server_error", "internal_error", "The server had an error"),
    502: ("server_error", "bad_gateway", "The server behind this one gave no answer"),
    503: ("server_error", "service_unavailable", "The server is overloaded or not ready"),
    504: ("server_error", "gateway_timeout", "The server behind this one took too long"),
}


def fault_body(status: int) -> bytes:
    """The body of a simulated error of this status (400-599), with the type and code that are natural to it."""
    default = ("server_error", None, "Error") if status >= 500 else ("invalid_request_error", None, "Error")
    kind, code, message = _ERRORS.get(status, default)
    return error_body(f"{message} (simulated).", kind, code=code)


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """An error body in OpenAI's shape."""
    return _encode(ErrorEnvelope(ErrorBody(message, kind, param, code)))


def html_body(status: int, phrase: str) -> bytes:
    """A page such as a proxy puts in the place of an answer."""
    title = f"{status} {phrase}"
    return (
        f"<!DOCTYPE html>\n<html><head><title>{title}</title></head>\n"
        f"<body><h1>{title}</h1><hr><p>batchery-simulator (simulated)</p></body></html>\n"
    ).encode()
