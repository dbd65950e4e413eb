"""Files: listing, getting and deleting, by the official client and by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
import sqlalchemy as sa

from batchery.engine.retention import Retention
from batchery.store import files, schema
from batchery.store.blobs import BlobStore
from batchery.store.errors import StoreUnavailable
from tests.requests import chat_file
from tests.server.rig import BOUNDARY, Rig, field_part, file_part, form

GOOD = chat_file(3)


async def test_the_official_client_uploads_finds_and_deletes(either: Rig) -> None:
    client = either.openai
    made = await client.files.create(file=("mine.jsonl", GOOD), purpose="batch")
    assert made.id.startswith("file-")
    assert made.status == "processed"
    assert (await client.files.retrieve(made.id)).model_dump() == made.model_dump()
    assert (await client.files.wait_for_processing(made.id)).status == "processed"
    assert (await client.files.content(made.id)).content == GOOD
    assert (await client.files.delete(made.id)).deleted is True
    for gone in (client.files.retrieve(made.id), client.files.content(made.id), client.files.delete(made.id)):
        with pytest.raises(openai.NotFoundError) as caught:
            await gone
        assert caught.value.param == "id"
        assert caught.value.request_id
    assert either.left_behind() == []


async def test_paging_sees_every_file_once_in_either_order(either: Rig) -> None:
    names = [f"{i}.jsonl" for i in range(7)]
    ids = [(await either.upload(GOOD, name=name))["id"] for name in names]
    newest_first = [file.filename async for file in either.openai.files.list(limit=2)]
    assert newest_first == names[::-1]
    assert [file.filename async for file in either.openai.files.list(limit=3, order="asc")] == names
    assert [file.filename async for file in either.openai.files.list()] == newest_first

    first = (await either.ask("GET", "/v1/files?limit=3")).json
    assert first["has_more"] is True
    assert (first["object"], first["first_id"], first["last_id"]) == ("list", ids[6], ids[4])
    last = (await either.ask("GET", f"/v1/files?limit=4&after={ids[4]}")).json
    assert [file["id"] for file in last["data"]] == ids[3::-1]
    assert last["has_more"] is False
    empty = (await either.ask("GET", f"/v1/files?after={ids[0]}")).json
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


async def test_an_id_is_read_with_any_prefix(rig: Rig) -> None:
    uploaded = await rig.upload(GOOD)
    bare = uploaded["id"].removeprefix("file-")
    for given in (bare, f"file-{bare}", f"file_{bare}"):
        assert (await rig.ask("GET", f"/v1/files/{given}")).json == uploaded
        assert (await rig.ask("GET", f"/v1/files?after={given}")).status == 200
    assert (await rig.ask("GET", f"/v1/files/batch_{bare}")).status == 404


async def test_a_page_of_one_purpose(rig: Rig) -> None:
    uploaded = await rig.upload(GOOD)
    batch = (await rig.create(uploaded["id"])).json
    for purpose, ids in (("batch", [uploaded["id"]]), ("batch_output", [batch["output_file_id"]]), ("batch_error", [])):
        page = (await rig.ask("GET", f"/v1/files?purpose={purpose}")).json
        assert [file["id"] for file in page["data"]] == ids


async def test_a_file_in_use_is_not_deleted(either: Rig) -> None:
    uploaded = await either.upload(GOOD)
    batch = (await either.create(uploaded["id"])).json
    for id in (uploaded["id"], batch["output_file_id"]):
        answer = await either.ask("DELETE", f"/v1/files/{id}")
        assert answer.status == 409
        assert answer.headers["x-should-retry"] == "false"
        assert answer.error()["code"] == "file_in_use"
    await either.set_batch(batch["id"], status="completed")
    for id in (uploaded["id"], batch["output_file_id"]):
        answer = await either.ask("DELETE", f"/v1/files/{id}")
        assert (answer.status, answer.json) == (200, {"id": id, "object": "file", "deleted": True})
    assert either.left_behind() == []


async def test_creating_and_deleting_at_once_leave_no_batch_without_its_file(either: Rig) -> None:
    for _ in range(10):
        uploaded = await either.upload(GOOD)
        created, deleted = await asyncio.gather(
            either.create(uploaded["id"]), either.ask("DELETE", f"/v1/files/{uploaded['id']}")
        )
        assert (created.status, deleted.status) in ((200, 409), (404, 200))


async def test_what_is_anothers_does_not_exist(rig: Rig) -> None:
    uploaded = await rig.upload(GOOD)
    batch = (await rig.create(uploaded["id"])).json
    async with rig.context.database.write() as connection:
        from sqlalchemy import update

        from batchery.store import schema

        await connection.execute(update(schema.files).values(owner="another"))
        await connection.execute(update(schema.batches).values(owner="another"))
    answers = [
        await rig.ask("GET", f"/v1/files/{uploaded['id']}"),
        await rig.ask("GET", f"/v1/files/{uploaded['id']}/content"),
        await rig.ask("DELETE", f"/v1/files/{uploaded['id']}"),
        await rig.create(uploaded["id"]),
        await rig.ask("GET", f"/v1/batches/{batch['id']}"),
        await rig.ask("POST", f"/v1/batches/{batch['id']}/cancel"),
    ]
    assert [answer.status for answer in answers] == [404] * 6
    assert (await rig.ask("GET", f"/v1/files?after={uploaded['id']}")).status == 400
    assert (await rig.ask("GET", f"/v1/batches?after={batch['id']}")).status == 400
    assert (await rig.ask("GET", "/v1/files")).json["data"] == []
    assert (await rig.ask("GET", "/v1/batches")).json["data"] == []


async def test_a_file_deleted_just_before_its_content_is_read(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = await rig.upload(GOOD)
    real = files.get
    seen = 0

    async def get(connection: Any, id: str, **more: Any) -> Any:
        nonlocal seen
        seen += 1
        row = await real(connection, id, **more)
        if seen == 1 and row is not None:
            await rig.context.blobs.delete([row.blob_key or ""])
            return row
        return None

    monkeypatch.setattr(files, "get", get)
    answer = await rig.ask("GET", f"/v1/files/{uploaded['id']}/content")
    assert answer.status == 404
    assert answer.error()["param"] == "id"


async def test_a_blob_that_is_gone_is_an_error_and_no_broken_download(rig: Rig) -> None:
    uploaded = await rig.upload(GOOD)
    await rig.context.blobs.delete([key for key in rig.left_behind() if key.startswith("files/")])
    answer = await rig.ask("GET", f"/v1/files/{uploaded['id']}/content")
    assert answer.status == 503
    answer.error()


# Files that have expired, before any sweep.


async def set_file(rig: Rig, id: str, **values: Any) -> None:
    """Change a file's row behind the server's back."""
    async with rig.context.database.write() as connection:
        bare = id.removeprefix("file-")
        await connection.execute(sa.update(schema.files).where(schema.files.c.id == bare).values(**values))


async def test_an_expired_file_does_not_exist(either: Rig) -> None:
    uploaded = await either.upload(GOOD)
    now = either.context.now()
    await set_file(either, uploaded["id"], expires_at=now + 1000)
    assert (await either.ask("GET", f"/v1/files/{uploaded['id']}")).json["expires_at"] == now + 1000
    await set_file(either, uploaded["id"], expires_at=now)
    for method, path in (
        ("GET", f"/v1/files/{uploaded['id']}"),
        ("GET", f"/v1/files/{uploaded['id']}/content"),
        ("HEAD", f"/v1/files/{uploaded['id']}/content"),
        ("DELETE", f"/v1/files/{uploaded['id']}"),
        ("DELETE", f"/ai/v1/files/{uploaded['id']}"),
    ):
        assert (await either.ask(method, path)).status == 404, (method, path)
    refused = await either.create(uploaded["id"])
    assert (refused.status, refused.error()["param"]) == (404, "input_file_id")
    assert (await either.ask("GET", f"/v1/files?after={uploaded['id']}")).status == 400
    assert (await either.ask("GET", "/v1/files")).json["data"] == []


async def test_pages_do_not_count_what_has_expired(either: Rig) -> None:
    ids = [(await either.upload(GOOD))["id"] for _ in range(9)]
    for id in ids[::2]:
        await set_file(either, id, expires_at=1)
    kept = ids[1::2]
    seen: list[str] = []
    after = ""
    while True:
        page = (await either.ask("GET", f"/v1/files?limit=2&order=asc{after}")).json
        seen += [file["id"] for file in page["data"]]
        if not page["has_more"]:
            break
        assert len(page["data"]) == 2
        after = f"&after={page['last_id']}"
    assert seen == kept
    assert (await either.ask("GET", "/v1/files?limit=4")).json["has_more"] is False


async def test_an_expired_file_is_there_as_long_as_a_live_batch_uses_it(either: Rig) -> None:
    uploaded = await either.upload(GOOD)
    batch = (await either.create(uploaded["id"])).json
    for id in (uploaded["id"], batch["output_file_id"]):
        await set_file(either, id, expires_at=1)
    assert (await either.ask("GET", f"/v1/files/{uploaded['id']}")).json["expires_at"] == 1
    assert (await either.ask("GET", f"/v1/files/{uploaded['id']}/content")).body == GOOD
    assert (await either.ask("GET", f"/v1/files/{batch['output_file_id']}")).json["expires_at"] is None
    assert (await either.ask("GET", f"/v1/files/{batch['output_file_id']}/content")).status == 200
    assert len((await either.ask("GET", "/v1/files")).json["data"]) == 2
    assert (await either.ask("DELETE", f"/v1/files/{uploaded['id']}")).status == 409
    assert (await either.create(uploaded["id"])).status == 404, "no further batch holds it up"
    await either.set_batch(batch["id"], status="completed", completed_at=5)
    for id in (uploaded["id"], batch["output_file_id"]):
        assert (await either.ask("GET", f"/v1/files/{id}")).status == 404
        assert (await either.ask("GET", f"/v1/files/{id}/content")).status == 404
    described = (await either.ask("GET", f"/v1/batches/{batch['id']}")).json
    assert described["input_file_id"] == uploaded["id"]
    assert described["output_file_id"] == batch["output_file_id"]


async def test_a_batch_stays_readable_without_its_files(either: Rig) -> None:
    uploaded = await either.upload(GOOD)
    batch = (await either.create(uploaded["id"])).json
    await either.set_batch(batch["id"], status="completed", completed_at=5)
    for id in (uploaded["id"], batch["output_file_id"]):
        assert (await either.ask("DELETE", f"/v1/files/{id}")).status == 200
    described = (await either.ask("GET", f"/v1/batches/{batch['id']}")).json
    assert described == batch | {"status": "completed", "completed_at": 5}
    assert [found["id"] for found in (await either.ask("GET", "/v1/batches")).json["data"]] == [batch["id"]]
    assert (await either.ask("GET", f"/v1/files/{described['output_file_id']}/content")).status == 404


# What is left of a deleted file.


async def test_blobs_that_cannot_be_deleted_now_are_deleted_later(either: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = await either.upload(GOOD)

    async def fail(_: BlobStore, keys: Any) -> None:
        assert len(list(keys)) == 2
        raise StoreUnavailable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "delete", fail)
        assert (await either.ask("DELETE", f"/v1/files/{uploaded['id']}")).status == 200
    assert (await either.ask("GET", f"/v1/files/{uploaded['id']}")).status == 404
    assert len(either.left_behind()) == 2
    retention = Retention(either.context.database, either.context.blobs, grace=60)
    await retention.sweep(either.context.clock())
    assert len(either.left_behind()) == 2
    await retention.sweep(either.context.clock() + 61)
    assert either.left_behind() == []
    async with either.context.database.read() as connection:
        assert (await connection.execute(sa.select(schema.dead_blobs))).all() == []


async def test_a_deleted_file_s_idempotency_key_makes_another(either: Rig) -> None:
    body = form(file_part(GOOD), field_part("purpose", "batch"))
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", "Idempotency-Key": "mine"}

    async def upload() -> str:
        answer = await either.ask("POST", "/v1/files", data=body, headers=headers)
        assert answer.status == 200, answer
        id: str = answer.json["id"]
        return id

    first = await upload()
    assert await upload() == first
    assert (await either.ask("DELETE", f"/v1/files/{first}")).status == 200
    second = await upload()
    assert second != first
    await set_file(either, second, expires_at=1)
    assert await upload() not in (first, second)
