"""`POST /v1/batches/validate`: what would become of a batch, and that nothing does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa

from batchery.server.openapi import document
from batchery.store import schema, workers
from batchery.store.ids import new_id
from batchery.store.workers import WorkerRow
from batchery.wire.lines import MAX_PROBLEMS, Limits
from batchery.wire.prices import parse_prices
from tests.requests import chat_file, chat_line
from tests.server.keys import bearing, make_key
from tests.server.rig import Answer, Rig, running
from tests.store.examples import add_batch
from tests.wire.examples import request

NOW = 1_700_000_000
PRICES = parse_prices({"m": {"input": 1, "output": 10, "1h": {"input": 2, "output": 20}}})
BAD = chat_line("a", "one") + b"{\n" + chat_line("a", "two") + chat_line("b", "three")


@pytest.fixture
async def priced(database_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    """A server that knows a price, at a time that stands still."""
    async with running(database_url, tmp_path, prices=PRICES, clock=lambda: NOW + 0.5) as rig:
        yield rig


async def ask(rig: Rig, file: str, **more: Any) -> Answer:
    return await rig.ask("POST", "/v1/batches/validate", json={"input_file_id": file} | more)


async def validation(rig: Rig, file: str, **more: Any) -> dict[str, Any]:
    answer = await ask(rig, file, **more)
    assert answer.status == 200, answer
    found: dict[str, Any] = answer.json
    return found


async def add(rig: Rig, **values: Any) -> None:
    async with rig.context.database.write() as connection:
        await add_batch(connection, **values)


async def add_worker(rig: Rig, rate: float, silent: float = 0.0) -> None:
    async with rig.context.database.write() as connection:
        seen = NOW - silent
        row = WorkerRow(id=new_id(), host="h", pid=1, version="1", started_at=seen, heartbeat_at=seen, rate=rate)
        await workers.insert(connection, row)


async def everything(rig: Rig) -> dict[str, list[Any]]:
    """Every row of every table."""
    async with rig.context.database.read() as connection:
        return {
            table.name: sorted(map(repr, await connection.execute(sa.select(table))))
            for table in schema.metadata.sorted_tables
        }


async def test_a_good_file(priced: Rig) -> None:
    lines = [request(str(i)) for i in range(3)]
    other = request("other", "n").replace(b"chat/completions", b"embeddings")
    file = await priced.upload(b"\n".join([*lines, other]))
    before, blobs = await everything(priced), priced.left_behind()
    size = sum(map(len, lines))
    assert await validation(priced, file["id"]) == {
        "object": "batch.validation",
        "input_file_id": file["id"],
        "valid": True,
        "runnable": True,
        "errors": None,
        "error_count": 0,
        "request_counts": {"total": 4},
        "groups": [
            {
                "model": "m",
                "endpoint": "/v1/chat/completions",
                "requests": 3,
                "bytes": size,
                "estimated_input_tokens": round(size / 4),
                "estimated_output_tokens": 768,
                "estimate_basis": "default",
                "estimated_cost": round((round(size / 4) + 7680) / 1e6, 6),
            },
            {
                "model": "n",
                "endpoint": "/v1/embeddings",
                "requests": 1,
                "bytes": len(other),
                "estimated_input_tokens": round(len(other) / 4),
                "estimated_output_tokens": 0,
                "estimate_basis": "none",
                "estimated_cost": None,
            },
        ],
        "estimated_input_tokens": round(size / 4) + round(len(other) / 4),
        "estimated_output_tokens": 768,
        "estimate_basis": "default",
        "estimated_cost": None,
        "currency": "USD",
        "completion_window": "24h",
        "expires_at_if_created_now": NOW + 86_400,
        "load": {"queued_requests": 0, "requests_per_second": None},
        "estimated_completion_at": None,
    }
    assert await everything(priced) == before
    assert priced.left_behind() == blobs
    assert priced.wakes == []


async def test_a_file_with_bad_lines_would_run_only_without_them(priced: Rig) -> None:
    file = await priced.upload(BAD)
    strict = await validation(priced, file["id"])
    assert (strict["valid"], strict["runnable"], strict["error_count"]) == (False, False, 2)
    assert strict["request_counts"] == {"total": 2}
    assert [group["requests"] for group in strict["groups"]] == [2]
    assert await validation(priced, file["id"], on_invalid_line="fail") == strict
    lenient = await validation(priced, file["id"], on_invalid_line="skip")
    assert (lenient["valid"], lenient["runnable"], lenient["errors"]) == (False, True, strict["errors"])

    failed = (await priced.create(file["id"])).json
    assert (failed["status"], failed["errors"]) == ("failed", strict["errors"])
    assert strict["errors"]["object"] == "list"
    assert [(error["code"], error["line"]) for error in strict["errors"]["data"]] == [
        ("invalid_json_line", 2),
        ("duplicate_custom_id", 3),
    ]
    skipping = (await priced.create(file["id"], on_invalid_line="skip")).json
    assert (skipping["status"], skipping["request_counts"]["total"]) == ("validating", 4)


async def test_every_bad_line_counts_also_where_not_all_are_told(either: Rig) -> None:
    file = await either.upload(b"{\n" * (MAX_PROBLEMS + 7) + chat_line("a", "x") * (MAX_PROBLEMS + 9))
    found = await validation(either, file["id"], on_invalid_line="skip")
    bad = 2 * MAX_PROBLEMS + 15
    assert (len(found["errors"]["data"]), found["error_count"]) == (MAX_PROBLEMS, bad)
    assert found["runnable"]
    created = (await either.create(file["id"], on_invalid_line="skip")).json
    async with either.context.database.read() as connection:
        row = (await connection.execute(sa.select(schema.batches.c.total, schema.batches.c.invalid))).one()
    assert tuple(row) == (bad + 1, bad)
    assert created["request_counts"]["total"] == bad + 1


async def test_files_that_cannot_run_in_any_way(database_url: str, tmp_path: Path) -> None:
    async with running(database_url, tmp_path, limits=Limits(requests=2)) as rig:
        for data, code, count in (
            (b"\n", "empty_file", 1),
            (chat_file(3), "too_many_requests_in_file", 1),
            (b"{\n" + chat_file(2), "too_many_requests_in_file", 2),
        ):
            file = await rig.upload(data)
            found = await validation(rig, file["id"], on_invalid_line="skip")
            assert (found["valid"], found["runnable"]) == (False, False)
            assert (found["errors"]["data"][-1]["code"], found["error_count"]) == (code, count)
            assert found["estimated_completion_at"] is None
            assert (await rig.create(file["id"], on_invalid_line="skip")).json["status"] == "failed"
        bad = await rig.upload(b"{\n[")
        found = await validation(rig, bad["id"], on_invalid_line="skip")
        assert (found["runnable"], found["request_counts"], found["groups"]) == (True, {"total": 0}, [])
        assert (found["estimated_input_tokens"], found["estimate_basis"], found["estimated_cost"]) == (0, "none", 0.0)


async def test_windows_and_what_they_cost(priced: Rig) -> None:
    file = (await priced.upload(chat_file(10)))["id"]
    day = await validation(priced, file, completion_window="24h", endpoint="/v1/embeddings")
    hour = await validation(priced, file, completion_window="1h")
    assert await validation(priced, file, completion_window=None, endpoint=None, on_invalid_line=None) == day
    assert (hour["completion_window"], hour["expires_at_if_created_now"]) == ("1h", NOW + 3600)
    assert day["estimated_cost"] == day["groups"][0]["estimated_cost"]
    assert hour["estimated_cost"] == pytest.approx(2 * day["estimated_cost"])
    assert day["estimated_cost"] == (day["estimated_input_tokens"] + 10 * day["estimated_output_tokens"]) / 1e6


async def test_output_is_estimated_from_the_owners_own_batches(priced: Rig) -> None:
    file = (await priced.upload(chat_file(10)))["id"]
    told = {"model": "m", "status": "completed"}
    await add(priced, **told | {"owner": "somebody"}, completed=10, output_tokens=10_000)
    await add(priced, **told | {"model": None}, completed=10, output_tokens=10_000)
    await add(priced, **told | {"model": "n"}, completed=10, output_tokens=10_000)
    await add(priced, **told | {"status": "in_progress"}, completed=10, output_tokens=10_000)
    await add(priced, **told, completed=10, output_tokens=0)  # an upstream that does not count
    await add(priced, **told, completed=0, output_tokens=0, failed=10)
    found = await validation(priced, file)
    assert (found["estimate_basis"], found["estimated_output_tokens"]) == ("default", 2560)
    await add(priced, **told, completed=3, output_tokens=30)
    await add(priced, **told, completed=1, output_tokens=50)
    found = await validation(priced, file)
    assert (found["estimate_basis"], found["estimated_output_tokens"]) == ("history", 200)
    assert found["groups"][0]["estimate_basis"] == "history"
    for _ in range(20):
        await add(priced, **told, completed=2, output_tokens=14)
    assert (await validation(priced, file))["estimated_output_tokens"] == 70  # the older ones count no more


async def test_load_is_what_is_due_no_later(priced: Rig) -> None:
    file = (await priced.upload(chat_file(10)))["id"]
    running_batch = {"total": 100, "completed": 20, "failed": 10}
    await add(priced, **running_batch, expires_at=NOW + 3600)
    await add(priced, **running_batch, expires_at=NOW + 3601, owner="somebody")
    await add(priced, **running_batch, expires_at=NOW + 86_401)
    await add(priced, total=50, expires_at=NOW + 9, status="validating", invalid=30, skip_invalid=True)
    for status in ("cancelling", "finalizing", "completed", "cancelled", "expired", "failed"):
        await add(priced, **running_batch, expires_at=NOW + 10, status=status)
    hour = await validation(priced, file, completion_window="1h")
    day = await validation(priced, file, completion_window="24h")
    assert (hour["load"]["queued_requests"], day["load"]["queued_requests"]) == (70 + 20, 140 + 20)


async def test_when_it_would_be_done(priced: Rig) -> None:
    file = (await priced.upload(chat_file(10)))["id"]
    bad = (await priced.upload(BAD))["id"]
    await add(priced, total=100, expires_at=NOW + 60)

    async def told() -> tuple[Any, Any]:
        found = await validation(priced, file)
        return found["load"]["requests_per_second"], found["estimated_completion_at"]

    await add_worker(priced, 0.0)
    assert await told() == (None, None)
    ended = {"status": "completed", "in_progress_at": NOW - 100, "completed": 8, "failed": 2}
    await add(priced, **ended | {"in_progress_at": None}, finalizing_at=NOW)
    await add(priced, **ended, finalizing_at=None)
    await add(priced, **ended | {"status": "in_progress"}, finalizing_at=NOW - 99)
    assert await told() == (None, None)
    await add(priced, **ended | {"invalid": 2}, finalizing_at=NOW - 98)
    assert await told() == (4.0, NOW + 28)  # 110 requests
    await add(priced, **ended, finalizing_at=NOW - 100, owner="somebody")
    assert await told() == (7.0, NOW + 16)
    await add_worker(priced, 30.0)
    await add_worker(priced, 25.0)
    await add_worker(priced, 1000.0, silent=11)
    assert await told() == (55.0, NOW + 2)
    assert (await validation(priced, bad))["estimated_completion_at"] is None
    assert (await validation(priced, bad, on_invalid_line="skip"))["estimated_completion_at"] == NOW + 2


async def test_a_server_that_stands_still(priced: Rig) -> None:
    """A rate that has faded to almost nothing says no more than none."""
    file = (await priced.upload(chat_file(10)))["id"]
    await add_worker(priced, 5e-324)
    found = await validation(priced, file)
    assert (found["load"]["requests_per_second"], found["estimated_completion_at"]) == (None, None)


async def test_a_file_from_before_groups_were_counted(either: Rig) -> None:
    file = (await either.upload(chat_file(3)))["id"]
    async with either.context.database.write() as connection:
        await connection.execute(sa.update(schema.files).values(groups=None))
    found = await validation(either, file)
    assert (found["valid"], found["runnable"], found["request_counts"]) == (True, True, {"total": 3})
    nothing = (
        "groups",
        "estimated_input_tokens",
        "estimated_output_tokens",
        "estimate_basis",
        "estimated_cost",
    )
    assert [found[name] for name in nothing] == [None] * 5


async def test_many_models_and_urls(rig: Rig) -> None:
    urls = ("chat/completions", "completions", "embeddings", "responses")
    lines = [
        request(f"{i}-{url}", "é" * 250 + str(i)).replace(b"chat/completions", url.encode())
        for i in range(1_000)
        for url in urls
    ]
    found = await validation(rig, (await rig.upload(b"\n".join(lines)))["id"])
    assert len(found["groups"]) == 4_000
    assert sum(group["bytes"] for group in found["groups"]) == sum(map(len, lines))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": ""}, "input_file_id"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"endpoint": ""}, "endpoint"),
        ({"endpoint": "/v1/other"}, "endpoint"),
        ({"endpoint": ["/v1/embeddings"]}, "endpoint"),
        ({"completion_window": ""}, "completion_window"),
        ({"completion_window": "2h"}, "completion_window"),
        ({"completion_window": 24}, "completion_window"),
        ({"completion_window": "1h\u0000"}, "completion_window"),
        ({"on_invalid_line": "ignore"}, "on_invalid_line"),
        ({"on_invalid_line": True}, "on_invalid_line"),
    ],
)
async def test_bodies_that_are_refused(rig: Rig, changes: dict[str, Any], param: str) -> None:
    file = (await rig.upload(chat_file(1)))["id"]
    answer = await ask(rig, file, **changes)
    assert (answer.status, answer.error()["param"]) == (400, param)
    body = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "1h"} | changes
    same = await rig.ask("POST", "/v1/batches", json=body)
    assert same.json == answer.json


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"input_file_id":"a","input_file_id":"b"}', b"\xff"])
async def test_bodies_that_are_no_object(rig: Rig, body: bytes) -> None:
    answer = await rig.ask("POST", "/v1/batches/validate", data=body)
    assert answer.status == 400
    assert answer.error()["type"] == "invalid_request_error"


async def test_a_body_that_is_too_large(rig: Rig) -> None:
    answer = await rig.ask("POST", "/v1/batches/validate", data=json.dumps({"x": "x" * 2_000_000}).encode())
    assert answer.status == 413
    answer.error()


async def test_files_that_do_not_exist_for_the_caller(either: Rig) -> None:
    mine, theirs = await make_key(either.context, "me"), await make_key(either.context, "them")

    async def told(id: str, key: str = mine) -> Answer:
        return await either.ask("POST", "/v1/batches/validate", json={"input_file_id": id}, headers=bearing(key))

    uploaded = aiohttp.FormData()
    uploaded.add_field("file", chat_file(1), filename="input.jsonl")
    answer = await either.ask("POST", "/v1/files", data=uploaded, headers=bearing(theirs))
    assert answer.status == 200, answer
    file = answer.json["id"]
    assert (await told(file, theirs)).status == 200
    missing = "file-" + "0" * 32
    refusals = [await told(id) for id in (file, missing, "nonsense", "file-" + "x" * 500, "batch_" + "0" * 32)]
    assert [refusal.status for refusal in refusals] == [404] * 5
    assert {refusal.error()["param"] for refusal in refusals} == {"input_file_id"}
    foreign, absent = refusals[0].error()["message"], refusals[1].error()["message"]
    assert foreign.replace(file, "") == absent.replace(missing, "")
    async with either.context.database.write() as connection:
        await connection.execute(sa.update(schema.files).values(expires_at=1))
    assert (await told(file, theirs)).status == 404


async def test_the_result_of_a_batch_is_no_input(rig: Rig) -> None:
    batch = (await rig.create((await rig.upload(chat_file(1)))["id"])).json
    answer = await ask(rig, batch["output_file_id"])
    assert answer.status == 400
    assert "batch_output" in answer.error()["message"]


async def test_it_is_what_the_document_says(rig: Rig) -> None:
    found = await validation(rig, (await rig.upload(BAD))["id"])
    schemas = document()["components"]["schemas"]
    for shown, name in ((found, "BatchValidation"), (found["groups"][0], "GroupEstimate"), (found["load"], "Load")):
        assert set(shown) == set(schemas[name]["properties"])
    operation = document()["paths"]["/v1/batches/validate"]["post"]
    assert operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/BatchValidation")
    assert set(schemas["ValidateBatch"]["properties"]) == {
        "input_file_id",
        "endpoint",
        "completion_window",
        "on_invalid_line",
    }


async def test_it_is_no_batch(rig: Rig) -> None:
    """The name of the route is not taken for an id, nor an id for it."""
    answer = await rig.ask("GET", "/v1/batches/validate")
    assert answer.status in (404, 405)
    answer.error()
    file = (await rig.upload(chat_file(1)))["id"]
    answer = await rig.ask("POST", "/ai/v1/batches/validate", json={"input_file_id": file})
    assert (answer.status, answer.json["runnable"]) == (200, True)
