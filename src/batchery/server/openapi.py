"""The OpenAPI document, and a page that shows it without loading anything from elsewhere.

The framework describes the routes and the objects that they answer with. What it cannot know, because the handlers
read bodies and queries themselves, is added here: form and JSON bodies, query parameters, error answers, headers.
"""

from __future__ import annotations

import html
import json
from functools import cache
from typing import Any

import msgspec
from litestar import Litestar, MediaType, Response, Router, get
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.spec import License, Server

from batchery import __version__
from batchery.server.routes import API, HEALTH
from batchery.wire.errors import ErrorEnvelope
from batchery.wire.objects import MAX_EXPIRY, MIN_EXPIRY, CreateBatch

Json = dict[str, Any]

TITLE = "batchery"
DESCRIPTION = (
    "Batch inference over HTTP, compatible with OpenAI's Files and Batch APIs and Doubleword's extensions. "
    'Every path is also served under `/ai`. Every failure is `{"error": {message, type, param, code}}`, and every '
    "answer carries `x-request-id`."
)

ERRORS = {
    400: "What was sent is wrong; the message says what would be accepted.",
    404: "It does not exist, or belongs to somebody else.",
    408: "No byte of the body came for too long.",
    409: "The object's state forbids it; do not retry.",
    413: "The body is over its limit; nothing was stored.",
    500: "A defect of the server.",
    503: "The database or the file store is out of reach or full; come back after `Retry-After` seconds.",
}


def _parameter(name: str, schema: Json, description: str) -> Json:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": description}


_AFTER = _parameter("after", {"type": "string"}, "The id of the last object of the page before.")

_PARAMETERS: dict[tuple[str, str], list[Json]] = {
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
    ("/v1/files/{id}/content", "get"): [
        _parameter("offset", {"type": "integer", "minimum": 0, "default": 0}, "Start after so many lines."),
        _parameter("skip", {"type": "integer", "minimum": 0}, "The same as `offset`; give one of them."),
        _parameter(
            "limit", {"type": "integer", "minimum": 1}, "At most so many lines; everything there is by default."
        ),
    ],
    ("/v1/batches", "get"): [
        _AFTER,
        _parameter("limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}, "The page's size."),
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

_BODIES: dict[tuple[str, str], Json] = {
    ("/v1/files", "post"): {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}},
    ("/v1/batches", "post"): {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/CreateBatch"}}},
    },
}

_FAILURES: dict[tuple[str, str], tuple[int, ...]] = {
    ("/v1/files", "get"): (400,),
    ("/v1/files", "post"): (400, 408, 413),
    ("/v1/files/{id}", "get"): (404,),
    ("/v1/files/{id}", "delete"): (404, 409),
    ("/v1/files/{id}/content", "get"): (400, 404),
    ("/v1/batches", "get"): (400,),
    ("/v1/batches", "post"): (400, 404, 408, 413),
    ("/v1/batches/{id}", "get"): (404,),
    ("/v1/batches/{id}/cancel", "post"): (404, 409),
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


def _header(description: str, schema: Json) -> Json:
    return {"description": description, "schema": schema}


def _failure(status: int) -> Json:
    headers = {}
    if status == 409:
        headers["x-should-retry"] = _header("Tells official clients not to.", {"type": "string", "enum": ["false"]})
    if status == 503:
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
        (ErrorEnvelope, CreateBatch), ref_template="#/components/schemas/{name}"
    )
    completed["components"]["schemas"].update(components)
    for path, item in completed["paths"].items():
        for method, operation in item.items():
            _complete(path, method, operation)
    return completed


def _complete(path: str, method: str, operation: Json) -> None:
    key = (path, method)
    operation.setdefault("parameters", []).extend(_PARAMETERS.get(key, []))
    if key in _BODIES:
        operation["requestBody"] = _BODIES[key]
    responses = {status: answer for status, answer in operation["responses"].items() if status == "200"}
    if key == ("/v1/files/{id}/content", "get"):
        responses["200"] = _CONTENT
    for status in (*_FAILURES.get(key, ()), 500, 503):
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


@get("/docs", media_type=MediaType.HTML, include_in_schema=False, sync_to_thread=False)
def serve_page() -> Response[str]:
    """The document as a page."""
    return Response(page(), media_type=MediaType.HTML)


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
code,pre{font:14px/1.4 ui-monospace,monospace;background:#f4f4f4}pre{padding:.75rem;overflow:auto}
h2{margin-top:2.5rem;border-top:1px solid #ddd;padding-top:1rem}table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:.25rem .75rem .25rem 0;vertical-align:top;border-bottom:1px solid #eee}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}code,pre{background:#262626}
td,th,h2{border-color:#333}a{color:#8ab4f8}}
"""


@cache
def page() -> str:
    """The document as one HTML page that needs nothing else."""
    shown = document()
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{TITLE} API</title>',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<style>{_STYLE}</style></head><body><h1>{TITLE} {html.escape(__version__)}</h1>",
        f'<p>{_prose(DESCRIPTION)}</p><p>For machines: <a href="/openapi.json">openapi.json</a>.</p>',
    ]
    for path, item in shown["paths"].items():
        for method, operation in item.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{_prose(operation.get('description', ''))}</p>")
            parts.append(_parameters_table(operation))
            parts.append(_answers_table(operation))
    parts.append("<h2>Objects</h2>")
    for name, schema in sorted(shown["components"]["schemas"].items()):
        text = html.escape(json.dumps(schema, indent=2))
        parts.append(
            f'<details id="{html.escape(name)}"><summary>{html.escape(name)}</summary><pre>{text}</pre></details>'
        )
    parts.append("</body></html>")
    return "\n".join(parts)


def _prose(text: str) -> str:
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))


def _parameters_table(operation: Json) -> str:
    rows = [
        (parameter["name"], parameter["in"], parameter["schema"], parameter.get("description", ""))
        for parameter in operation["parameters"]
    ]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        rows.append(("body", kind, content["schema"], ""))
    if not rows:
        return ""
    lines = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(where)}</td><td>{_type(schema)}</td>"
        f"<td>{_prose(description)}</td></tr>"
        for name, where, schema, description in rows
    )
    return f"<table><tr><th>Parameter</th><th>In</th><th>Type</th><th></th></tr>{lines}</table>"


def _answers_table(operation: Json) -> str:
    lines = ""
    for status, answer in operation["responses"].items():
        schema: Json = next((content["schema"] for content in answer.get("content", {}).values()), {})
        lines += f"<tr><td>{status}</td><td>{_type(schema)}</td><td>{_prose(answer['description'])}</td></tr>"
    return f"<table><tr><th>Status</th><th>Answer</th><th></th></tr>{lines}</table>"


def _type(schema: Json) -> str:
    if "$ref" in schema:
        name = html.escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    return f"<code>{html.escape(json.dumps(schema))}</code>"
