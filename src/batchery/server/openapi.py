"""The OpenAPI document.

The framework describes the routes and the objects that they answer with. What it cannot know, because the handlers
read bodies and queries themselves, is added here: form and JSON bodies, query parameters, error answers, headers.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import msgspec
from litestar import Litestar, MediaType, Response, Router, get
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.spec import License, Server

from batchery import __version__
from batchery.server.events import EVENTS
from batchery.server.prefer import LONGEST_WAIT
from batchery.server.routes import API, HEALTH
from batchery.store.schema import ENDED, LIVE
from batchery.wire.bodies import MAX_EXPIRY, MIN_EXPIRY, CreateBatch, ValidateBatch
from batchery.wire.errors import ErrorEnvelope
from batchery.wire.uploads import CompleteUpload, CreateUpload

Json = dict[str, Any]

TITLE = "batchery"
DESCRIPTION = (
    "Batch inference over HTTP, compatible with OpenAI's Files and Batch APIs and Doubleword's extensions. "
    'Every path is also served under `/ai`. Every failure is `{"error": {message, type, param, code}}`, and every '
    "answer carries `x-request-id`."
)

ERRORS = {
    400: "What was sent is wrong; the message says what would be accepted.",
    401: "No API key, or none that is valid; which of the two, the answer does not tell.",
    404: "It does not exist, or belongs to somebody else.",
    408: "The body came too slowly, or no longer at all.",
    409: "The object's state forbids it; do not retry.",
    412: "The file is another version than the one that `If-Match` names.",
    413: "The body is over its limit; nothing was stored.",
    416: "The range lies behind the end of the file.",
    429: "A limit of the API key, or the server's capacity, is used up; come back after `Retry-After` seconds.",
    500: "A defect of the server.",
    503: "The database or the file store is out of reach or full; come back after `Retry-After` seconds.",
}


def _parameter(name: str, schema: Json, description: str) -> Json:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": description}


_AFTER = _parameter("after", {"type": "string"}, "The id of the last object of the page before.")

_IDEMPOTENCY_KEY: Json = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "description": "For 24 hours the same key and content give the same object; other content is a 409.",
}

_CONTENT_MD5: Json = {
    "name": "Content-MD5",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "The MD5 of the bytes in `data`, as base64 or hex; a part that has another is refused.",
}

_PREFER: Json = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "examples": ["wait=30"]},
    "description": "`wait=N`: hold the answer until the batch has changed, for N seconds at most and never more than "
    f"{LONGEST_WAIT}. Whatever else is in it is passed over.",
}

_LAST_EVENT_ID: Json = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "The id of the last event that was received: the stream goes on behind it.",
}

_MOMENT: Json = {"type": "string", "examples": ["1735689600", "2025-01-01T00:00:00Z"]}


def _list_parameter(name: str, items: Json, description: str) -> Json:
    """One whose values are separated by commas."""
    return _parameter(name, {"type": "array", "items": items}, description) | {"style": "form", "explode": False}


_SLICE: list[Json] = [
    _parameter("offset", {"type": "integer", "minimum": 0, "default": 0}, "Start after so many lines."),
    _parameter("skip", {"type": "integer", "minimum": 0}, "The same as `offset`; give one of them."),
    _parameter("limit", {"type": "integer", "minimum": 1}, "At most so many lines; everything there is by default."),
]

_CONDITIONS: list[Json] = [
    {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": description}
    for name, description in (
        ("Range", "One range of bytes, as `bytes=0-999`; ignored while the file grows and with `offset` and the like."),
        ("If-Range", "The `ETag` that the range is of; the whole file comes if it has another."),
        ("If-None-Match", "Entity tags; the answer is 304 if the file's is among them."),
        ("If-Match", "Entity tags; the answer is 412 unless the file's is among them."),
        ("Accept-Encoding", "`zstd` and `gzip` are on offer for complete files."),
    )
]

_PARAMETERS: dict[tuple[str, str], list[Json]] = {
    ("/v1/files", "post"): [_IDEMPOTENCY_KEY],
    ("/v1/batches", "post"): [_IDEMPOTENCY_KEY],
    ("/v1/uploads/{id}/parts", "post"): [_CONTENT_MD5],
    ("/v1/files", "get"): [
        _AFTER,
        _parameter(
            "limit", {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 10_000}, "The page's size."
        ),
        _parameter("order", {"type": "string", "enum": ["asc", "desc"], "default": "desc"}, "By time of creation."),
        _parameter(
            "purpose", {"type": "string", "enum": ["batch", "batch_output", "batch_error"]}, "Only files with this one."
        ),
    ],
    ("/v1/files/{id}/content", "get"): [*_SLICE, *_CONDITIONS],
    ("/v1/batches/{id}/results", "get"): [
        *_SLICE,
        _parameter(
            "status",
            {"type": "string", "enum": ["pending", "completed", "failed", "expired", "cancelled"]},
            "Only requests with this one; `offset` and `limit` then count these.",
        ),
    ],
    ("/v1/batches", "get"): [
        _AFTER,
        _parameter("limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}, "The page's size."),
        _list_parameter("status", {"type": "string", "enum": [*LIVE, *ENDED]}, "Only batches with one of these."),
        _list_parameter("completion_window", {"type": "string"}, "Only batches with one of these, such as `24h`."),
        _parameter("created_after", _MOMENT, "Only batches created then or later: Unix seconds or RFC 3339."),
        _parameter("created_before", _MOMENT, "Only batches created then or earlier, likewise."),
        _parameter(
            "active_first",
            {"type": "boolean", "default": False},
            "Batches that have not ended come first; the order is by time of creation otherwise.",
        ),
    ],
    ("/v1/batches/{id}", "get"): [_PREFER],
    ("/v1/batches/{id}/events", "get"): [
        _parameter("lines", {"type": "boolean", "default": False}, "Whether to send each result line, too."),
        _parameter("last_event_id", {"type": "string"}, "The same as `Last-Event-ID`, which goes before it."),
        _LAST_EVENT_ID,
    ],
}

_FORM: Json = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {
            "type": "string",
            "contentMediaType": "application/octet-stream",
            "description": "JSONL, one request a line.",
        },
        "purpose": {"type": "string", "enum": ["batch"], "default": "batch"},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_EXPIRY, "maximum": MAX_EXPIRY},
    },
}

_PART: Json = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {
            "type": "string",
            "contentMediaType": "application/octet-stream",
            "description": "The part's bytes, at most 64 MiB.",
        },
        "md5": {"type": "string", "description": "The MD5 that they must have, as hex or base64."},
    },
}

_BODIES: dict[tuple[str, str], Json] = {
    ("/v1/uploads", "post"): {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/CreateUpload"}}},
    },
    ("/v1/uploads/{id}/parts", "post"): {
        "required": True,
        "content": {"multipart/form-data": {"schema": _PART}},
    },
    ("/v1/uploads/{id}/complete", "post"): {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/CompleteUpload"}}},
    },
    ("/v1/files", "post"): {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}},
    ("/v1/batches/validate", "post"): {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ValidateBatch"}}},
    },
    ("/v1/batches", "post"): {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/CreateBatch"}}},
    },
}

_FAILURES: dict[tuple[str, str], tuple[int, ...]] = {
    ("/v1/files", "get"): (400,),
    ("/v1/files", "post"): (400, 408, 409, 413, 429),
    ("/v1/files/{id}", "get"): (404,),
    ("/v1/files/{id}", "delete"): (404, 409),
    ("/v1/files/{id}/content", "get"): (400, 404, 412, 416, 429),
    ("/v1/uploads", "post"): (400, 408, 413, 429),
    ("/v1/uploads/{id}", "get"): (404,),
    ("/v1/uploads/{id}/parts", "post"): (400, 404, 408, 409, 413, 429),
    ("/v1/uploads/{id}/complete", "post"): (400, 404, 408, 409, 413, 429),
    ("/v1/uploads/{id}/cancel", "post"): (404, 409),
    ("/v1/batches", "get"): (400,),
    ("/v1/batches", "post"): (400, 404, 408, 409, 413, 429),
    ("/v1/batches/validate", "post"): (400, 404, 408, 413),
    ("/v1/batches/{id}", "get"): (404,),
    ("/v1/batches/{id}", "delete"): (404,),
    ("/v1/batches/{id}/events", "get"): (400, 404, 429),
    ("/v1/batches/{id}/cancel", "post"): (404, 409),
    ("/v1/batches/{id}/retry", "post"): (400, 404, 409, 429),
    ("/v1/batches/{id}/results", "get"): (400, 404),
}

_CONTENT: Json = {
    "description": "The file, or the lines of it that were asked for; also while it grows.",
    "headers": {
        "X-Last-Line": {
            "description": "Lines up to the end of this body, counted from the start of the file.",
            "schema": {"type": "integer", "minimum": 0},
        },
        "X-Incomplete": {
            "description": "Whether there is more, or may come more.",
            "schema": {"type": "string", "enum": ["true", "false"]},
        },
    },
    "content": {"application/x-ndjson": {"schema": {"type": "string", "contentMediaType": "application/x-ndjson"}}},
}

_VALIDATORS: Json = {
    "ETag": {
        "description": "Of a complete file: the SHA-256 of its content, with the coding behind it where there is one.",
        "schema": {"type": "string"},
    },
    "Vary": {"description": "Of a complete file.", "schema": {"type": "string", "enum": ["Accept-Encoding"]}},
    "Accept-Ranges": {"description": "Of a complete file.", "schema": {"type": "string", "enum": ["bytes"]}},
}

_WHOLE_CONTENT: Json = _CONTENT | {
    "headers": _CONTENT["headers"]
    | _VALIDATORS
    | {
        "Content-Encoding": {
            "description": "How a complete file is compressed, if it is.",
            "schema": {"type": "string", "enum": ["zstd", "gzip"]},
        }
    }
}

_PART_OF_CONTENT: Json = _CONTENT | {
    "description": "The range of bytes that was asked for; `X-Last-Line` and `X-Incomplete` speak of the whole file.",
    "headers": _CONTENT["headers"]
    | _VALIDATORS
    | {"Content-Range": {"description": "Which bytes of how many.", "schema": {"type": "string"}}},
}

_NOT_MODIFIED: Json = {
    "description": "The file is still the one that `If-None-Match` names.",
    "headers": _CONTENT["headers"] | _VALIDATORS,
}

_METRICS: Json = {
    "description": "Every metric of this server, in Prometheus' text format.",
    "content": {"text/plain": {"schema": {"type": "string"}}},
}

_EVENTS: Json = {
    "description": "Server-sent events until the batch has ended. `status` (a `BatchObject`) comes first and whenever "
    "the status changes, and a terminal one is the last event; `counts` (a `CountsEvent`) and `lines` (a `LinesEvent`) "
    "come as results are recorded; `output` and `error`, with `lines=true`, are result lines as they stand in the "
    "files; `deleted` (a `DeletedEvent`) ends the stream of a batch that is deleted.",
    "content": {"text/event-stream": {"schema": {"type": "string", "contentMediaType": "text/event-stream"}}},
}


def _header(description: str, schema: Json) -> Json:
    return {"description": description, "schema": schema}


_HEADERS_OF_WAIT: Json = {
    "Preference-Applied": _header("The wait that was granted: `wait=N`.", {"type": "string"}),
    "Vary": _header("The answer depends on this header.", {"type": "string", "enum": ["Prefer"]}),
}


_KEY: Json = {
    "type": "http",
    "scheme": "bearer",
    "description": "A key from `batchery keys create`. A server that only its own machine can reach needs none as long "
    "as none was ever made.",
}


def _failure(status: int) -> Json:
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = _header("How to come in.", {"type": "string", "enum": ["Bearer"]})
    if status == 416:
        headers["Content-Range"] = _header("The file's length: `bytes */N`.", {"type": "string"})
    if status == 409:
        headers["x-should-retry"] = _header("Tells official clients not to.", {"type": "string", "enum": ["false"]})
    if status in (429, 503):
        headers["Retry-After"] = _header("Seconds.", {"type": "integer", "minimum": 1, "maximum": 60})
    return {
        "description": ERRORS[status],
        "headers": headers,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorEnvelope"}}},
    }


@cache
def document() -> Json:
    """The OpenAPI 3.1 document."""
    described = Litestar(
        [Router("/v1", route_handlers=API), *HEALTH],
        openapi_config=OpenAPIConfig(
            title=TITLE,
            version=__version__,
            description=DESCRIPTION,
            license=License(name="Apache-2.0", identifier="Apache-2.0"),
            servers=[Server(url="/")],
            use_handler_docstrings=True,
        ),
        logging_config=None,
    ).openapi_schema.to_schema()
    completed: Json = json.loads(msgspec.json.encode(described))
    _, components = msgspec.json.schema_components(
        (ErrorEnvelope, CreateBatch, ValidateBatch, CreateUpload, CompleteUpload, *EVENTS),
        ref_template="#/components/schemas/{name}",
    )
    completed["components"]["schemas"].update(components)
    completed["components"]["securitySchemes"] = {"key": _KEY}
    for path, item in completed["paths"].items():
        for method, operation in item.items():
            _complete(path, method, operation)
    return completed


def _complete(path: str, method: str, operation: Json) -> None:
    key = (path, method)
    operation.setdefault("parameters", []).extend(_PARAMETERS.get(key, []))
    if key in _BODIES:
        operation["requestBody"] = _BODIES[key]
    responses = {status: answer for status, answer in operation["responses"].items() if status in ("200", "204")}
    if key == ("/v1/files/{id}/content", "get"):
        responses |= {"200": _WHOLE_CONTENT, "206": _PART_OF_CONTENT, "304": _NOT_MODIFIED}
    if key == ("/metrics", "get"):
        responses["200"] = _METRICS
    if key == ("/v1/batches/{id}/results", "get"):
        responses["200"] = _CONTENT | {"description": "A line of JSON for each request, in input order."}
    if key == ("/v1/batches/{id}", "get"):
        responses["200"]["headers"] = _HEADERS_OF_WAIT
    if key == ("/v1/batches/{id}/events", "get"):
        responses |= {"200": _EVENTS, "204": {"description": "The batch has ended, and all of it has been received."}}
    needs_key = path.startswith("/v1/")
    if needs_key:
        operation["security"] = [{"key": []}]
    for status in sorted({*_FAILURES.get(key, ()), *((401,) if needs_key else ()), 500, 503}):
        responses[str(status)] = _failure(status)
    for answer in responses.values():
        answer.setdefault("headers", {})["x-request-id"] = _header("This answer's name.", {"type": "string"})
    operation["responses"] = responses


@cache
def _encoded() -> bytes:
    return msgspec.json.encode(document())


@get("/openapi.json", media_type=MediaType.JSON, include_in_schema=False, sync_to_thread=False)
def serve_document() -> Response[bytes]:
    """The OpenAPI document."""
    return Response(_encoded(), media_type=MediaType.JSON)
