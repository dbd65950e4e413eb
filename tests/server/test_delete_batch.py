"""Deleting batches: gone at once for everybody, cancelled if they run, and nothing else is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa

from batchery.engine.retention import Retention
from batchery.store import schema
from batchery.upstreams.simulator import Behaviour, Uniform
from tests.requests import chat_file
from tests.server.rig import Rig
from tests.whole import Whole, whole

GOOD = chat_file(3)
TERMINAL = ("completed", "failed", "expired", "cancelled")
LIVE = ("validating", "in_progress", "finalizing", "cancelling")


async def made(rig: Rig, **more: Any) -> dict[str, Any]:
    """A batch that nobody works on."""
    created: dict[str, Any] = (await rig.create((await rig.upload(GOOD))["id"], **more)).json
    return created


async def row(rig: Rig, id: str) -> Any:
    """The batch's row, also of a deleted one; None once it is gone."""
    async with rig.context.database.read() as connection:
        query = sa.select(schema.batches).where(schema.batches.c.id == id.removeprefix("batch_"))
        return (await connection.execute(query)).one_or_none()


async def sweep(rig: Rig) -> None:
    retention = Retention(rig.context.database, rig.context.blobs, grace=0)
    while await retention.sweep(rig.context.clock()):
        pass


async def test_a_deleted_batch_is_gone_everywhere_at_once(either: Rig) -> None:
    batch, other = await made(either), await made(either)
    wakes = len(either.wakes)
    answer = await either.ask("DELETE", f"/v1/batches/{batch['id']}")
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["x-request-id"]
    assert len(either.wakes) == wakes + 1, "the worker has something to cancel"
    for method, path in (
        ("GET", f"/v1/batches/{batch['id']}"),
        ("GET", f"/ai/v1/batches/{batch['id']}"),
        ("POST", f"/v1/batches/{batch['id']}/cancel"),
        ("POST", f"/v1/batches/{batch['id']}/retry"),
        ("GET", f"/v1/batches/{batch['id']}/results"),
        ("DELETE", f"/v1/batches/{batch['id']}"),
    ):
        again = await either.ask(method, path)
        assert again.status == 404, (method, path, again)
        unknown = await either.ask(method, path.replace(batch["id"], "batch_" + "0" * 32))
        assert again.error() == unknown.error() | {
            "message": unknown.error()["message"].replace("batch_" + "0" * 32, batch["id"])
        }
    assert [found["id"] for found in (await either.ask("GET", "/v1/batches")).json["data"]] == [other["id"]]


@pytest.mark.parametrize("status", LIVE + TERMINAL)
async def test_what_becomes_of_a_batch_in_each_status(either: Rig, status: str) -> None:
    batch = await made(either)
    stamp = {} if status in LIVE else {f"{status}_at": 5, "has_log": False}
    await either.set_batch(batch["id"], status=status, **stamp)
    before = len(either.wakes)
    assert (await either.ask("DELETE", f"/v1/batches/{batch['id']}")).status == 204
    after = await row(either, batch["id"])
    assert after.deleted_at is not None
    await sweep(either)
    if status in LIVE:
        assert after.status == "cancelling"
        assert len(either.wakes) > before
        assert await row(either, batch["id"]) is not None
        assert (await either.ask("GET", f"/v1/files/{batch['output_file_id']}")).status == 200
        assert (await either.ask("DELETE", f"/v1/files/{batch['output_file_id']}")).status == 409
        assert (await either.ask("DELETE", f"/v1/files/{batch['input_file_id']}")).status == 409
    else:
        assert after.status == status
        assert getattr(after, f"{status}_at") == 5
        assert len(either.wakes) == before
        assert await row(either, batch["id"]) is None
        assert (await either.ask("GET", f"/v1/files/{batch['output_file_id']}")).status == 404, "it was never written"
        assert (await either.ask("DELETE", f"/v1/files/{batch['input_file_id']}")).status == 200


async def test_any_form_of_the_id_and_nobody_else_s(either: Rig) -> None:
    batch = await made(either)
    bare = batch["id"].removeprefix("batch_")
    for id in ("nonsense", "batch_", f"file-{bare}", "batch_" + "0" * 32, "%00", "é"):
        answer = await either.ask("DELETE", f"/v1/batches/{id}")
        assert answer.status == 404
        assert answer.error()["param"] in ("id", None)
    await either.set_batch(batch["id"], owner="another")
    assert (await either.ask("DELETE", f"/v1/batches/{bare}")).status == 404
    assert (await row(either, batch["id"])).deleted_at is None
    await either.set_batch(batch["id"], owner="local")
    assert (await either.ask("DELETE", f"/v1/batches/batch-{bare}", data=b"a body is not asked for")).status == 204


async def test_many_delete_at_once_and_one_has_done_it(either: Rig) -> None:
    batch = await made(either)
    answers = await asyncio.gather(*(either.ask("DELETE", f"/v1/batches/{batch['id']}") for _ in range(8)))
    assert sorted(answer.status for answer in answers) == [204] + [404] * 7


async def test_deleting_and_cancelling_at_once(either: Rig) -> None:
    for _ in range(5):
        batch = await made(either)
        deleted, cancelled = await asyncio.gather(
            either.ask("DELETE", f"/v1/batches/{batch['id']}"), either.ask("POST", f"/v1/batches/{batch['id']}/cancel")
        )
        assert deleted.status == 204
        assert cancelled.status in (200, 404)
        assert (await row(either, batch["id"])).status == "cancelling"


async def test_its_idempotency_key_makes_another(either: Rig) -> None:
    file = (await either.upload(GOOD))["id"]
    body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}

    async def create() -> Any:
        answer = await either.ask("POST", "/v1/batches", json=body, headers={"Idempotency-Key": "mine"})
        assert answer.status == 200, answer
        return answer.json["id"]

    first = await create()
    assert await create() == first
    assert (await either.ask("DELETE", f"/v1/batches/{first}")).status == 204
    assert await create() != first


async def test_a_batch_that_failed_at_creation_leaves_its_errors(either: Rig) -> None:
    batch = (await either.create((await either.upload(b"{\n"))["id"])).json
    assert batch["status"] == "failed"
    assert (await either.ask("DELETE", f"/v1/batches/{batch['id']}")).status == 204
    assert (await either.ask("GET", f"/v1/files/{batch['output_file_id']}")).status == 404
    errors = await either.ask("GET", f"/v1/files/{batch['error_file_id']}/content")
    assert (errors.status, errors.headers["x-last-line"], errors.headers["x-incomplete"]) == (200, "1", "false")
    await sweep(either)
    assert (await either.ask("GET", f"/v1/files/{batch['error_file_id']}/content")).body == errors.body
    assert (await either.ask("DELETE", f"/v1/files/{batch['error_file_id']}")).status == 200
    assert (await either.ask("DELETE", f"/v1/files/{batch['input_file_id']}")).status == 200
    await sweep(either)
    assert either.left_behind() == []


async def deleted_for_good(one: Whole, id: str) -> None:
    """Wait until the worker has ended a deleted batch, and it is swept."""
    async with asyncio.timeout(20):
        while (await row(one.rig, id)) is not None:
            await sweep(one.rig)
            await asyncio.sleep(0.01)


async def test_a_running_batch_is_cancelled_and_its_results_stay(database_url: str, tmp_path: Path) -> None:
    behaviour = Behaviour(latency=Uniform(0.0, 0.02), concurrency=4)
    async with whole(database_url, tmp_path, behaviour) as one, one.working(max_in_flight=4, cancel_grace=5.0):
        batch = await one.batch(chat_file(400))
        await one.until(batch["id"], "in_progress")
        async with asyncio.timeout(20):
            while len(await one.content(batch["output_file_id"])) < 20:  # noqa: ASYNC110 — a file has no event
                await asyncio.sleep(0.01)
        early = await one.content(batch["output_file_id"])
        assert (await one.rig.ask("DELETE", f"/v1/batches/{batch['id']}")).status == 204
        await deleted_for_good(one, batch["id"])
        answer = await one.rig.ask("GET", f"/v1/files/{batch['output_file_id']}/content")
        assert (answer.status, answer.headers["x-incomplete"]) == (200, "false")
        output = await one.content(batch["output_file_id"])
        assert output[: len(early)] == early
        assert len(output) < 400, "what had not begun was not run"
        kept = (await one.rig.ask("GET", "/v1/files")).json["data"]
        errors = next(file["id"] for file in kept if file["purpose"] == "batch_error")
        assert len(output) + len(await one.content(errors)) == 400
        async with one.rig.context.database.read() as connection:
            for table in (schema.batches, schema.shards, schema.results):
                assert (await connection.execute(sa.select(sa.func.count()).select_from(table))).scalar() == 0
        for file in kept:
            assert (await one.rig.ask("DELETE", f"/v1/files/{file['id']}")).status == 200
        await sweep(one.rig)
        assert one.rig.left_behind() == []


async def test_a_completed_batch_leaves_its_files(database_url: str, tmp_path: Path) -> None:
    async with whole(database_url, tmp_path) as one, one.working():
        batch = await one.batch(chat_file(20))
        ended = await one.until(batch["id"])
        assert ended["status"] == "completed"
        before = await one.content(batch["output_file_id"])
        assert (await one.rig.ask("DELETE", f"/v1/batches/{batch['id']}")).status == 204
        await deleted_for_good(one, batch["id"])
        assert await one.content(batch["output_file_id"]) == before
        described = (await one.rig.ask("GET", f"/v1/files/{batch['output_file_id']}")).json
        assert described["bytes"] > 0
        assert described["purpose"] == "batch_output"
        assert len(one.rig.left_behind()) == 3, "the input, its index and the output: the result index is gone"


async def test_the_end_of_a_deleted_batch_is_not_told(database_url: str, tmp_path: Path) -> None:
    secret = "whsec_" + "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
    webhook = {"url": "https://example.com/hook", "secret": secret}
    async with whole(database_url, tmp_path, Behaviour(latency=Uniform(5.0, 5.0))) as one:
        async with one.working(cancel_grace=0.0):
            batch = await one.batch(GOOD, webhook=webhook)
            await one.until(batch["id"], "in_progress")
            assert (await one.rig.ask("DELETE", f"/v1/batches/{batch['id']}")).status == 204
            await deleted_for_good(one, batch["id"])
        async with one.rig.context.database.read() as connection:
            assert (await connection.execute(sa.select(schema.webhooks))).all() == []


async def test_the_official_client_sees_no_more_of_it(rig: Rig) -> None:
    batch = await made(rig)
    assert (await rig.ask("DELETE", f"/v1/batches/{batch['id']}")).status == 204
    with pytest.raises(openai.NotFoundError):
        await rig.openai.batches.retrieve(batch["id"])
    assert [found async for found in rig.openai.batches.list()] == []
