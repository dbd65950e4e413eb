"""The OpenAPI document, and its page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from batchery.server.openapi import document
from batchery.server.openapi_page import page
from tests.server.rig import Rig

OPERATIONS = {
    ("/healthz", "get"),
    ("/metrics", "get"),
    ("/readyz", "get"),
    ("/v1/batches", "get"),
    ("/v1/batches", "post"),
    ("/v1/batches/{id}", "get"),
    ("/v1/batches/{id}/cancel", "post"),
    ("/v1/batches/{id}", "delete"),
    ("/v1/batches/{id}/events", "get"),
    ("/v1/batches/{id}/results", "get"),
    ("/v1/batches/{id}/retry", "post"),
    ("/v1/batches/validate", "post"),
    ("/v1/files", "get"),
    ("/v1/files", "post"),
    ("/v1/files/{id}", "delete"),
    ("/v1/files/{id}", "get"),
    ("/v1/files/{id}/content", "get"),
    ("/v1/models", "get"),
    ("/v1/uploads", "post"),
    ("/v1/uploads/{id}", "get"),
    ("/v1/uploads/{id}/cancel", "post"),
    ("/v1/uploads/{id}/complete", "post"),
    ("/v1/uploads/{id}/parts", "post"),
}


def walk(node: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from walk(child)
    elif isinstance(node, list):
        for child in node:
            yield from walk(child)


def test_every_operation_is_there_and_every_reference_leads_somewhere() -> None:
    shown = document()
    assert shown["openapi"].startswith("3.1")
    assert {(path, method) for path, item in shown["paths"].items() for method in item} == OPERATIONS
    for node in walk(shown):
        if "$ref" in node:
            prefix, _, name = node["$ref"].rpartition("/")
            assert prefix == "#/components/schemas"
            assert name in shown["components"]["schemas"]


def test_every_operation_says_what_it_takes_and_answers() -> None:
    ids = set()
    for path, item in document()["paths"].items():
        for method, operation in item.items():
            case = f"{method} {path}"
            ids.add(operation["operationId"])
            assert operation["description"], case
            in_path = [parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"]
            assert in_path == re.findall(r"{(\w+)}", path), case
            assert {"200", "204"} & set(operation["responses"]), case
            for status, answer in operation["responses"].items():
                assert "x-request-id" in answer["headers"], case
                if status in ("204", "304"):
                    assert "content" not in answer, case
                    continue
                schema = next(iter(answer["content"].values()))["schema"]
                if status not in ("200", "206"):
                    assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}, case
    assert len(ids) == len(OPERATIONS)


def test_bodies_and_headers_that_only_we_know() -> None:
    paths = document()["paths"]
    form = paths["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["file"]
    body = paths["/v1/batches"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/CreateBatch"}
    content = paths["/v1/files/{id}/content"]["get"]["responses"]["200"]
    assert list(content["content"]) == ["application/x-ndjson"]
    assert {"X-Last-Line", "X-Incomplete"} <= set(content["headers"])


async def test_both_are_served_without_a_redirect(rig: Rig) -> None:
    answer = await rig.ask("GET", "/openapi.json")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json == document()
    answer = await rig.ask("GET", "/docs")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")


def test_the_page_loads_nothing_from_elsewhere() -> None:
    html = page()
    assert "<script" not in html
    assert not re.search(r"(src|href)=\"(https?:)?//", html)
    assert "/v1/files/{id}/content" in html


async def test_what_is_served_is_what_the_document_says(rig: Rig) -> None:
    from tests.requests import chat_file

    uploaded = await rig.upload(chat_file(2))
    batch = (await rig.create(uploaded["id"])).json
    schemas = document()["components"]["schemas"]
    for found, name in ((uploaded, "FileObject"), (batch, "BatchObject")):
        assert set(found) == set(schemas[name]["properties"])
        assert set(schemas[name]["required"]) <= set(found)
