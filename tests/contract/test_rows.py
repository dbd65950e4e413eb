"""The wire contract row by row, from outside: each test names the row that it proves.

Details (every bad value, every race, every crash) are proved where the parts are tested; here each promise is kept
once, over HTTP, by a whole server with a worker and an upstream.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from batchery.store import workers
from batchery.store.database import sqlite_url
from batchery.store.errors import StoreUnavailable
from batchery.wire.lines import URLS, Limits
from tests.requests import chat_file, chat_line
from tests.server.rig import Answer, field_part, file_part, form, until
from tests.whole import Whole, whole

BASES = ("/v1", "/ai/v1")
UNKNOWN = "0" * 32
BATCH_KEYS = [
    *("id", "object", "endpoint", "model", "errors", "input_file_id", "completion_window", "status"),
    *("output_file_id", "error_file_id", "created_at", "in_progress_at", "expires_at", "finalizing_at"),
    *(
        "completed_at",
        "failed_at",
        "expired_at",
        "cancelling_at",
        "cancelled_at",
        "request_counts",
        "usage",
        "estimated_completion_at",
        "deduplicated",
        "metadata",
    ),
]
FILE_KEYS = ["id", "object", "bytes", "created_at", "filename", "purpose", "status", "status_details", "expires_at"]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    """Starts the whole, with a worker."""

    @asynccontextmanager
    async def begin(**changes: Any) -> AsyncIterator[Whole]:
        async with whole(sqlite_url(tmp_path / "batchery.db"), tmp_path, **changes) as one, one.working(cancel_grace=1):
            yield one

    return begin


def is_error(answer: Answer, status: int, param: str | None = None) -> dict[str, Any]:
    """Every failure is the same shape; what it says."""
    assert answer.status == status, answer
    error = answer.error()
    if param is not None:
        assert error["param"] == param
    return error


# Where it is served


async def test_the_same_handlers_answer_at_both_base_paths(start: Any) -> None:
    async with start() as one:
        file = (await one.rig.upload(chat_file(1)))["id"]
        for base in BASES:
            assert (await one.rig.ask("GET", f"{base}/files/{file}")).json["id"] == file
            assert (await one.rig.ask("GET", f"{base}/batches")).status == 200
            assert (await one.rig.ask("GET", f"{base}/models")).status == 200


async def test_alive_ready_metrics_document_and_page(start: Any) -> None:
    async with start() as one:
        assert (await one.rig.ask("GET", "/healthz")).status == 200
        assert (await one.rig.ask("GET", "/readyz")).status == 200
        metrics = await one.rig.ask("GET", "/metrics")
        assert metrics.status == 200
        assert metrics.headers["content-type"].startswith("text/plain")
        assert (await one.rig.ask("GET", "/openapi.json")).json["openapi"].startswith("3.1")
        assert (await one.rig.ask("GET", "/docs")).headers["content-type"].startswith("text/html")


async def test_no_redirects_unknown_paths_are_404_and_unknown_parameters_ignored(start: Any) -> None:
    async with start() as one:
        for path in ("/", "/v1", "/v1/", "/v1/nothing", "/v1/files/", "/v1/batches/", "/ai", "/v2/files"):
            answer = await one.rig.ask("GET", path)
            assert answer.status in (200, 404), path
            if answer.status == 404:
                answer.error()
        assert (await one.rig.ask("GET", "/v1/batches?nonsense=1&limit=5")).status == 200


# Errors


async def test_errors_are_json_of_one_shape_whatever_raised_them(start: Any) -> None:
    async with start() as one:
        is_error(await one.rig.ask("GET", "/nowhere"), 404)
        is_error(await one.rig.ask("PATCH", "/v1/files"), 405)
        is_error(await one.rig.ask("POST", "/v1/batches", data=b"{"), 400)
        is_error(await one.rig.ask("GET", f"/v1/batches/batch_{UNKNOWN}"), 404)
        is_error(await one.rig.ask("GET", "/v1/files?" + "x" * 9_000), 414)
        is_error(await one.rig.ask("GET", "/v1/files", headers={"X-Long": "x" * 40_000}), 431)
        is_error(await one.rig.post_form(b"", content_type="text/plain"), 400)


async def test_messages_name_the_field_the_value_and_what_would_be_accepted(start: Any) -> None:
    async with start() as one:
        file = (await one.rig.upload(chat_file(1)))["id"]
        window = is_error(await one.rig.create(file, completion_window="25h"), 400, "completion_window")["message"]
        assert "25h" in window
        assert "24h, 1h" in window
        endpoint = is_error(await one.rig.create(file, endpoint="/v1/chat"), 400, "endpoint")["message"]
        assert "/v1/chat'" in endpoint or '/v1/chat"' in endpoint
        assert all(url in endpoint for url in URLS)
        assert "1 to 100" in is_error(await one.rig.ask("GET", "/v1/batches?limit=101"), 400, "limit")["message"]


async def test_409_is_never_to_be_retried(start: Any) -> None:
    async with start() as one:
        created = await one.batch(chat_file(1))
        await one.until(created["id"])
        answer = await one.rig.ask("POST", f"/v1/batches/{created['id']}/cancel")
        assert is_error(answer, 409)["message"] == "Cannot cancel a batch with status 'completed'."
        assert answer.headers["x-should-retry"] == "false"


async def test_413_stores_nothing(start: Any) -> None:
    async with start(limits=Limits(file_bytes=1_000)) as one:
        answer = await one.rig.post_form(form(file_part(chat_file(20)), field_part("purpose", "batch")))
        is_error(answer, 413)
        assert (await one.rig.ask("GET", "/v1/files")).json["data"] == []
        assert one.rig.left_behind() == []


async def test_416_names_the_size(start: Any) -> None:
    async with start() as one:
        file = await one.rig.upload(chat_file(1))
        answer = await one.rig.ask("GET", f"/v1/files/{file['id']}/content", headers={"Range": "bytes=999999-"})
        is_error(answer, 416)
        assert answer.headers["content-range"] == f"bytes */{file['bytes']}"


async def test_503_says_when_to_come_back(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start() as one:

        def broken(*_: Any, **__: Any) -> Any:
            raise StoreUnavailable("away")

        monkeypatch.setattr(one.rig.context.database, "read", broken)
        answer = await one.rig.ask("GET", "/v1/batches")
        monkeypatch.undo()
        is_error(answer, 503)
        assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_every_response_carries_a_request_id(start: Any) -> None:
    async with start() as one:
        for method, path in (("GET", "/healthz"), ("GET", "/v1/files"), ("HEAD", "/v1/batches"), ("GET", "/nope")):
            assert re.fullmatch(r"req_[0-9a-f]{32}", (await one.rig.ask(method, path)).headers["x-request-id"])


# Files


async def test_the_file_object(start: Any) -> None:
    async with start() as one:
        data = chat_file(2)
        file = await one.rig.upload(data, "prompts.jsonl")
        assert list(file) == FILE_KEYS
        assert re.fullmatch(r"file-[0-9a-f]{32}", file["id"])
        assert (file["object"], file["bytes"], file["filename"]) == ("file", len(data), "prompts.jsonl")
        assert (file["purpose"], file["status"], file["status_details"]) == ("batch", "processed", None)
        assert abs(file["created_at"] - time.time()) < 60


async def test_ids_are_accepted_with_either_prefix_or_none(start: Any) -> None:
    async with start() as one:
        file = (await one.rig.upload(chat_file(1)))["id"].removeprefix("file-")
        for prefix in ("file-", "file_", ""):
            assert (await one.rig.ask("GET", f"/v1/files/{prefix}{file}")).json["id"] == f"file-{file}"
            created = await one.rig.create(prefix + file)
            batch = created.json["id"].removeprefix("batch_")
        for prefix in ("batch-", "batch_", ""):
            assert (await one.rig.ask("GET", f"/v1/batches/{prefix}{batch}")).json["id"] == f"batch_{batch}"


async def test_post_files_takes_parts_in_any_order_and_both_ways_to_say_expires_after(start: Any) -> None:
    async with start() as one:
        data = chat_file(1)
        for names in (
            ("expires_after[anchor]", "expires_after[seconds]"),
            ("expires_after.anchor", "expires_after.seconds"),
        ):
            parts = [file_part(data), field_part("purpose", "batch")]
            parts += [field_part(names[0], "created_at"), field_part(names[1], "3600")]
            for order in (parts, parts[::-1]):
                answer = await one.rig.post_form(form(*order))
                assert answer.status == 200, answer
                assert answer.json["expires_at"] == answer.json["created_at"] + 3600
        for seconds in ("3599", "2592001", "soon"):
            wrong = [file_part(data), field_part(names[0], "created_at"), field_part(names[1], seconds)]
            is_error(await one.rig.post_form(form(*wrong)), 400)


async def test_post_files_chunked_without_a_name_or_a_purpose(start: Any) -> None:
    async def body() -> AsyncIterator[bytes]:
        whole = form(file_part(chat_file(3), filename=None))
        for start in range(0, len(whole), 50):
            yield whole[start : start + 50]

    async with start() as one:
        answer = await one.rig.post_form(body())
        assert answer.status == 200, answer
        assert (answer.json["filename"], answer.json["purpose"]) == ("upload", "batch")
        other = await one.rig.post_form(form(file_part(chat_file(1)), field_part("purpose", "assistants")))
        is_error(other, 400, "purpose")


async def test_limits_of_requests_and_of_a_line(start: Any) -> None:
    async with start(limits=Limits(requests=2, line_bytes=300)) as one:
        many = await one.batch(chat_file(4))
        assert [(error["code"], error["line"]) for error in many["errors"]["data"]] == [
            ("too_many_requests_in_file", 3)
        ]
        long = await one.batch(chat_line("a", "x" * 400))
        assert [error["code"] for error in long["errors"]["data"]] == ["line_too_large"]


async def test_get_files_pages_in_both_orders_and_by_purpose(start: Any) -> None:
    async with start() as one:
        ids = [(await one.rig.upload(chat_file(1)))["id"] for _ in range(5)]
        listed = (await one.rig.ask("GET", "/v1/files")).json
        assert list(listed) == ["object", "data", "first_id", "last_id", "has_more"]
        assert [file["id"] for file in listed["data"]] == ids[::-1]
        page = (await one.rig.ask("GET", f"/v1/files?order=asc&limit=2&after={ids[0]}")).json
        assert ([file["id"] for file in page["data"]], page["has_more"]) == (ids[1:3], True)
        assert (page["first_id"], page["last_id"]) == (ids[1], ids[2])
        empty = (await one.rig.ask("GET", f"/v1/files?order=asc&after={ids[-1]}")).json
        assert (empty["data"], empty["has_more"]) == ([], False)
        await one.until((await one.rig.create(ids[0])).json["id"])
        outputs = (await one.rig.ask("GET", "/v1/files?purpose=batch_output")).json["data"]
        assert [file["purpose"] for file in outputs] == ["batch_output"]
        for query in ("limit=0", "limit=10001", "limit=x", "order=up", "purpose=vision", "after=file-unknown"):
            is_error(await one.rig.ask("GET", f"/v1/files?{query}"), 400)


async def test_delete_files_is_refused_while_a_live_batch_reads_the_file(start: Any) -> None:
    async with start() as one:
        file = (await one.rig.upload(chat_line("a", "[[simulate stall]]")))["id"]
        batch = (await one.rig.create(file)).json["id"]
        is_error(await one.rig.ask("DELETE", f"/v1/files/{file}"), 409)
        await one.rig.ask("POST", f"/v1/batches/{batch}/cancel")
        await one.until(batch)
        deleted = await one.rig.ask("DELETE", f"/v1/files/{file}")
        assert deleted.json == {"id": file, "object": "file", "deleted": True}
        for path in (f"/v1/files/{file}", f"/v1/files/{file}/content"):
            is_error(await one.rig.ask("GET", path), 404)


# Lines


BAD: list[tuple[bytes, str, str | None]] = [
    (b"not json", "invalid_json_line", None),
    (b"[]", "invalid_json_line", None),
    (b'{"custom_id":"x","custom_id":"y"}', "invalid_json_line", None),
    (b'{"method":"POST","url":"/v1/completions","body":{"model":"m"}}', "missing_required_parameter", "custom_id"),
    (
        b'{"custom_id":"x","method":"POST","url":"/v1/completions","body":{}}',
        "missing_required_parameter",
        "body.model",
    ),
    (chat_line("x" * 65, "p").strip(), "invalid_custom_id", "custom_id"),
    (chat_line("same", "p").strip(), "duplicate_custom_id", "custom_id"),
    (chat_line("x", "p").strip().replace(b"POST", b"GET"), "invalid_method", "method"),
    (chat_line("x", "p").strip().replace(b"/v1/chat/completions", b"/v1/images"), "invalid_url", "url"),
    (chat_line("x", "p", stream=True).strip(), "streaming_unsupported", "body.stream"),
    (b"\xff", "invalid_utf8", None),
]


async def test_every_bad_line_is_reported_with_its_code_and_is_in_the_error_file(start: Any) -> None:
    async with start() as one:
        data = chat_line("same", "p") + b"\n".join(line for line, _, _ in BAD) + b"\n"
        file = await one.rig.upload(data)
        assert file["status"] == "error"
        assert "Line 2" in file["status_details"]
        assert f"{len(BAD)} problems" in file["status_details"]
        batch = (await one.rig.create(file["id"])).json
        assert batch["status"] == "failed"
        assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
        expected = [(code, param, number) for number, (_, code, param) in enumerate(BAD, 2)]
        assert [(error["code"], error["param"], error["line"]) for error in batch["errors"]["data"]] == expected
        duplicate = next(error for error in batch["errors"]["data"] if error["code"] == "duplicate_custom_id")
        assert "1" in re.findall(r"line (\d+)", duplicate["message"])
        lines = await one.content(batch["error_file_id"])
        assert [(line["error"]["code"], line["line"]) for line in lines] == [(code, line) for code, _, line in expected]
        assert all(line["response"] is None for line in lines)
        assert lines[6]["custom_id"] == "same"


async def test_an_empty_file_is_reported(start: Any) -> None:
    async with start() as one:
        batch = await one.batch(b"\n \n")
        assert [error["code"] for error in batch["errors"]["data"]] == ["empty_file"]


async def test_lines_split_on_line_feeds_only_and_bodies_are_never_rewritten(start: Any) -> None:
    body = '{"model" : "m",\t"messages":[{"role":"user","content":"a\u2028b \u0085"}],"n":null, "x": 1.50e+2}'
    line = '{"custom_id":"größe","method":"POST","url":"/v1/chat/completions","body":' + body + "}"
    async with start() as one:
        data = b"\xef\xbb\xbf" + line.encode() + b"\r\n\n"
        batch = await one.batch(data)
        ended = await one.until(batch["id"])
        assert ended["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
        downloaded = await one.rig.ask("GET", f"/v1/files/{batch['input_file_id']}/content")
        assert downloaded.body == data


async def test_every_allowed_url_is_accepted_whatever_the_endpoint_says(start: Any) -> None:
    async with start() as one:
        lines = [
            json.dumps({"custom_id": str(i), "method": "POST", "url": url, "body": {"model": f"m{i}", "input": "x"}})
            for i, url in enumerate(URLS)
        ]
        batch = await one.batch("\n".join(lines).encode())
        assert (batch["status"], batch["errors"], batch["model"]) == ("validating", None, None)
        assert batch["request_counts"]["total"] == len(URLS)


# Batches


async def test_the_batch_object(start: Any) -> None:
    async with start() as one:
        batch = await one.batch(chat_file(2), metadata={"a": "b"})
        assert list(batch) == BATCH_KEYS
        assert re.fullmatch(r"batch_[0-9a-f]{32}", batch["id"])
        assert (batch["object"], batch["endpoint"], batch["completion_window"]) == (
            "batch",
            "/v1/chat/completions",
            "24h",
        )
        assert (batch["metadata"], batch["model"], batch["errors"]) == ({"a": "b"}, "m", None)
        assert batch["expires_at"] == batch["created_at"] + 86_400
        assert re.fullmatch(r"file-[0-9a-f]{32}", batch["output_file_id"])  # early access
        assert batch["error_file_id"] is None
        ended = await one.until(batch["id"])
        assert ended["usage"]["total_tokens"] == ended["usage"]["input_tokens"] + ended["usage"]["output_tokens"] > 0
        assert ended["usage"]["input_tokens_details"] == {"cached_tokens": 0}
        assert list(ended["usage"]["output_tokens_details"]) == ["reasoning_tokens"]
        assert (await one.batch(chat_file(1)))["metadata"] == {}


async def test_post_batches_checks_every_field(start: Any) -> None:
    async with start() as one:
        file = (await one.rig.upload(chat_file(1)))["id"]
        is_error(await one.rig.create(f"file-{UNKNOWN}"), 404, "input_file_id")
        many = {str(i): "x" for i in range(17)}
        metadata: Any
        for metadata in (many, {"k" * 65: "v"}, {"k": "v" * 513}, {"k": 1}, [], "x"):
            is_error(await one.rig.create(file, metadata=metadata), 400)
        for expiry in ({"anchor": "created_at", "seconds": 3599}, {"anchor": "x", "seconds": 3600}, 3600, {}):
            is_error(await one.rig.create(file, output_expires_after=expiry), 400)
        for missing in ("input_file_id", "endpoint", "completion_window"):
            is_error(await one.rig.create(file, **{missing: None}), 400, missing)


async def test_idempotency_key_on_batches_and_files(start: Any) -> None:
    async with start() as one:
        data, headers = chat_file(1), {"Idempotency-Key": "one"}
        files = []
        for boundary in ("one", "two"):
            answer = await one.rig.ask(
                "POST",
                "/v1/files",
                data=form(file_part(data), boundary=boundary),
                headers=headers | {"Content-Type": f"multipart/form-data; boundary={boundary}"},
            )
            files.append(answer.json["id"])
        assert files[0] == files[1]
        body = {"input_file_id": files[0], "endpoint": "/v1/completions", "completion_window": "1h"}
        first = await one.rig.ask("POST", "/v1/batches", json=body, headers=headers)
        again = await one.rig.ask("POST", "/v1/batches", json=body, headers=headers)
        assert first.json["id"] == again.json["id"]
        other = await one.rig.ask("POST", "/v1/batches", json=body | {"completion_window": "24h"}, headers=headers)
        is_error(other, 409)
        fresh = {"Idempotency-Key": "two"}
        is_error(await one.rig.ask("POST", "/v1/batches", json=body | {"endpoint": "/x"}, headers=fresh), 400)
        retried = await one.rig.ask("POST", "/v1/batches", json=body, headers=fresh)  # a refused try is not remembered
        assert retried.status == 200
        assert retried.json["id"] != first.json["id"]


async def test_windows_by_configuration_are_echoed_as_sent_and_end(start: Any) -> None:
    async with start(windows=("24h", "2s")) as one:
        data = chat_line("slow", "[[simulate stall]]") + chat_line("quick", "hello")
        batch = await one.batch(data, completion_window="2s")
        assert (batch["completion_window"], batch["expires_at"]) == ("2s", batch["created_at"] + 2)
        ended = await one.until(batch["id"])
        assert (ended["status"], ended["expired_at"] is not None, ended["completed_at"]) == ("expired", True, None)
        assert ended["request_counts"] == {"total": 2, "completed": 1, "failed": 0}
        assert [line["custom_id"] for line in await one.content(ended["output_file_id"])] == ["quick"]
        (error,) = await one.content(ended["error_file_id"])
        assert (error["custom_id"], error["response"], error["error"]["code"]) == ("slow", None, "batch_expired")


async def test_prefer_wait_holds_the_answer_until_something_changed(start: Any) -> None:
    async with start() as one:
        batch = await one.batch(chat_line("a", "[[simulate stall]]"))
        await one.until(batch["id"], "in_progress")
        waiting = asyncio.create_task(one.rig.ask("GET", f"/v1/batches/{batch['id']}", headers={"Prefer": "wait=600"}))
        await one.rig.ask("GET", "/healthz")
        assert not waiting.done()
        await one.rig.ask("POST", f"/v1/batches/{batch['id']}/cancel")
        answer = await asyncio.wait_for(waiting, 20)
        assert answer.json["status"] in ("cancelling", "cancelled")
        assert answer.headers["preference-applied"] == "wait=60"
        await one.until(batch["id"])
        done = await one.rig.ask("GET", f"/v1/batches/{batch['id']}", headers={"Prefer": "wait=60"})
        assert done.json["status"] == "cancelled"  # a terminal batch answers at once


async def test_get_batches_newest_first_with_cursor_and_filters(start: Any) -> None:
    async with start() as one:
        file = (await one.rig.upload(chat_file(1)))["id"]
        bad = (await one.rig.upload(b"bad\n"))["id"]
        made = [(await one.rig.create(one_of)).json["id"] for one_of in (file, bad, file, bad)]
        await one.until(made[0])
        await one.until(made[2])
        stuck = (await one.batch(chat_line("a", "[[simulate stall]]")))["id"]
        last = (await one.rig.create(bad)).json["id"]

        async def ids(query: str) -> list[str]:
            return [batch["id"] for batch in (await one.rig.ask("GET", f"/v1/batches?{query}")).json["data"]]

        everything = [*made, stuck, last][::-1]
        assert await ids("") == everything
        assert await ids(f"limit=2&after={everything[1]}") == everything[2:4]
        assert await ids("status=completed") == [made[2], made[0]]
        assert (await ids("active_first=true"))[0] == stuck
        assert await ids(f"created_after={int(time.time()) + 100}") == []
        assert await ids(f"created_before={int(time.time()) + 100}") == everything
        for query in ("limit=0", "limit=101", "after=batch_unknown", f"after=batch_{UNKNOWN}", "status=done"):
            is_error(await one.rig.ask("GET", f"/v1/batches?{query}"), 400)
        await one.rig.ask("POST", f"/v1/batches/{stuck}/cancel")
        await one.until(stuck)


async def test_cancel_keeps_what_is_finished_and_may_be_repeated(start: Any) -> None:
    async with start() as one:
        batch = await one.batch(chat_line("slow", "[[simulate stall]]") + chat_line("quick", "hello"))

        wait = {"Prefer": "wait=20"}
        while (await one.get(batch["id"]))["request_counts"]["completed"] == 0:
            await one.rig.ask("GET", f"/v1/batches/{batch['id']}", headers=wait)
        cancelled = await one.rig.ask("POST", f"/v1/batches/{batch['id']}/cancel")
        assert (cancelled.status, cancelled.json["status"]) == (200, "cancelling")
        assert cancelled.json["cancelling_at"] is not None
        assert (await one.rig.ask("POST", f"/v1/batches/{batch['id']}/cancel")).status == 200
        ended = await one.until(batch["id"])
        assert (ended["status"], ended["request_counts"]) == ("cancelled", {"total": 2, "completed": 1, "failed": 0})
        assert len(await one.content(ended["output_file_id"])) == 1
        assert [line["error"]["code"] for line in await one.content(ended["error_file_id"])] == ["batch_cancelled"]
        assert (await one.rig.ask("POST", f"/v1/batches/{batch['id']}/cancel")).json["status"] == "cancelled"


async def test_retry_and_results(start: Any) -> None:
    async with start() as one:
        batch = await one.batch(chat_line("a", "[[simulate status=400 times=1]]") + chat_line("b", "hello"))
        is_error(await one.retry(batch["id"]), 409)
        first = await one.until(batch["id"])
        assert [line["status"] for line in await one.results(batch["id"])] == ["failed", "completed"]
        assert (await one.retry(batch["id"])).json["status"] == "validating"
        second = await one.until(batch["id"])
        assert (second["id"], second["output_file_id"]) == (first["id"], first["output_file_id"])
        assert [line["custom_id"] for line in await one.content(second["output_file_id"])] == ["b", "a"]
        assert len(await one.content(first["error_file_id"])) == 1
        lines = await one.results(batch["id"])
        assert [(line["custom_id"], line["line"], line["status"]) for line in lines] == [
            ("a", 1, "completed"),
            ("b", 2, "completed"),
        ]
        assert all(set(line) >= {"response", "error", "attempts"} for line in lines)
        is_error(await one.retry(batch["id"]), 400)


async def test_delete_cancels_first(start: Any) -> None:
    async with start() as one:
        batch = await one.batch(chat_line("slow", "[[simulate stall]]"))
        await one.until(batch["id"], "in_progress")
        answer = await one.rig.ask("DELETE", f"/v1/batches/{batch['id']}")
        assert (answer.status, answer.body) == (204, b"")
        is_error(await one.rig.ask("GET", f"/v1/batches/{batch['id']}"), 404)
        assert (await one.rig.ask("GET", "/v1/batches")).json["data"] == []
        await until(lambda: not one.simulator.stats().in_flight, 20)


# Status


async def test_completed_and_failed(start: Any) -> None:
    async with start() as one:
        mixed = await one.until(
            (await one.batch(chat_line("a", "x") + chat_line("b", "[[simulate status=400]]")))["id"]
        )
        assert mixed["status"] == "completed"
        assert [mixed[stamp] is not None for stamp in ("in_progress_at", "finalizing_at", "completed_at")] == [True] * 3
        nothing = await one.until((await one.batch(chat_line("a", "[[simulate status=400]]")))["id"])
        assert (nothing["status"], nothing["request_counts"]["failed"]) == ("failed", 1)
        assert len(await one.content(nothing["error_file_id"])) == 1
        for batch in (mixed, nothing):
            stamps = ("completed_at", "failed_at", "expired_at", "cancelled_at")
            assert sum(batch[stamp] is not None for stamp in stamps) == 1


# Result lines


async def test_result_lines(start: Any) -> None:
    async with start() as one:
        ended = await one.until(
            (await one.batch(chat_line("a", "x") + chat_line("b", "[[simulate status=418]]")))["id"]
        )
        (good,) = await one.content(ended["output_file_id"])
        assert list(good) == ["id", "custom_id", "response", "error"]
        assert good["id"].startswith("batch_req_")
        assert list(good["response"]) == ["status_code", "request_id", "body"]
        assert (good["response"]["status_code"], good["error"]) == (200, None)
        (bad,) = await one.content(ended["error_file_id"])
        assert (bad["response"]["status_code"], list(bad["error"])) == (418, ["code", "message"])
        assert bad["response"]["body"]["error"]["message"] == bad["error"]["message"]


async def test_an_answer_that_is_no_json_is_final_and_an_error_page_is_kept_raw(start: Any) -> None:
    async with start() as one:
        data = chat_line("a", "[[simulate malformed]]") + chat_line("b", "[[simulate html=404]]")
        ended = await one.until((await one.batch(data))["id"])
        lines = {line["custom_id"]: line for line in await one.content(ended["error_file_id"])}
        assert lines["a"]["error"]["code"] == "invalid_upstream_response"
        assert list(lines["b"]["response"]["body"]) == ["raw"]


# Growing files


async def test_a_growing_file_resumes_by_line(start: Any) -> None:
    async with start() as one:
        data = chat_line("slow", "[[simulate stall]]") + chat_file(20)
        batch = await one.batch(data)
        path = f"/v1/files/{batch['output_file_id']}/content"
        seen = b""
        while seen.count(b"\n") < 20:
            answer = await one.rig.ask("GET", f"{path}?offset={len(seen.splitlines())}")
            seen += answer.body
            assert answer.headers["content-type"].startswith("application/x-ndjson")
            assert answer.headers["x-last-line"] == str(len(seen.splitlines()))
            assert answer.headers["x-incomplete"] == "true"
        page = await one.rig.ask("GET", f"{path}?skip=5&limit=3")
        assert page.body == b"".join(seen.splitlines(keepends=True)[5:8])
        assert page.headers["x-last-line"] == "8"
        is_error(await one.rig.ask("GET", f"{path}?skip=1&offset=2"), 400)
        is_error(await one.rig.ask("GET", f"{path}?limit=0"), 400)
        beyond = await one.rig.ask("GET", f"{path}?offset=99")
        assert (beyond.body, beyond.headers["x-last-line"]) == (b"", "20")
        await one.rig.ask("POST", f"/v1/batches/{batch['id']}/cancel")
        await one.until(batch["id"])
        complete = await one.rig.ask("GET", path)
        assert (complete.body, complete.headers["x-last-line"], complete.headers["x-incomplete"]) == (
            seen,
            "20",
            "false",
        )
        cut = await one.rig.ask("GET", f"{path}?limit=3")
        assert (cut.headers["x-last-line"], cut.headers["x-incomplete"]) == ("3", "true")


async def test_complete_files_support_etag_range_and_compression(start: Any) -> None:
    async with start() as one:
        data = chat_file(100)
        path = f"/v1/files/{(await one.rig.upload(data))['id']}/content"
        plain = await one.rig.ask("GET", path, headers={"Accept-Encoding": "identity"})
        assert plain.body == data
        known = {"If-None-Match": plain.headers["etag"], "Accept-Encoding": "identity"}
        same = await one.rig.ask("GET", path, headers=known)
        assert (same.status, same.body, same.headers["x-last-line"]) == (304, b"", "100")
        part = await one.rig.ask("GET", path, headers={"Range": "bytes=5-9"})
        assert (part.status, part.body) == (206, data[5:10])
        assert part.headers["content-range"] == f"bytes 5-9/{len(data)}"
        assert part.headers["x-last-line"] == "100"
        for coding in ("gzip", "zstd"):
            answer = await one.rig.ask("GET", path, headers={"Accept-Encoding": coding})
            assert answer.headers["content-encoding"] == coding
            assert "accept-encoding" in answer.headers["vary"].lower()
            assert answer.body == data  # the client has undone it


async def test_models(start: Any) -> None:
    async with start() as one:
        listed = (await one.rig.ask("GET", "/v1/models")).json
        assert listed["object"] == "list"
        # The worker beside it may have told already what the simulator lists.
        listed["data"] = [model for model in listed["data"] if model["id"] != "simulated"]
        assert [(model["id"], model["object"]) for model in listed["data"]] == [("m", "model")]


async def test_models_of_workers_elsewhere(start: Any) -> None:
    """Only what their upstreams have listed, and of those that still live."""

    def told(*served: list[str] | None) -> workers.Snapshot:
        return workers.Snapshot(upstreams=[workers.UpstreamSnapshot(served=each) for each in served])

    async with start() as one:
        now = time.time()
        async with one.rig.context.database.write() as connection:
            for letter in "abc":
                row = workers.WorkerRow(
                    id=letter * 32, host="h", pid=2**22, version="1", started_at=now, heartbeat_at=now
                )
                await workers.insert(connection, row)
            await workers.beat(connection, "a" * 32, now - 1, 0.0, told(["z", "m"], None, [], ["x"]))
            await workers.beat(connection, "b" * 32, now - 3_600, 0.0, told(["gone"]))
        listed = (await one.rig.ask("GET", "/v1/models")).json
        found = [model["id"] for model in listed["data"]]
        assert found[0] == "m"
        assert found[1:] == sorted({"x", "z", *found[1:]}), "each once, whatever the worker here lists"
        assert "gone" not in found
