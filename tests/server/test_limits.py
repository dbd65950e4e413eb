"""What a key may have at a time, also when two come at once."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import pytest

from batchery.server import limits
from batchery.server.context import Caller
from batchery.store import batches, files
from batchery.store.ids import new_id
from batchery.wire.errors import TooManyRequests
from tests.requests import chat_file
from tests.server.keys import bearing, make_key
from tests.server.rig import BOUNDARY, Answer, Rig, field_part, file_part, form

TYPE = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


class Customer:
    """Somebody with a key."""

    def __init__(self, rig: Rig, key: str) -> None:
        self._rig = rig
        self._key = key

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        options["headers"] = bearing(self._key) | options.pop("headers", {})
        return await self._rig.ask(method, path, **options)

    async def upload(self, data: bytes, **headers: str) -> Answer:
        body = form(field_part("purpose", "batch"), file_part(data))
        return await self.ask("POST", "/v1/files", data=body, headers=TYPE | headers)

    async def create(self, file: str, **more: Any) -> Answer:
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"} | more
        return await self.ask("POST", "/v1/batches", json=body)


async def customer(rig: Rig, owner: str = "local", **more: Any) -> Customer:
    return Customer(rig, await make_key(rig.context, owner, **more))


def refused(answer: Answer, code: str, *said: str) -> dict[str, Any]:
    """The error of a 429, with all that it must have."""
    assert answer.status == 429, answer
    error = answer.error()
    assert error["code"] == code
    assert error["type"] == "rate_limit_error"
    for text in said:
        assert text in error["message"]
    assert re.fullmatch(r"[1-9][0-9]?", answer.headers["retry-after"])
    assert int(answer.headers["retry-after"]) <= 60
    return error


async def test_live_batches(either: Rig) -> None:
    someone = await customer(either, max_live_batches=2)
    file = (await someone.upload(chat_file(3))).json["id"]
    made = [(await someone.create(file)).json for _ in range(2)]
    error = refused(await someone.create(file), "live_batches_exceeded", "2 batches", "may have 2")
    due = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(made[0]["expires_at"]))
    assert due in error["message"]
    await either.set_batch(made[0]["id"], status="cancelled", cancelled_at=1)
    assert (await someone.create(file)).status == 200
    refused(await someone.create(file), "live_batches_exceeded")


async def test_the_first_to_end_says_when_to_come_back(either: Rig) -> None:
    someone = await customer(either, max_live_batches=1)
    file = (await someone.upload(chat_file(3))).json["id"]
    id = (await someone.create(file)).json["id"]
    for left, low, high in ((20, 15, 21), (-100, 1, 1), (9_000, 60, 60)):
        await either.set_batch(id, expires_at=int(time.time()) + left)
        answer = await someone.create(file)
        refused(answer, "live_batches_exceeded")
        assert low <= int(answer.headers["retry-after"]) <= high


async def test_queued_requests(either: Rig) -> None:
    someone = await customer(either, max_queued_requests=5)
    file = (await someone.upload(chat_file(3))).json["id"]
    id = (await someone.create(file)).json["id"]
    refused(await someone.create(file), "queued_requests_exceeded", "3 requests", "may have 5", "3 more", "due at")
    await either.set_batch(id, completed=1)
    assert (await someone.create(file)).status == 200
    large = (await someone.upload(chat_file(6))).json["id"]
    refused(await someone.create(large), "queued_requests_exceeded", "never be room")


async def test_limits_are_the_key_s_and_not_its_owner_s(either: Rig) -> None:
    one, two = [await customer(either, "ann", max_live_batches=1) for _ in range(2)]
    file = (await one.upload(chat_file(1))).json["id"]
    assert (await one.create(file)).status == 200
    assert (await two.create(file)).status == 200
    refused(await two.create(file), "live_batches_exceeded")


async def test_a_batch_that_fails_at_once_needs_no_room(either: Rig) -> None:
    someone = await customer(either, max_live_batches=0, max_queued_requests=0)
    good, bad = [(await someone.upload(data)).json["id"] for data in (chat_file(1), b"nonsense\n")]
    refused(await someone.create(good), "live_batches_exceeded")
    assert (await someone.create(bad)).json["status"] == "failed"


@pytest.mark.parametrize("limit", [{"max_live_batches": 3}, {"max_queued_requests": 6}])
async def test_many_at_once_get_no_more_than_one_by_one(either: Rig, limit: Any) -> None:
    someone = await customer(either, **limit)
    file = (await someone.upload(chat_file(2))).json["id"]
    answers = await asyncio.gather(*(someone.create(file) for _ in range(12)))
    assert sorted(answer.status for answer in answers) == [200] * 3 + [429] * 9


async def test_two_transactions_cannot_both_take_what_is_left(either: Rig) -> None:
    """The second is in the middle of its own transaction when the first has looked and not yet committed."""
    context = either.context
    await customer(either, max_live_batches=1)
    async with context.database.read() as connection:
        from batchery.store import api_keys

        (row,) = await api_keys.all_keys(connection)
    caller = Caller(owner="local", key=row.id, max_live_batches=1)
    looked, outcomes = asyncio.Event(), []

    async def make(*, first: bool) -> None:
        if not first:
            await looked.wait()
        try:
            async with context.database.write() as connection:
                await limits.check_new_batch(connection, caller, 1)
                if first:
                    looked.set()
                    # Time for the other to get as far as it can; on SQLite not even its transaction begins.
                    await asyncio.sleep(0.1)
                await batches.insert(
                    connection,
                    id=new_id(),
                    owner="local",
                    api_key=caller.key,
                    endpoint="/v1/embeddings",
                    input_file=new_id(),
                    window="24h",
                    status="validating",
                    output_file=new_id(),
                    created_at=1,
                    expires_at=2,
                    total=1,
                    metadata=batches.encode_metadata({}),
                )
            outcomes.append("made")
        except TooManyRequests:
            outcomes.append("refused")

    await asyncio.gather(make(first=True), make(first=False))
    assert outcomes == ["made", "refused"]


async def test_uploaded_bytes(either: Rig) -> None:
    data = chat_file(10)
    someone = await customer(either, max_upload_bytes=2 * len(data) + 1)
    one, two = [(await someone.upload(data)).json["id"] for _ in range(2)]
    error = refused(await someone.upload(b"xx"), "upload_bytes_exceeded", str(2 * len(data) + 1), "1 are free")
    assert "Nothing was stored" in error["message"]
    assert (await someone.upload(b"\n")).status == 200  # one byte, to the brim
    assert (await someone.ask("DELETE", f"/v1/files/{one}")).status == 200
    assert (await someone.upload(data)).status == 200
    refused(await someone.upload(data), "upload_bytes_exceeded")
    await expire(either, two)
    assert (await someone.upload(data)).status == 200
    other = await customer(either, max_upload_bytes=1)
    assert (await other.upload(b"\n")).status == 200


async def expire(rig: Rig, id: str) -> None:
    """Make a file's time be over."""
    import sqlalchemy as sa

    from batchery.store import schema

    async with rig.context.database.write() as connection:
        await connection.execute(
            sa.update(schema.files).where(schema.files.c.id == id.removeprefix("file-")).values(expires_at=1)
        )


async def test_what_a_batch_writes_does_not_count(either: Rig) -> None:
    data = chat_file(1)
    someone = await customer(either, max_upload_bytes=len(data))
    file = (await someone.upload(data)).json["id"]
    assert (await someone.create(file)).status == 200
    async with either.context.database.read() as connection:
        (row,) = [each for each in await files.page(connection, "local", limit=9) if each.purpose == "batch"]
        assert row.api_key is not None
        caller = Caller(owner="local", key=row.api_key, max_upload_bytes=len(data) + 7)
        assert await limits.upload_room(connection, caller) == 7
        assert await limits.upload_room(connection, Caller(owner="local")) is None


async def test_too_many_bytes_are_refused_before_they_are_read(rig: Rig) -> None:
    key = await make_key(rig.context, max_upload_bytes=1000)
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: 100000000\r\n\r\n"
    )
    async with asyncio.timeout(5):
        answer = await rig.raw(head.encode(), finish=False)
    refused(answer, "upload_bytes_exceeded")


async def test_too_many_bytes_are_refused_while_they_come(rig: Rig) -> None:
    key = await make_key(rig.context, max_upload_bytes=100_000)
    sent = 0

    async def body() -> Any:
        nonlocal sent
        yield b"--%b\r\n" % BOUNDARY.encode() + file_part(b"")
        while sent < 100_000_000:
            sent += 100_000
            yield b"x" * 100_000

    try:
        answer = await rig.ask("POST", "/v1/files", data=body(), headers=TYPE | bearing(key))
    except OSError:  # the server has had enough and cut the connection
        pass
    else:
        refused(answer, "upload_bytes_exceeded")
    assert rig.left_behind() == []


async def test_many_uploads_at_once_get_no_more_room_than_one_by_one(either: Rig) -> None:
    data = chat_file(20)
    someone = await customer(either, max_upload_bytes=3 * len(data) + 5)
    answers = await asyncio.gather(*(someone.upload(data) for _ in range(10)))
    assert sorted(answer.status for answer in answers) == [200] * 3 + [429] * 7
    for answer in answers:
        if answer.status == 429:
            refused(answer, "upload_bytes_exceeded")
    blobs = [name for name in either.left_behind() if name.startswith("files/")]
    assert len(blobs) == 3


async def test_a_repeated_upload_needs_no_more_room(either: Rig) -> None:
    """When the answer to the first was lost, the second must not be refused because the first came through."""
    data = chat_file(10)
    someone = await customer(either, max_upload_bytes=len(data))
    first = await someone.upload(data, **{"Idempotency-Key": "once"})
    assert first.status == 200
    assert (await someone.upload(data, **{"Idempotency-Key": "once"})).json == first.json
    refused(await someone.upload(data, **{"Idempotency-Key": "twice"}), "upload_bytes_exceeded")


def test_a_limit_s_answer_never_asks_to_wait_longer_than_clients_do(tmp_path: Path) -> None:
    error = limits.no_upload_room(Caller(owner="local", max_upload_bytes=1), -5)
    assert error.headers() == {"Retry-After": "60"}
    assert "0 are free" in error.message
