"""Files: listing, getting and deleting, by the official client and by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from batchery.store import files
from tests.requests import chat_file
from tests.server.rig import Rig

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
    for form in (bare, f"file-{bare}", f"file_{bare}"):
        assert (await rig.ask("GET", f"/v1/files/{form}")).json == uploaded
        assert (await rig.ask("GET", f"/v1/files?after={form}")).status == 200
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

    async def get(connection: Any, id: str) -> Any:
        nonlocal seen
        seen += 1
        row = await real(connection, id)
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
