"""Every failure is one JSON shape, whoever raised it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from batchery.store.errors import StoreUnavailable
from batchery.wire.errors import ApiError
from tests.requests import chat_file
from tests.server.rig import BOUNDARY, Rig, field_part, file_part, form

UNKNOWN = "0" * 32
GOOD = {"input_file_id": f"file-{UNKNOWN}", "endpoint": "/v1/chat/completions", "completion_window": "24h"}


def wrong(**changes: Any) -> dict[str, Any]:
    """A body of `POST /batches` with some fields changed; None takes one away."""
    return {"json": {name: value for name, value in (GOOD | changes).items() if value is not None}}


CASES: list[tuple[str, str, dict[str, Any], int, str | None]] = [
    # the router
    ("GET", "/", {}, 404, None),
    ("GET", "/v1", {}, 404, None),
    ("GET", "/v1/nothing", {}, 404, None),
    ("GET", "/v2/files", {}, 404, None),
    ("GET", "/v1/files/a/b/c", {}, 404, None),
    ("GET", "/schema", {}, 404, None),
    ("GET", "/v1/%ff%fe", {}, 404, None),
    ("GET", "/" + "a" * 9000, {}, 414, None),
    ("GET", "/v1/files?" + "a" * 9000, {}, 414, None),
    ("GET", "/v1/files", {"headers": {f"x-{i}": "y" * 4000 for i in range(9)}}, 431, None),
    ("PUT", "/v1/files", {}, 405, None),
    ("DELETE", "/v1/batches", {}, 405, None),
    ("BREW", "/v1/batches", {}, 405, None),
    ("GET", f"/v1/batches/{UNKNOWN}/cancel", {}, 405, None),
    ("POST", "/healthz", {}, 405, None),
    # lists
    ("GET", "/v1/files?limit=0", {}, 400, "limit"),
    ("GET", "/v1/files?limit=10001", {}, 400, "limit"),
    ("GET", "/v1/files?limit=", {}, 400, "limit"),
    ("GET", "/v1/files?limit=-1", {}, 400, "limit"),
    ("GET", "/v1/files?limit=1.0", {}, 400, "limit"),
    ("GET", "/v1/files?limit=%D9%A1", {}, 400, "limit"),
    ("GET", "/v1/files?limit=" + "9" * 5000, {}, 400, "limit"),
    ("GET", "/v1/files?limit=1&limit=2", {}, 400, "limit"),
    ("GET", "/v1/files?order=up", {}, 400, "order"),
    ("GET", "/v1/files?purpose=fine-tune", {}, 400, "purpose"),
    ("GET", f"/v1/files?after={UNKNOWN}", {}, 400, "after"),
    ("GET", "/v1/files?after=nonsense%00", {}, 400, "after"),
    ("GET", "/v1/batches?limit=101", {}, 400, "limit"),
    ("GET", f"/v1/batches?after=batch_{UNKNOWN}", {}, 400, "after"),
    ("GET", f"/v1/batches?after=file-{UNKNOWN}", {}, 400, "after"),
    # objects
    ("GET", f"/v1/files/file-{UNKNOWN}", {}, 404, "id"),
    ("GET", f"/ai/v1/files/{UNKNOWN}", {}, 404, "id"),
    ("GET", "/v1/files/nonsense%00", {}, 404, "id"),
    ("GET", f"/v1/files/file-{UNKNOWN}/content", {}, 404, "id"),
    ("DELETE", f"/v1/files/file-{UNKNOWN}", {}, 404, "id"),
    ("GET", f"/v1/batches/batch_{UNKNOWN}", {}, 404, "id"),
    ("GET", f"/v1/batches/file-{UNKNOWN}", {}, 404, "id"),
    ("POST", f"/v1/batches/batch_{UNKNOWN}/cancel", {}, 404, "id"),
    # content
    ("GET", f"/v1/files/file-{UNKNOWN}/content?limit=0", {}, 400, "limit"),
    ("GET", f"/v1/files/file-{UNKNOWN}/content?offset=-1", {}, 400, "offset"),
    ("GET", f"/v1/files/file-{UNKNOWN}/content?skip=x", {}, 400, "skip"),
    ("GET", f"/v1/files/file-{UNKNOWN}/content?skip=1&offset=2", {}, 400, "skip"),
    # creating batches
    ("POST", "/v1/batches", {"data": b""}, 400, None),
    ("POST", "/v1/batches", {"data": b"{"}, 400, None),
    ("POST", "/v1/batches", {"data": b"\xff"}, 400, None),
    ("POST", "/v1/batches", {"data": b"[" * 100_000}, 400, None),
    ("POST", "/v1/batches", {"data": b"[]"}, 400, None),
    ("POST", "/v1/batches", {"data": b"x" * (1024 * 1024 + 1)}, 413, None),
    ("POST", "/v1/batches", wrong(input_file_id=None), 400, "input_file_id"),
    ("POST", "/v1/batches", wrong(input_file_id=7), 400, "input_file_id"),
    ("POST", "/v1/batches", wrong(endpoint="/v1/nothing"), 400, "endpoint"),
    ("POST", "/v1/batches", wrong(completion_window="2h"), 400, "completion_window"),
    ("POST", "/v1/batches", wrong(metadata={"a": 1}), 400, "metadata.a"),
    ("POST", "/v1/batches", wrong(metadata={str(i): "" for i in range(17)}), 400, "metadata"),
    (
        "POST",
        "/v1/batches",
        wrong(output_expires_after={"anchor": "created_at", "seconds": 1}),
        400,
        "output_expires_after.seconds",
    ),
    ("POST", "/v1/batches", wrong(), 404, "input_file_id"),
    ("POST", "/v1/batches", wrong(input_file_id="x" * 5000), 404, "input_file_id"),
    # uploads that are no forms
    ("POST", "/v1/files", {"json": {}}, 400, None),
    ("POST", "/v1/files", {"data": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, None),
    ("POST", "/v1/files", {"data": b"x", "headers": {"Content-Type": 'multipart/form-data; boundary=""'}}, 400, None),
]


async def test_a_failure_has_its_status_its_parameter_and_the_one_shape(rig: Rig) -> None:
    for method, path, options, status, param in CASES:
        case = f"{method} {path[:80]} {str(options)[:80]}"
        answer = await rig.ask(method, path, **options)
        assert answer.status == status, (case, answer)
        error = answer.error()
        assert error["param"] == param, case
        assert error["type"] == "invalid_request_error", case
        assert len(error["message"]) < 600, case


async def test_a_wrong_method_names_the_right_ones(rig: Rig) -> None:
    answer = await rig.ask("PUT", "/v1/files")
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS, POST"


async def test_an_unknown_file_is_said_as_openai_says_it(rig: Rig) -> None:
    answer = await rig.ask("GET", f"/v1/files/file-{UNKNOWN}")
    assert answer.error()["message"] == f"No such File object: file-{UNKNOWN}"


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (RuntimeError("secret"), 500, "internal_error"),
        (StoreUnavailable("secret"), 503, "storage_unavailable"),
        (ExceptionGroup("secret", [ValueError("secret")]), 500, "internal_error"),
        (ApiError("shown"), 500, None),
    ],
)
async def test_what_breaks_inside_stays_inside(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, raised: Exception, status: int, code: str | None
) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("batchery.store.batches.page", broken)
    answer = await rig.ask("GET", "/v1/batches")
    assert answer.status == status
    error = answer.error()
    assert error["code"] == code
    assert error["type"] == "server_error"
    assert "secret" not in json.dumps(error)
    if status == 503:
        assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_head_is_get_without_the_body(rig: Rig) -> None:
    uploaded = await rig.upload(chat_file(3))
    for path in ("/healthz", "/v1/files", f"/v1/files/{uploaded['id']}", f"/v1/files/{uploaded['id']}/content"):
        got, head = await rig.ask("GET", path), await rig.ask("HEAD", path)
        assert head.status == got.status == 200
        assert head.body == b""
        ignored = ("date", "x-request-id")
        assert [(k, v) for k, v in head.headers.items() if k not in ignored] == [
            (k, v) for k, v in got.headers.items() if k not in ignored
        ]
    assert (await rig.ask("HEAD", f"/v1/files/{UNKNOWN}")).status == 404


async def test_both_bases_and_a_trailing_slash_answer_alike_and_nothing_redirects(rig: Rig) -> None:
    for path in ("/v1/files", "/ai/v1/files", "/v1/files/", "/v1/models", "/ai/v1/models"):
        assert (await rig.ask("GET", path + "?unknown=1")).status == 200


async def test_an_answer_never_repeats_the_request_id_of_the_client(rig: Rig) -> None:
    first, second = [await rig.ask("GET", "/healthz", headers={"x-request-id": "mine"}) for _ in range(2)]
    assert first.headers["x-request-id"] != second.headers["x-request-id"] != "mine"


async def test_readiness_follows_the_database_and_the_store(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await rig.ask("GET", "/readyz")).json == {"status": "ok"}
    hidden = rig.folder.with_name("hidden")
    rig.folder.rename(hidden)
    answer = await rig.ask("GET", "/readyz")
    assert answer.status == 503
    assert answer.error()["code"] == "not_ready"
    assert (await rig.ask("GET", "/healthz")).status == 200
    hidden.rename(rig.folder)
    assert (await rig.ask("GET", "/readyz")).status == 200


async def test_an_early_refusal_reaches_a_client_that_looks_only_after_it_has_sent_everything(rig: Rig) -> None:
    body = form(field_part("purpose", "fine-tune"), file_part(b"x" * 20_000_000))
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
    for _ in range(8):
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 1_000_000):
            writer.write(body[start : start + 1_000_000])
            await writer.drain()  # a closed connection would raise here
        answer = await reader.readuntil(b"}}")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b'"param":"purpose"' in answer
        writer.close()


@pytest.mark.parametrize("expect", ["", "Expect: 100-continue\r\n"])
async def test_an_early_refusal_does_not_wait_for_a_client_that_waits_for_it(rig: Rig, expect: str) -> None:
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\n{expect}Content-Length: 5000000\r\n\r\n"
    async with asyncio.timeout(5):
        answer = await rig.raw(head.encode(), finish=False)
    assert answer.status == 400
    assert answer.error()["code"] == "invalid_content_type"
