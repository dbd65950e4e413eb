"""A page that shows the OpenAPI document to people, without loading anything from elsewhere."""

from __future__ import annotations

import html
import json
from functools import cache

from litestar import MediaType, Response, get

from batchery import __version__
from batchery.server.openapi import DESCRIPTION, TITLE, Json, document


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
