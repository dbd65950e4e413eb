"""Batches: creating, listing, getting and cancelling, by the official client and by hand."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchery.store import batches, files
from batchery.store.schema import ENDED, LIVE
from tests.requests import chat_file, chat_line
from tests.server.rig import Rig
from tests.store.examples import add_batch

GOOD = chat_file(3)
BAD = chat_line("ok", "x") + b"nonsense\n" + b'{"custom_id":"no-body","method":"POST","url":"/v1/embeddings"}\n'


async def test_the_official_client_creates_finds_and_cancels(either: Rig) -> None:
    client = either.openai
    file = await client.files.create(file=GOOD, purpose="batch")
    made = await client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"job": "one"},
    )
    assert made.status == "validating"
    assert made.model == "m"
    assert made.errors is None
    assert made.error_file_id is None
    assert made.usage is None
    assert made.expires_at == made.created_at + 86_400
    assert made.request_counts is not None
    assert made.request_counts.model_dump() == {"total": 3, "completed": 0, "failed": 0}
    assert len(either.wakes) == 1
    assert await client.batches.retrieve(made.id) == made

    early = await client.files.content(made.output_file_id or "")
    assert early.content == b""
    assert (early.response.headers["x-incomplete"], early.response.headers["x-last-line"]) == ("true", "0")

    cancelled = await client.batches.cancel(made.id)
    assert cancelled.status == "cancelling"
    assert cancelled.cancelling_at is not None
    assert len(either.wakes) == 2
    assert (await client.batches.cancel(made.id)) == cancelled
    assert len(either.wakes) == 2


async def test_a_batch_has_every_field_in_the_order_of_the_contract(rig: Rig) -> None:
    uploaded = await rig.upload(GOOD)
    batch = (await rig.create(uploaded["id"])).json
    assert list(batch) == [
        *("id", "object", "endpoint", "model", "errors", "input_file_id", "completion_window", "status"),
        *("output_file_id", "error_file_id", "created_at", "in_progress_at", "expires_at", "finalizing_at"),
        *("completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at", "request_counts", "usage"),
        "estimated_completion_at",
        "deduplicated",
        "metadata",
    ]
    assert batch["metadata"] == {}
    assert batch["object"] == "batch"


async def test_the_row_is_what_the_planner_expects(either: Rig) -> None:
    uploaded = await either.upload(GOOD)
    answer = await either.create(
        uploaded["id"].removeprefix("file-"),
        completion_window="1h",
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    async with either.context.database.read() as connection:
        row = await batches.get(connection, answer.json["id"].removeprefix("batch_"))
        assert row is not None
        input_file = await files.get(connection, row.input_file)
        output = await files.get(connection, row.output_file)
    assert input_file is not None
    assert output is not None
    assert (row.status, row.total, row.has_log) == ("validating", 3, True)
    assert input_file.index_key in either.left_behind()
    assert (row.window, row.expires_at, row.output_expires_after) == ("1h", row.created_at + 3600, 3600)
    assert (output.purpose, output.blob_key, output.batch_id) == ("batch_output", None, row.id)


async def test_mixed_models_have_no_one_model(rig: Rig) -> None:
    uploaded = await rig.upload(chat_line("a", "x", model="m1") + chat_line("b", "x", model="m2"))
    assert (await rig.create(uploaded["id"])).json["model"] is None


async def test_a_batch_over_a_bad_file_has_failed_and_says_why(either: Rig) -> None:
    uploaded = await either.upload(BAD)
    assert uploaded["status"] == "error"
    answer = await either.create(uploaded["id"], output_expires_after={"anchor": "created_at", "seconds": 7200})
    assert answer.status == 200
    batch = answer.json
    assert batch["status"] == "failed"
    assert batch["failed_at"] == batch["created_at"]
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert batch["errors"]["object"] == "list"
    assert [(error["code"], error["line"]) for error in batch["errors"]["data"]] == [
        ("invalid_json_line", 2),
        ("missing_required_parameter", 3),
    ]
    assert [list(error) for error in batch["errors"]["data"]] == [["code", "message", "param", "line"]] * 2
    assert (await either.ask("GET", f"/v1/batches/{batch['id']}")).json == batch

    errors = await either.ask("GET", f"/v1/files/{batch['error_file_id']}/content")
    assert (errors.headers["x-last-line"], errors.headers["x-incomplete"]) == ("2", "false")
    lines = [json.loads(line) for line in errors.body.splitlines()]
    assert [(line["custom_id"], line["response"], line["line"]) for line in lines] == [
        (None, None, 2),
        ("no-body", None, 3),
    ]
    assert len({line["id"] for line in lines}) == 2
    output = await either.ask("GET", f"/v1/files/{batch['output_file_id']}/content")
    assert (output.status, output.body) == (200, b"")
    assert (output.headers["x-last-line"], output.headers["x-incomplete"]) == ("0", "false")
    for id in (batch["output_file_id"], batch["error_file_id"]):
        assert (await either.ask("GET", f"/v1/files/{id}")).json["expires_at"] == batch["created_at"] + 7200
    assert either.wakes == []
    assert (await either.ask("POST", f"/v1/batches/{batch['id']}/cancel")).status == 409
    for id in (uploaded["id"], batch["output_file_id"], batch["error_file_id"]):
        assert (await either.ask("DELETE", f"/v1/files/{id}")).status == 200
    assert either.left_behind() == []


async def test_every_bad_line_up_to_a_thousand_is_said(rig: Rig) -> None:
    uploaded = await rig.upload(b"nonsense\n" * 1_200)
    batch = (await rig.create(uploaded["id"])).json
    assert [error["line"] for error in batch["errors"]["data"]] == list(range(1, 1_001))
    errors = await rig.ask("GET", f"/v1/files/{batch['error_file_id']}/content?offset=998")
    assert len(errors.body.splitlines()) == 2


async def test_a_file_that_is_no_input_is_refused(rig: Rig) -> None:
    uploaded = await rig.upload(GOOD)
    batch = (await rig.create(uploaded["id"])).json
    answer = await rig.create(batch["output_file_id"])
    assert answer.status == 400
    assert answer.error()["param"] == "input_file_id"


async def test_the_windows_on_offer_are_named(rig: Rig) -> None:
    answer = await rig.create("0" * 32, completion_window="9h")
    assert "24h, 1h" in answer.error()["message"]


@pytest.mark.parametrize("status", ["completed", "failed", "expired"])
async def test_a_batch_that_has_ended_is_not_cancelled(either: Rig, status: str) -> None:
    uploaded = await either.upload(GOOD)
    batch = (await either.create(uploaded["id"])).json
    await either.set_batch(batch["id"], status=status)
    with pytest.raises(openai.ConflictError) as caught:
        await either.openai.batches.cancel(batch["id"])
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert status in caught.value.message
    assert len(either.wakes) == 1


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/json"}, {"Content-Type": "text/plain"}])
async def test_a_cancel_needs_no_body_and_no_type(rig: Rig, headers: dict[str, str]) -> None:
    uploaded = await rig.upload(GOOD)
    batch = (await rig.create(uploaded["id"])).json
    await rig.set_batch(batch["id"], status="cancelled")
    answer = await rig.ask("POST", f"/v1/batches/{batch['id']}/cancel", headers=headers)
    assert (answer.status, answer.json["status"]) == (200, "cancelled")


async def test_create_looks_at_the_body_and_not_at_its_type(rig: Rig) -> None:
    uploaded = await rig.upload(GOOD)
    body = {"input_file_id": uploaded["id"], "endpoint": "/v1/embeddings", "completion_window": "1h"}
    answer = await rig.ask(
        "POST", "/v1/batches", data=json.dumps(body).encode(), headers={"Content-Type": "text/plain"}
    )
    assert (answer.status, answer.json["endpoint"]) == (200, "/v1/embeddings")


async def test_paging_sees_every_batch_once_newest_first(either: Rig) -> None:
    uploaded = await either.upload(GOOD)
    ids = [(await either.create(uploaded["id"])).json["id"] for _ in range(45)]
    assert [batch.id async for batch in either.openai.batches.list()] == ids[::-1]
    assert [batch.id async for batch in either.openai.batches.list(limit=7)] == ids[::-1]
    page = (await either.ask("GET", "/v1/batches")).json
    assert (len(page["data"]), page["has_more"], page["last_id"]) == (20, True, ids[-20])
    page = (await either.ask("GET", f"/v1/batches?limit=5&after={ids[5]}")).json
    assert ([batch["id"] for batch in page["data"]], page["has_more"]) == (ids[4::-1], False)


WINDOWS = ("24h", "1h", "30m")
DAY = 1_700_000_000


@dataclass
class Listed:
    """Batches of two owners, and what is known of ours: oldest first."""

    rig: Rig
    rows: list[dict[str, Any]]


@pytest.fixture
async def listed(either: Rig) -> Listed:
    """Batches of every kind, several of them created in the same second, and some of them deleted."""
    random = Random(1)
    rows: list[dict[str, Any]] = []
    async with either.context.database.write() as connection:
        for number in range(60):
            values = {
                "status": random.choice(LIVE + ENDED),
                "window": random.choice(WINDOWS),
                # Clocks of several servers differ a little, so that the order of creation is not quite that of times.
                "created_at": DAY + number // 6 + random.choice((0, 0, 2)),
                "deleted_at": DAY if random.random() < 0.1 else None,
                "owner": "somebody" if random.random() < 0.1 else "local",
            }
            id = await add_batch(connection, **values)
            if values["owner"] == "local" and values["deleted_at"] is None:
                rows.append(values | {"id": f"batch_{id}"})
    return Listed(either, rows)


def moments(data: st.DataObject, name: str) -> str | None:
    """A time to filter by: none, seconds, or RFC 3339."""
    second = data.draw(st.none() | st.integers(DAY - 2, DAY + 14), name)
    if second is None or data.draw(st.booleans(), "as seconds"):
        return None if second is None else str(second)
    return datetime.fromtimestamp(second, UTC).isoformat()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
async def test_pages_of_any_filter_have_what_it_asks_for_once_and_in_order(listed: Listed, data: st.DataObject) -> None:
    query: dict[str, str] = {"limit": str(data.draw(st.integers(1, 25), "limit"))}
    statuses = data.draw(st.none() | st.lists(st.sampled_from(LIVE + ENDED), min_size=1), "status")
    windows = data.draw(st.none() | st.lists(st.sampled_from(WINDOWS), min_size=1, max_size=2), "window")
    live_first = data.draw(st.none() | st.booleans(), "active first")
    first, last = moments(data, "created_after"), moments(data, "created_before")
    filters: dict[str, str | None] = {
        "status": None if statuses is None else ",".join(statuses),
        "completion_window": None if windows is None else ",".join(windows),
        "active_first": None if live_first is None else str(live_first).lower(),
        "created_after": first,
        "created_before": last,
    }
    query |= {name: value for name, value in filters.items() if value is not None}

    def seconds(moment: str | None, default: int) -> float:
        if moment is None:
            return default
        return int(moment) if moment.isdigit() else datetime.fromisoformat(moment).timestamp()

    wanted = [
        row["id"]
        for row in reversed(listed.rows)
        if (statuses is None or row["status"] in statuses)
        and (windows is None or row["window"] in windows)
        and seconds(first, 0) <= row["created_at"] <= seconds(last, 1 << 40)
    ]
    if live_first:
        live = {row["id"] for row in listed.rows if row["status"] in LIVE}
        wanted.sort(key=lambda id: id not in live)
    seen: list[str] = []
    more = True
    while more:
        page = await listed.rig.ask("GET", "/v1/batches", params=query)
        assert page.status == 200, page.body
        ids = [batch["id"] for batch in page.json["data"]]
        assert (page.json["first_id"], page.json["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
        assert ids or not page.json["has_more"]
        assert len(seen) + len(ids) <= len(wanted)
        more = page.json["has_more"]
        seen += ids
        query["after"] = seen[-1] if seen else ""
    assert seen == wanted
    if seen:  # as clients do that page on until a page is empty
        page = await listed.rig.ask("GET", "/v1/batches", params=query)
        assert (page.json["data"], page.json["has_more"]) == ([], False)


@pytest.mark.parametrize(
    ("query", "param", "said"),
    [
        ("status=running", "status", "validating, in_progress, finalizing, cancelling, completed, failed, expired"),
        ("status=", "status", "validating"),
        ("status=completed,", "status", "validating"),
        ("status=completed&status=failed", "status", "give it once"),
        ("status=%00", "status", "validating"),
        ("active_first=1", "active_first", "true, false"),
        ("created_after=yesterday", "created_after", "RFC 3339"),
        ("created_before=1735689600000", "created_before", "Unix seconds"),
        ("completion_window=soon", "completion_window", "24h"),
        ("completion_window=24h,,1h", "completion_window", "24h"),
    ],
)
async def test_a_filter_that_is_wrong_is_named(rig: Rig, query: str, param: str, said: str) -> None:
    answer = await rig.ask("GET", f"/v1/batches?{query}")
    assert answer.status == 400
    assert answer.error()["param"] == param
    assert said in answer.error()["message"]


async def test_whoever_deletes_what_is_listed_can_go_on_listing(rig: Rig) -> None:
    async with rig.context.database.write() as connection:
        ids = [await add_batch(connection, status="completed", has_log=True) for _ in range(5)]
        await add_batch(connection, owner="somebody")
    seen = []
    async for batch in rig.openai.batches.list(limit=2):
        seen.append(batch.id)
        await rig.set_batch(batch.id, deleted_at=1)
    assert seen == [f"batch_{id}" for id in reversed(ids)]
    page = await rig.ask("GET", "/v1/batches")
    assert (page.json["data"], page.json["has_more"]) == ([], False)


@pytest.mark.parametrize("after", ["", "x", "batch_" + "0" * 32, "theirs"])
@pytest.mark.parametrize("active_first", ["", "&active_first=true"])
async def test_a_cursor_must_be_a_batch_of_the_caller(rig: Rig, after: str, active_first: str) -> None:
    async with rig.context.database.write() as connection:
        theirs = await add_batch(connection, owner="somebody")
    after = theirs if after == "theirs" else after
    answer = await rig.ask("GET", f"/v1/batches?after={after}{active_first}")
    assert answer.status == 400
    assert answer.error()["param"] == "after"


async def test_usage_is_whole_or_null(rig: Rig) -> None:
    uploaded = await rig.upload(GOOD)
    batch = (await rig.create(uploaded["id"])).json
    assert batch["usage"] is None
    await rig.set_batch(batch["id"], input_tokens=7, output_tokens=5, cached_tokens=2)
    assert (await rig.ask("GET", f"/v1/batches/{batch['id']}")).json["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 2},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 12,
    }


async def test_a_batch_over_many_lines_is_made_at_once(either: Rig) -> None:
    uploaded = await either.upload(chat_file(50_000))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        assert (await either.create(uploaded["id"])).json["request_counts"]["total"] == 50_000
        times.append(time.perf_counter() - began)
    assert min(times) < 0.05


async def test_a_batch_that_cannot_be_stored_is_not_there(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import OperationalError

    async def full(*_: object, **__: object) -> None:
        raise OperationalError("INSERT", {}, Exception("database or disk is full"))

    uploaded = await rig.upload(GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(files, "insert", full)  # the second insert of the transaction
        answer = await rig.create(uploaded["id"])
    assert answer.status == 503
    assert answer.error()["code"] == "storage_full"
    assert (await rig.ask("GET", "/v1/batches")).json["data"] == []
    assert rig.wakes == []
    assert (await rig.create(uploaded["id"])).status == 200


async def test_models_are_what_the_upstreams_serve(rig: Rig) -> None:
    assert [model.id async for model in rig.openai.models.list()] == ["m"]
