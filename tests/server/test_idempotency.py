"""`Idempotency-Key` on uploads and batches: one key and one content is one object, however often it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from batchery.server import idempotency
from batchery.store import schema
from batchery.store.idempotency import KEPT
from tests.requests import chat_file, chat_line
from tests.server.keys import bearing, make_key
from tests.server.rig import BOUNDARY, Answer, Rig, field_part, file_part, form, running, until

GOOD = chat_file(3)
PURPOSE = field_part("purpose", "batch")
EXPIRY = (field_part("expires_after[anchor]", "created_at"), field_part("expires_after[seconds]", "7200"))


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


async def post(rig: Rig, key: str | None, body: bytes, *, boundary: str = BOUNDARY, **headers: str) -> Answer:
    """Upload a form under a key."""
    headers["Content-Type"] = f"multipart/form-data; boundary={boundary}"
    if key is not None:
        headers["Idempotency-Key"] = key
    return await rig.ask("POST", "/v1/files", data=body, headers=headers)


async def create(
    rig: Rig, key: str, file: str, *, base: str = "/v1", headers: dict[str, str] | None = None, **more: Any
) -> Answer:
    """Create a batch under a key."""
    body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"} | more
    return await rig.ask("POST", f"{base}/batches", json=body, headers={"Idempotency-Key": key} | (headers or {}))


async def files(rig: Rig, **options: Any) -> list[str]:
    """The ids of all uploads there are."""
    answer = await rig.ask("GET", "/v1/files?purpose=batch", **options)
    return [file["id"] for file in answer.json["data"]]


async def batch_ids(rig: Rig) -> list[str]:
    """The ids of all batches there are."""
    return [batch["id"] for batch in (await rig.ask("GET", "/v1/batches?limit=100")).json["data"]]


def conflicts(answer: Answer, kind: str) -> None:
    """The one answer to a key that comes with other content."""
    assert answer.status == 409, answer
    assert answer.headers["x-should-retry"] == "false"
    error = answer.error()
    assert (error["param"], error["code"]) == ("Idempotency-Key", "idempotency_key_reused")
    assert kind in error["message"]


async def test_the_same_upload_is_the_same_file_whatever_its_framing(either: Rig) -> None:
    first = await post(either, "key one", form(PURPOSE, *EXPIRY, file_part(GOOD)))
    assert first.status == 200
    stored = either.left_behind()
    again = [
        form(PURPOSE, *EXPIRY, file_part(GOOD)),
        form(file_part(GOOD), *reversed(EXPIRY), PURPOSE),
        form(file_part(GOOD), *EXPIRY),
        form(*EXPIRY, file_part(GOOD, filename="/somewhere/input.jsonl"), field_part("unknown", "x")),
        form(
            field_part("expires_after.anchor", "created_at"),
            field_part("expires_after.seconds", "7200"),
            file_part(GOOD),
        ),
    ]
    for body in again:
        answer = await post(either, "key one", body)
        assert answer.json == first.json
        assert answer.status == 200
    other = form(PURPOSE, *EXPIRY, file_part(GOOD), boundary="quite-another")
    assert (await post(either, "key one", other, boundary="quite-another")).json == first.json
    assert await files(either) == [first.json["id"]]
    assert either.left_behind() == stored


async def test_another_upload_under_the_same_key_is_a_conflict_and_leaves_nothing(either: Rig) -> None:
    first = await post(either, "k", form(PURPOSE, file_part(GOOD)))
    stored = either.left_behind()
    others = [
        form(PURPOSE, file_part(GOOD + b"\n")),
        form(PURPOSE, file_part(GOOD[:-1])),
        form(PURPOSE, file_part(GOOD, filename="other.jsonl")),
        form(PURPOSE, file_part(GOOD), *EXPIRY),
        form(PURPOSE, file_part(b"nonsense")),
        form(PURPOSE, file_part(b"")),
    ]
    for body in others:
        conflicts(await post(either, "k", body), "file")
    assert await files(either) == [first.json["id"]]
    assert either.left_behind() == stored
    assert (await post(either, "k", form(PURPOSE, file_part(GOOD)))).json == first.json


async def test_a_refused_upload_is_not_remembered(rig: Rig) -> None:
    for refused in (form(PURPOSE), form(field_part("purpose", "x"), file_part(GOOD)), form(file_part(GOOD))[:-9], b""):
        assert (await post(rig, "k", refused)).status == 400
    assert (await post(rig, "k", form(file_part(chat_file(2))))).status == 200


async def test_a_file_with_bad_lines_is_remembered_as_any_other(rig: Rig) -> None:
    bad = chat_line("a", "x") + b"nonsense\n"
    first = await post(rig, "k", form(file_part(bad)))
    assert first.json["status"] == "error"
    assert (await post(rig, "k", form(file_part(bad)))).json == first.json
    assert await files(rig) == [first.json["id"]]
    conflicts(await post(rig, "k", form(file_part(GOOD))), "file")


async def test_without_a_key_each_upload_is_a_file(rig: Rig) -> None:
    answers = [await post(rig, None, form(file_part(GOOD))) for _ in range(2)]
    assert len({answer.json["id"] for answer in answers}) == 2


async def test_of_concurrent_uploads_under_one_key_one_is_stored(either: Rig) -> None:
    for turn in range(3):
        before = len(either.left_behind())
        body = form(PURPOSE, file_part(chat_file(50, mark=str(turn))))
        answers = await asyncio.gather(*(post(either, f"turn {turn}", body) for _ in range(6)))
        assert {answer.status for answer in answers} == {200}
        assert len({answer.body for answer in answers}) == 1
        assert len(await files(either)) == turn + 1
        await until(lambda before=before: len(either.left_behind()) == before + 2)


async def test_of_concurrent_uploads_of_different_content_one_is_stored(either: Rig) -> None:
    bodies = [form(PURPOSE, file_part(chat_file(50, mark=str(i)))) for i in range(6)]
    answers = await asyncio.gather(*(post(either, "k", body) for body in bodies))
    assert sorted(answer.status for answer in answers) == [200] + [409] * 5
    for answer in answers:
        if answer.status == 409:
            conflicts(answer, "file")
    assert len(await files(either)) == 1
    await until(lambda: len(either.left_behind()) == 2)


async def test_a_key_holds_for_a_day(database_url: str, tmp_path: Path) -> None:
    clock = Clock()
    async with running(database_url, tmp_path, clock=clock) as rig:
        first = (await post(rig, "k", form(file_part(GOOD)))).json
        batch = (await create(rig, "k", first["id"])).json
        clock.now += KEPT - 1
        assert (await post(rig, "k", form(file_part(GOOD)))).json == first
        assert (await create(rig, "k", first["id"])).json["id"] == batch["id"]
        conflicts(await create(rig, "k", first["id"], metadata={"a": "b"}), "batch")
        clock.now += 1
        assert (await post(rig, "k", form(file_part(GOOD)))).json["id"] != first["id"]
        assert (await create(rig, "k", first["id"], metadata={"a": "b"})).json["id"] != batch["id"]


async def test_a_key_holds_across_a_restart(database_url: str, tmp_path: Path) -> None:
    async with running(database_url, tmp_path) as rig:
        first = (await post(rig, "k", form(file_part(GOOD)))).json
        batch = (await create(rig, "k", first["id"])).json
    async with running(database_url, tmp_path) as rig:
        assert (await post(rig, "k", form(file_part(GOOD)))).json == first
        assert (await create(rig, "k", first["id"])).json == batch
        conflicts(await post(rig, "k", form(file_part(GOOD[:-1]))), "file")


async def test_a_key_whose_file_was_deleted_makes_another(either: Rig) -> None:
    first = (await post(either, "k", form(file_part(GOOD)))).json
    assert (await either.ask("DELETE", f"/v1/files/{first['id']}")).status == 200
    second = await post(either, "k", form(file_part(GOOD + b"\n")))
    assert second.status == 200
    assert await files(either) == [second.json["id"]]
    assert (await post(either, "k", form(file_part(GOOD + b"\n")))).json == second.json


@pytest.mark.parametrize("is_swept", [False, True])
async def test_a_key_whose_file_has_expired_makes_another(database_url: str, tmp_path: Path, is_swept: bool) -> None:
    clock = Clock()
    async with running(database_url, tmp_path, clock=clock) as rig:
        body = form(*EXPIRY, file_part(GOOD))
        first = (await post(rig, "k", body)).json
        clock.now += 7_199
        assert (await post(rig, "k", body)).json == first
        clock.now += 1
        if is_swept:  # by somebody who does not know of keys
            async with rig.context.database.write() as connection:
                await connection.execute(sa.delete(schema.files))
        second = await post(rig, "k", body)
        assert second.status == 200
        assert second.json["id"] != first["id"]
        assert (await post(rig, "k", body)).json == second.json


async def test_keys_belong_to_their_owner_and_to_one_kind_of_object(either: Rig) -> None:
    mine, mine_too, yours = [bearing(await make_key(either.context, owner)) for owner in ("me", "me", "you")]
    first = await post(either, "k", form(file_part(GOOD)), **mine)
    assert (await post(either, "k", form(file_part(GOOD)), **mine_too)).json == first.json
    other = await post(either, "k", form(file_part(GOOD[:-1])), **yours)
    assert other.status == 200
    batch = await create(either, "k", first.json["id"], headers=mine)
    assert batch.status == 200
    assert (await create(either, "k", first.json["id"], headers=yours)).status == 404
    assert (await create(either, "k", first.json["id"], headers=mine_too)).json == batch.json
    assert (await create(either, "k", other.json["id"], headers=yours)).status == 200
    assert await files(either, headers=mine) == [first.json["id"]]
    assert await files(either, headers=yours) == [other.json["id"]]


async def test_a_file_remembers_the_key_that_it_came_with(rig: Rig) -> None:
    key = await make_key(rig.context)
    assert (await post(rig, None, form(file_part(GOOD)), **bearing(key))).status == 200
    async with rig.context.database.read() as connection:
        known = (await connection.execute(sa.select(schema.api_keys.c.id))).scalar_one()
        assert (await connection.execute(sa.select(schema.files.c.api_key))).scalar_one() == known


async def test_a_repeated_upload_needs_no_room_of_its_own(rig: Rig) -> None:
    """Whoever lost the answer to the upload that filled the quota still gets it."""
    mine = bearing(await make_key(rig.context, max_upload_bytes=len(GOOD)))
    first = await post(rig, "k", form(file_part(GOOD)), **mine)
    assert first.status == 200
    assert (await post(rig, "k", form(file_part(GOOD)), **mine)).json == first.json
    refused = await post(rig, "other", form(file_part(GOOD)), **mine)
    assert (refused.status, refused.error()["code"]) == (429, "upload_bytes_exceeded")
    conflicts(await post(rig, "k", form(file_part(GOOD[:-1])), **mine), "file")
    assert len(rig.left_behind()) == 2
    assert (await rig.ask("DELETE", f"/v1/files/{first.json['id']}", headers=mine)).status == 200
    assert (await post(rig, "other", form(file_part(GOOD)), **mine)).status == 200, "a refused try was remembered"


async def test_uploads_at_once_cannot_pass_the_quota_together(either: Rig) -> None:
    mine = bearing(await make_key(either.context, max_upload_bytes=2 * len(GOOD)))
    answers = await asyncio.gather(*(post(either, None, form(file_part(GOOD)), **mine) for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [200, 200, 429, 429, 429]
    await until(lambda: len(either.left_behind()) == 4)


@pytest.mark.parametrize("announced", [True, False])
async def test_an_upload_beyond_the_quota_is_refused_before_it_is_taken(rig: Rig, announced: bool) -> None:
    mine = bearing(await make_key(rig.context, max_upload_bytes=1000))
    body = form(file_part(chat_file(3000, padding=1000)))

    async def pieces() -> AsyncIterator[bytes]:
        yield body

    headers = mine | {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    answer = await rig.ask("POST", "/v1/files", data=body if announced else pieces(), headers=headers)
    assert (answer.status, answer.error()["code"]) == (429, "upload_bytes_exceeded")
    assert rig.left_behind() == []


async def test_the_same_batch_is_created_once(either: Rig) -> None:
    file = (await either.upload(GOOD))["id"]
    first = await create(either, "k", file, metadata={"a": "1", "b": "2"})
    assert first.status == 200
    for again in (
        await create(either, "k", file, metadata={"a": "1", "b": "2"}),
        await create(either, "k", file, metadata={"b": "2", "a": "1"}),
        await create(either, "k", file, metadata={"a": "1", "b": "2"}, base="/ai/v1"),
        await create(either, "k", file, metadata={"a": "1", "b": "2"}, on_invalid_line="fail", unknown=1),
    ):
        assert (again.status, again.json) == (200, first.json)
    assert await batch_ids(either) == [first.json["id"]]
    for other in (
        await create(either, "k", file),
        await create(either, "k", file, metadata={"a": "1", "b": "3"}),
        await create(either, "k", file, metadata={"a": "1", "b": "2"}, completion_window="1h"),
        await create(either, "k", file, metadata={"a": "1", "b": "2"}, endpoint="/v1/embeddings"),
        await create(either, "k", (await either.upload(GOOD))["id"], metadata={"a": "1", "b": "2"}),
    ):
        conflicts(other, "batch")
    assert await batch_ids(either) == [first.json["id"]]


async def test_a_refused_batch_is_not_remembered(rig: Rig) -> None:
    file = (await rig.upload(GOOD))["id"]
    assert (await create(rig, "k", "file-" + "0" * 32)).status == 404
    assert (await create(rig, "k", file, completion_window="3h")).status == 400
    assert (await create(rig, "k", file)).status == 200


async def test_of_concurrent_batches_under_one_key_one_is_created(either: Rig) -> None:
    good, bad = (await either.upload(GOOD))["id"], (await either.upload(b"nonsense"))["id"]
    for file in (good, bad):  # the batch over a bad file has failed from the start, and comes with a blob
        answers = await asyncio.gather(*(create(either, f"for {file}", file) for _ in range(6)))
        assert {answer.status for answer in answers} == {200}
        assert len({answer.json["id"] for answer in answers}) == 1
    assert len(await batch_ids(either)) == 2
    await until(lambda: len([key for key in either.left_behind() if key.startswith("error/")]) == 1)
    answers = await asyncio.gather(*(create(either, "k", good, metadata={"n": str(n)}) for n in range(6)))
    assert sorted(answer.status for answer in answers) == [200] + [409] * 5


async def test_a_key_whose_batch_was_deleted_makes_another(either: Rig) -> None:
    file = (await either.upload(GOOD))["id"]
    first = (await create(either, "k", file)).json
    await either.set_batch(first["id"], status="cancelled", cancelled_at=1)
    assert (await either.ask("DELETE", f"/v1/batches/{first['id']}")).status == 204
    second = await create(either, "k", file, metadata={"another": "one"})
    assert second.status == 200
    assert second.json["id"] != first["id"]


async def test_a_repeated_batch_counts_against_no_limit(rig: Rig) -> None:
    mine = bearing(await make_key(rig.context, max_live_batches=1))
    file = (await post(rig, None, form(file_part(GOOD)), **mine)).json["id"]
    first = await create(rig, "k", file, headers=mine)
    assert first.status == 200
    assert (await create(rig, "k", file, headers=mine)).json == first.json
    assert (await create(rig, "other", file, headers=mine)).status == 429


@pytest.mark.parametrize("key", ["", "é", "x" * 256, "tab\there"])
async def test_a_key_that_is_none_is_refused(rig: Rig, key: str) -> None:
    body = form(file_part(GOOD))
    head = [
        "POST /v1/files HTTP/1.1",
        "Host: x",
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}",
        f"Content-Length: {len(body)}",
        f"Idempotency-Key: {key}",
    ]
    answer = await rig.raw("\r\n".join(head).encode() + b"\r\n\r\n" + body, finish=False)
    assert answer.status == 400
    assert answer.error()["param"] == "Idempotency-Key"
    assert rig.left_behind() == []


async def test_two_different_keys_at_once_are_refused(rig: Rig) -> None:
    for second, status in (("b", 400), ("a", 200)):
        headers = [("Idempotency-Key", "a"), ("Idempotency-Key", second)]
        headers.append(("Content-Type", f"multipart/form-data; boundary={BOUNDARY}"))
        answer = await rig.ask("POST", "/v1/files", data=form(file_part(GOOD)), headers=headers)
        assert answer.status == status


async def test_the_longest_key(rig: Rig) -> None:
    key = "".join(chr(32 + i % 95) for i in range(1, 254)) + "~"
    first = await post(rig, key, form(file_part(GOOD)))
    assert first.status == 200
    assert (await post(rig, key, form(file_part(GOOD)))).json == first.json
    assert (await post(rig, key[:-1] + "}", form(file_part(GOOD)))).json != first.json


def test_fingerprints_tell_fields_apart() -> None:
    contents = [
        ("a", "b", None),
        ("ab", None),
        ("a", None, "b"),
        ("a", "b", 0),
        ("a", "b", "0"),
        ("a", ["b"], None),
        (),
    ]
    assert len({idempotency.fingerprint(*content) for content in contents}) == len(contents)
    assert idempotency.fingerprint({"a": "1"}, None) == idempotency.fingerprint({"a": "1"}, None)
