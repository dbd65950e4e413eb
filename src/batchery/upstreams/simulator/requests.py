"""Reading a request: which prompt it carries, what it allows its answer to be, and whether it is one at all.

Pure. A prompt is known by its fingerprint: the first 64 bits of the BLAKE2b hash of its canonical JSON (compact, keys
sorted, no escapes beyond the necessary), so that neither the white space and key order of a body nor its other fields
change it. It must never keep a prompt longer than it takes to hash it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from hashlib import blake2b
from typing import Any

import msgspec

from batchery.upstreams.simulator.behaviour import MAX_DIMENSIONS
from batchery.wire.errors import BadRequest

MAX_CHOICES = 128
MAX_INPUTS = 2048

PROMPT_FIELDS = ("messages", "input", "prompt")
LIMIT_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


class Endpoint(Enum):
    """An inference endpoint; its value is the field that holds the prompt."""

    CHAT = ("chat.completion", "messages")
    COMPLETIONS = ("text_completion", "prompt")
    EMBEDDINGS = ("list", "input")
    RESPONSES = ("response", "input")

    @property
    def prompt_field(self) -> str:
        """The field of the request that holds its prompt."""
        return self.value[1]


class Request(msgspec.Struct, frozen=True):
    """What an answer depends on.

    Args:
        endpoint: where it was sent.
        model: as the request names it.
        fingerprint: of its prompt.
        prompt_tokens: an estimate, one for four bytes of the canonical prompt.
        limit: most completion tokens the request allows; None: as many as there are.
        choices: answers it asks for.
        inputs: fingerprints of the texts to embed, in order.
        dimensions: numbers in an embedding, where the request says.
        base64: whether embeddings are wanted as base64.
    """

    endpoint: Endpoint
    model: str
    fingerprint: int
    prompt_tokens: int
    limit: int | None = None
    choices: int = 1
    inputs: tuple[int, ...] = ()
    dimensions: int | None = None
    base64: bool = False


class _Body(msgspec.Struct):
    model: str | None = None
    messages: Any = None
    prompt: Any = None
    input: Any = None
    stream: bool | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    dimensions: int | None = None
    encoding_format: str | None = None


_decode = msgspec.json.Decoder(_Body).decode
_encode = msgspec.json.Encoder(order="deterministic").encode


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest())


def prompt_fingerprint(body: Mapping[str, Any]) -> int:
    """The fingerprint of a request body's prompt: the first of `messages`, `input` and `prompt` that it has.

    Raises:
        ValueError: the body has none of them.
    """
    for field in PROMPT_FIELDS:
        if body.get(field) is not None:
            return _hash(_encode(body[field]))
    raise ValueError("the body has no prompt: none of messages, input and prompt")


def input_fingerprints(prompt: str | list[Any]) -> tuple[int, ...]:
    """The fingerprint of each text in the `input` of an embeddings request, in order."""
    return tuple(_hash(_encode(text)) for text in _texts(prompt))


def token_limit(body: Mapping[str, Any]) -> int | None:
    """The most completion tokens that a request body allows; None where it does not say."""
    return next((body[field] for field in LIMIT_FIELDS if body.get(field) is not None), None)


def read_request(data: bytes | bytearray, endpoint: Endpoint) -> tuple[Request, bytes]:
    """The request in a body, and the canonical text of its prompt.

    Raises:
        BadRequest: it is not one, or not one that the simulator can answer; the message says why.
    """
    try:
        body = _decode(data)
        canonical = _encode(_first(body, PROMPT_FIELDS))
    except msgspec.ValidationError as error:
        param = re.search(r"\$\.(\w+)", str(error))
        raise BadRequest(f"{error}.", param=param[1] if param else None, code="invalid_type") from None
    except (ValueError, RecursionError) as error:
        # DecodeError and UnicodeDecodeError are ValueErrors; deep nesting ends in a RecursionError.
        raise BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    _check(body, endpoint)
    fingerprint = _hash(canonical)
    prompt_tokens = len(canonical) // 4 + 1
    model = body.model or ""
    if endpoint is Endpoint.EMBEDDINGS:
        inputs = input_fingerprints(body.input)
        return Request(
            endpoint,
            model,
            fingerprint,
            prompt_tokens,
            inputs=inputs,
            dimensions=body.dimensions,
            base64=body.encoding_format == "base64",
        ), canonical
    choices = 1 if endpoint is Endpoint.RESPONSES else body.n or 1
    if endpoint is Endpoint.COMPLETIONS:
        choices *= len(_texts(body.prompt))
        if choices > MAX_CHOICES:
            raise BadRequest(f"More than {MAX_CHOICES} choices in one answer.", param="prompt", code="invalid_value")
    return Request(endpoint, model, fingerprint, prompt_tokens, _first(body, LIMIT_FIELDS), choices), canonical


def _first(body: _Body, fields: tuple[str, ...]) -> Any:
    """The first of these fields that is not null."""
    for field in fields:
        value = getattr(body, field)
        if value is not None:
            return value
    return None


def _texts(prompt: Any) -> list[Any]:
    """The single prompts in what may be a text, texts, the tokens of one text, or those of several."""
    return prompt if isinstance(prompt, list) and isinstance(prompt[0], str | list) else [prompt]


def _check(body: _Body, endpoint: Endpoint) -> None:
    if not body.model:
        raise _missing("model")
    field = endpoint.prompt_field
    prompt = getattr(body, field)
    if prompt is None:
        raise _missing(field)
    accepted = (list,) if endpoint is Endpoint.CHAT else (str, list)
    if not isinstance(prompt, accepted) or prompt == []:
        kind = "a list" if endpoint is Endpoint.CHAT else "a text or a list"
        raise BadRequest(f"{field!r} must be {kind} that is not empty.", param=field, code="invalid_type")
    if body.stream:
        raise BadRequest(
            "The simulator does not stream: leave 'stream' out, or send false.",
            param="stream",
            code="streaming_unsupported",
        )
    _check_range("n", body.n, 1, MAX_CHOICES)
    for name in LIMIT_FIELDS:
        _check_range(name, getattr(body, name), 1, None)
    if endpoint is Endpoint.EMBEDDINGS:
        if len(_texts(prompt)) > MAX_INPUTS:
            raise BadRequest(f"'input' may hold at most {MAX_INPUTS} texts.", param="input", code="invalid_value")
        _check_range("dimensions", body.dimensions, 1, MAX_DIMENSIONS)
        if body.encoding_format not in (None, "float", "base64"):
            raise BadRequest(
                "'encoding_format' must be 'float' or 'base64'.", param="encoding_format", code="invalid_value"
            )


def _check_range(name: str, number: int | None, low: int, high: int | None) -> None:
    if number is not None and (number < low or (high is not None and number > high)):
        bounds = f"{low} or more" if high is None else f"between {low} and {high}"
        raise BadRequest(f"{name!r} must be {bounds}.", param=name, code="invalid_value")


def _missing(field: str) -> BadRequest:
    return BadRequest(f"Missing required parameter: {field!r}.", param=field, code="missing_required_parameter")
