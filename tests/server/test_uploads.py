"""Uploads in parts: in any order, at once, interrupted, wrong in every way, and never half a file."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import random
import re
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa

from batchery.server import uploads as server_uploads
from batchery.server.intake import Intake
from batchery.server.openapi import document
from batchery.server.upload import OVERHEAD
from batchery.server.uploads import LIFETIME, MAX_PART
from batchery.store import files, schema, uploads
from batchery.store.blobs import BlobStore
from batchery.store.database import sqlite_url
from batchery.store.errors import StoreUnavailable
from batchery.wire.lines import Limits
from batchery.wire.uploads import MAX_PARTS
from tests.requests import chat_file
from tests.server.keys import bearing, make_key
from tests.server.rig import BOUNDARY, Answer, Rig, field_part, file_part, form, running, until

GOOD = chat_file(30)
UNKNOWN = "0" * 32


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def md5(data: bytes) -> str:
    """MD5 as hex."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def cut(data: bytes, *places: int) -> list[bytes]:
    """Bytes, cut at these places."""
    edges = [0, *places, len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


async def begin(rig: Rig, size: int, *, base: str = "/v1", headers: Any = None, **more: Any) -> Answer:
    """Create an upload."""
    body = {"filename": "input.jsonl", "purpose": "batch", "bytes": size, "mime_type": "application/jsonl"} | more
    return await rig.ask("POST", f"{base}/uploads", json=body, headers=headers)


async def begun(rig: Rig, size: int, **options: Any) -> str:
    """Create an upload; its id."""
    answer = await begin(rig, size, **options)
    assert answer.status == 200, answer
    id: str = answer.json["id"]
    return id


async def send(rig: Rig, upload: str, data: bytes, *fields: bytes, base: str = "/v1", **headers: str) -> Answer:
    """Send a part."""
    body = form(file_part(data, name="data", filename="upload"), *fields)
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"} | headers
    return await rig.ask("POST", f"{base}/uploads/{upload}/parts", data=body, headers=headers)


async def sent(rig: Rig, upload: str, *parts: bytes, **headers: str) -> list[str]:
    """Send parts one after the other; their ids."""
    answers = [await send(rig, upload, data, **headers) for data in parts]
    assert {answer.status for answer in answers} <= {200}, answers
    return [answer.json["id"] for answer in answers]


async def complete(rig: Rig, upload: str, parts: Any, *, base: str = "/v1", headers: Any = None, **more: Any) -> Answer:
    """Complete an upload."""
    body = {"part_ids": parts} | more
    return await rig.ask("POST", f"{base}/uploads/{upload}/complete", json=body, headers=headers)


async def look(rig: Rig, upload: str, **options: Any) -> Answer:
    """Get an upload."""
    return await rig.ask("GET", f"/v1/uploads/{upload}", **options)


async def cancel(rig: Rig, upload: str, **options: Any) -> Answer:
    """Cancel an upload."""
    return await rig.ask("POST", f"/v1/uploads/{upload}/cancel", **options)


async def content(rig: Rig, file: str) -> bytes:
    """A file's bytes."""
    answer = await rig.ask("GET", f"/v1/files/{file}/content")
    assert answer.status == 200, answer
    return answer.body


async def all_files(rig: Rig) -> list[str]:
    """The ids of all files there are."""
    return [file["id"] for file in (await rig.ask("GET", "/v1/files")).json["data"]]


async def noted_dead(rig: Rig) -> set[str]:
    """The blobs that are to be deleted."""
    async with rig.context.database.read() as connection:
        return set((await connection.execute(sa.select(schema.dead_blobs.c.key))).scalars())


async def part_blobs(rig: Rig) -> set[str]:
    """The blobs that parts refer to."""
    async with rig.context.database.read() as connection:
        return set((await connection.execute(sa.select(schema.upload_parts.c.blob_key))).scalars())


async def check_blobs(rig: Rig) -> None:
    """Everything in the store is referred to, or noted dead, and what is referred to is there."""
    async with rig.context.database.read() as connection:
        found = await connection.execute(sa.select(schema.files.c.blob_key, schema.files.c.index_key))
        wanted = {key for row in found for key in row if key is not None}
    wanted |= await part_blobs(rig)
    dead = await noted_dead(rig)
    assert not wanted & dead
    await until(lambda: set(rig.left_behind()) <= wanted | dead)
    assert wanted <= set(rig.left_behind())


def is_conflict(answer: Answer, code: str) -> None:
    """A state that forbids it, which no client is to try again."""
    assert answer.status == 409, answer
    assert answer.headers["x-should-retry"] == "false"
    assert answer.error()["code"] == code


async def test_a_file_in_parts_is_the_same_as_one_that_came_whole(either: Rig) -> None:
    pieces = cut(GOOD, 10, 700, len(GOOD) - 1)  # in the middle of lines
    expiry = {"anchor": "created_at", "seconds": 7200}
    upload = (await begin(either, len(GOOD), filename="/home/me/données.jsonl", expires_after=expiry)).json
    assert list(upload.items()) == [
        ("id", upload["id"]),
        ("object", "upload"),
        ("bytes", len(GOOD)),
        ("created_at", upload["created_at"]),
        ("filename", "données.jsonl"),
        ("purpose", "batch"),
        ("status", "pending"),
        ("expires_at", upload["created_at"] + 3600),
        ("file", None),
    ]
    assert re.fullmatch("upload_[0-9a-f]{32}", upload["id"])

    parts = []
    for piece in pieces:
        part = (await send(either, upload["id"], piece)).json
        assert list(part) == ["id", "object", "created_at", "upload_id"]
        assert re.fullmatch("part_[0-9a-f]{32}", part["id"])
        assert (part["object"], part["upload_id"]) == ("upload.part", upload["id"])
        parts.append(part)
    shown = (await look(either, upload["id"])).json
    assert shown == upload | {
        "parts": [part | {"bytes": len(piece), "md5": md5(piece)} for part, piece in zip(parts, pieces, strict=True)]
    }

    done = (await complete(either, upload["id"], [part["id"] for part in parts], md5=md5(GOOD))).json
    file = done["file"]
    assert done == upload | {"status": "completed", "file": file}
    whole = await either.upload(GOOD, name="données.jsonl")
    assert list(file) == list(whole)
    assert file["expires_at"] == file["created_at"] + 7200
    for name in ("object", "bytes", "filename", "purpose", "status", "status_details"):
        assert file[name] == whole[name], name
    assert (await either.ask("GET", f"/v1/files/{file['id']}")).json == file
    assert await content(either, file["id"]) == GOOD
    assert (await either.create(file["id"])).json["status"] == "validating"
    async with either.context.database.read() as connection:
        rows = [await files.get(connection, id.removeprefix("file-")) for id in (file["id"], whole["id"])]
    for column in ("owner", "sha256", "lines", "requests", "models", "groups", "problems"):
        assert len({getattr(row, column) for row in rows}) == 1, column

    assert (await look(either, upload["id"])).json == done | {"parts": []}
    assert await part_blobs(either) == set()
    assert len(await noted_dead(either)) == len(pieces)
    await check_blobs(either)


async def test_what_is_served_is_what_the_document_says(rig: Rig) -> None:
    upload = (await begin(rig, len(GOOD))).json
    part = (await send(rig, upload["id"], GOOD)).json
    shown = (await look(rig, upload["id"])).json
    schemas = document()["components"]["schemas"]
    for found, name in (
        (upload, "UploadObject"),
        (part, "PartObject"),
        (shown, "UploadWithParts"),
        (shown["parts"][0], "StoredPart"),
    ):
        assert set(found) == set(schemas[name]["properties"])
    for name in ("CreateUpload", "CompleteUpload"):
        assert schemas[name]["required"]


@pytest.mark.parametrize("base", ["/v1", "/ai/v1"])
async def test_the_official_client_uploads_in_chunks(rig: Rig, tmp_path: Path, base: str) -> None:
    data = chat_file(300)
    path = tmp_path / "big.jsonl"
    path.write_bytes(data)
    async with openai.AsyncOpenAI(base_url=rig.base + base, api_key="any", max_retries=0) as client:
        size = len(data) // 3 + 1
        done = await client.uploads.upload_file_chunked(
            file=path, mime_type="application/jsonl", purpose="batch", part_size=size, md5=md5(data)
        )
        assert (done.status, done.bytes, done.filename) == ("completed", len(data), "big.jsonl")
        assert done.file is not None
        assert (done.file.bytes, done.file.status, done.file.filename) == (len(data), "processed", "big.jsonl")
        assert (await client.files.content(done.file.id)).content == data
        from_memory = await client.uploads.upload_file_chunked(
            file=data, filename="memory.jsonl", bytes=len(data), mime_type="application/jsonl", purpose="batch"
        )
        assert from_memory.file is not None
        upload = await client.uploads.create(filename="x", bytes=5, mime_type="text/plain", purpose="batch")
        assert (await client.uploads.cancel(upload.id)).status == "cancelled"
        with pytest.raises(openai.ConflictError):
            await client.uploads.parts.create(upload.id, data=b"12345")
    assert len(await noted_dead(rig)) == 3 + 1


async def test_parts_at_once_in_any_order_and_resumed(either: Rig) -> None:
    data = chat_file(200)
    pieces = cut(data, *sorted(random.Random(1).sample(range(1, len(data)), 11)))
    upload = await begun(either, len(data))
    first = list(enumerate(pieces))[:7]
    random.Random(2).shuffle(first)
    answers = await asyncio.gather(*(send(either, upload, piece) for _, piece in first))
    assert {answer.status for answer in answers} == {200}
    # Then the client was interrupted, and only what the server says is left.
    there = {part["md5"]: part["id"] for part in (await look(either, upload)).json["parts"]}
    assert len(there) == 7
    missing = [piece for piece in pieces if md5(piece) not in there]
    assert len(missing) == 5
    there |= dict(zip(map(md5, missing), await sent(either, upload, *missing), strict=True))
    done = await complete(either, upload, [there[md5(piece)] for piece in pieces])
    assert done.status == 200
    assert await content(either, done.json["file"]["id"]) == data


async def test_parts_that_are_not_named_are_dropped(rig: Rig) -> None:
    upload = await begun(rig, len(GOOD))
    head, tail = cut(GOOD, 500)
    lost, a, again, b = await sent(rig, upload, head, head, b"x" * 7, tail)
    done = await complete(rig, upload, [a, b])
    assert await content(rig, done.json["file"]["id"]) == GOOD
    assert len(await noted_dead(rig)) == 4
    assert len({lost, a, again, b}) == 4


async def test_many_parts(rig: Rig) -> None:
    data = chat_file(4)
    upload = await begun(rig, len(data))
    parts = []
    for start in range(0, len(data), 50):
        batch = [data[i : i + 1] for i in range(start, min(start + 50, len(data)))]
        answers = await asyncio.gather(*(send(rig, upload, piece) for piece in batch))
        parts += [answer.json["id"] for answer in answers]
    done = await complete(rig, upload, parts, md5=md5(data))
    assert await content(rig, done.json["file"]["id"]) == data


async def test_an_empty_file_and_empty_parts(rig: Rig) -> None:
    upload = await begun(rig, 0)
    file = (await complete(rig, upload, [])).json["file"]
    assert (file["bytes"], file["status"]) == (0, "error")
    assert "has no requests" in file["status_details"]
    upload = await begun(rig, len(GOOD))
    parts = await sent(rig, upload, b"", GOOD, b"")
    assert await content(rig, (await complete(rig, upload, parts)).json["file"]["id"]) == GOOD
    await check_blobs(rig)


async def test_a_file_with_bad_lines_completes_and_says_so(rig: Rig) -> None:
    bad = GOOD + b"nonsense\n" + GOOD
    upload = await begun(rig, len(bad))
    done = (await complete(rig, upload, await sent(rig, upload, *cut(bad, len(GOOD) + 3)))).json
    assert done["status"] == "completed"
    assert done["file"]["status"] == "error"
    assert "Line 31" in done["file"]["status_details"]


BAD_CREATIONS: list[tuple[dict[str, Any], str | None]] = [
    ({"filename": None}, "filename"),
    ({"filename": ""}, "filename"),
    ({"filename": 5}, "filename"),
    ({"filename": "\ud800"}, None),
    ({"purpose": None}, "purpose"),
    ({"purpose": "fine-tune"}, "purpose"),
    ({"purpose": "batch_output"}, "purpose"),
    ({"purpose": ["batch"]}, "purpose"),
    ({"bytes": None}, "bytes"),
    ({"bytes": -1}, "bytes"),
    ({"bytes": "5"}, "bytes"),
    ({"bytes": 5.0}, "bytes"),
    ({"bytes": True}, "bytes"),
    ({"mime_type": None}, "mime_type"),
    ({"mime_type": ""}, "mime_type"),
    ({"mime_type": "x" * 256}, "mime_type"),
    ({"mime_type": "text/\0plain"}, "mime_type"),
    ({"mime_type": "text/données"}, "mime_type"),
    ({"expires_after": 3600}, "expires_after"),
    ({"expires_after": {"seconds": 3600}}, "expires_after.anchor"),
    ({"expires_after": {"anchor": "created_at"}}, "expires_after.seconds"),
    ({"expires_after": {"anchor": "created_at", "seconds": 3599}}, "expires_after.seconds"),
    ({"expires_after": {"anchor": "created_at", "seconds": 3600.0}}, "expires_after.seconds"),
    ({"expires_after": {"anchor": "created_at", "seconds": True}}, "expires_after.seconds"),
]


async def test_a_wrong_creation_is_refused(rig: Rig) -> None:
    for wrong, param in BAD_CREATIONS:
        answer = await begin(rig, 5, **wrong)
        assert (answer.status, answer.error()["param"]) == (400, param), (wrong, answer)
    for body in (b"", b"[]", b"null", b"{", b'{"bytes": 1, "bytes": 2}', b"\xff", b"[" * 10_000):
        for path in ("uploads", f"uploads/upload_{UNKNOWN}/complete"):
            answer = await rig.ask("POST", f"/v1/{path}", data=body)
            assert answer.status == 400, (path, body, answer)
            answer.error()
    for path in ("uploads", f"uploads/upload_{UNKNOWN}/complete"):
        assert (await rig.ask("POST", f"/v1/{path}", data=b" " * 3_000_000)).status == 413


async def test_names_are_made_fit_to_be_shown(either: Rig) -> None:
    for name, shown in (("../../etc/passwd", "passwd"), ("a\0b", "ab"), ("/", "upload"), ("x" * 9_000, "x" * 255)):
        answer = await begin(either, 5, filename=name)
        assert (answer.status, answer.json["filename"]) == (200, shown)


async def test_a_file_over_the_limit_is_refused_at_once(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "small.db")
    async with running(url, tmp_path, limits=Limits(file_bytes=len(GOOD))) as rig:
        for size in (len(GOOD) + 1, 1 << 64, 10**4000):
            answer = await begin(rig, size)
            assert answer.status in (413, 400), answer
            assert str(len(GOOD)) in answer.error()["message"] or size == 10**4000
        upload = await begun(rig, len(GOOD))
        parts = await sent(rig, upload, GOOD)
        assert (await complete(rig, upload, parts)).status == 200
        pending = await begun(rig, len(GOOD))
        part = await sent(rig, pending, GOOD)
    async with running(url, tmp_path, limits=Limits(file_bytes=len(GOOD) - 1)) as rig:  # which has come down since
        answer = await complete(rig, pending, part)
        assert answer.status == 413
        assert (await look(rig, pending)).json["status"] == "pending"
        await check_blobs(rig)


PART = file_part(b"12345", name="data")

BAD_PARTS = [
    ("nothing", form(), "data"),
    ("another name", form(file_part(b"12345", name="file")), "data"),
    ("two parts", form(PART, PART), "data"),
    ("a wrong MD5", form(PART, field_part("md5", "0" * 32)), "data"),
    ("a wrong MD5 first", form(field_part("md5", "0" * 32), PART), "data"),
    ("no MD5", form(PART, field_part("md5", "five")), "md5"),
    ("an empty MD5", form(PART, field_part("md5", "")), "md5"),
    ("two MD5s", form(PART, field_part("md5", md5(b"12345")), field_part("md5", md5(b"12345"))), "md5"),
    ("cut off", form(PART)[:-5], None),
    ("empty", b"", None),
]


async def test_a_bad_part_is_refused_and_leaves_nothing(rig: Rig) -> None:
    upload = await begun(rig, 100)
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    for case, body, param in BAD_PARTS:
        answer = await rig.ask("POST", f"/v1/uploads/{upload}/parts", data=body, headers=headers)
        assert (answer.status, answer.error()["param"]) == (400, param), (case, answer)
        assert rig.left_behind() == [], case
    answer = await rig.ask("POST", f"/v1/uploads/{upload}/parts", data=b"12345")
    assert (answer.status, answer.error()["code"]) == (400, "invalid_content_type")
    assert (await look(rig, upload)).json["parts"] == []


async def test_the_checksum_of_a_part_is_checked(rig: Rig) -> None:
    upload = await begun(rig, 100)
    right = md5(b"12345")
    in_base64 = base64.b64encode(bytes.fromhex(right)).decode()
    for good in (right, right.upper(), in_base64):
        assert (await send(rig, upload, b"12345", field_part("md5", good))).status == 200
        assert (await send(rig, upload, b"12345", **{"Content-MD5": good})).status == 200
    stored = rig.left_behind()
    assert len(stored) == 6
    for wrong in (md5(b"12346"), in_base64[::-1][2:] + "==", right[:-1], "ü" * 32):
        answer = await send(rig, upload, b"12345", field_part("md5", wrong))
        assert answer.status == 400, wrong
    answer = await send(rig, upload, b"12345", **{"Content-MD5": md5(b"12346")})
    assert answer.error()["code"] == "checksum_mismatch"
    for known in (right, md5(b"12346")):  # what was expected, and what was found
        assert known in answer.error()["message"]
    assert (await send(rig, upload, b"12345", field_part("md5", right), **{"Content-MD5": "x"})).status == 400
    assert (await send(rig, upload, b"12345", field_part("md5", md5(b"x")), **{"Content-MD5": right})).status == 400
    assert rig.left_behind() == stored
    assert len((await look(rig, upload)).json["parts"]) == 6


async def test_a_part_has_an_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PART == 64 << 20
    head = f"POST /v1/uploads/{await begun(rig, 200_000_000)}/parts HTTP/1.1\r\nHost: x\r\n"
    head += (
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: {MAX_PART + OVERHEAD + 1}\r\n\r\n"
    )
    answer = await rig.raw(head.encode(), finish=False)
    assert answer.status == 413
    assert str(MAX_PART) in answer.error()["message"]
    monkeypatch.setattr(server_uploads, "MAX_PART", 3_000_000)
    upload = await begun(rig, 20_000_000)
    assert (await send(rig, upload, b"x" * 3_000_000)).status == 200
    for over in (1, 2 * OVERHEAD):
        answer = await send(rig, upload, b"x" * (3_000_000 + over))
        assert (answer.status, answer.error()["param"]) == (413, "data")
    assert len(rig.left_behind()) == 1


async def test_an_upload_has_room_for_parts_that_were_lost_and_no_more(rig: Rig) -> None:
    upload = await begun(rig, 1000)
    for _ in range(2):
        await sent(rig, upload, b"x" * 999)
    answer = await send(rig, upload, b"xyz")
    assert (answer.status, answer.error()["code"]) == (413, "upload_too_large")
    await sent(rig, upload, b"xy", b"")
    assert len(rig.left_behind()) == 4
    other = await begun(rig, 100_000)  # refused before its bytes are taken
    answer = await send(rig, other, b"x" * 1_000_000)
    assert (answer.status, answer.error()["code"]) == (413, "upload_too_large")
    answers = await asyncio.gather(*(send(rig, other, b"x" * 60_000) for _ in range(6)))
    assert sorted(answer.status for answer in answers) == [200] * 3 + [413] * 3
    await until(lambda: len(rig.left_behind()) == 7)


async def test_an_upload_has_an_end_of_parts(either: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PARTS == 10_000
    monkeypatch.setattr(server_uploads, "MAX_PARTS", 3)
    upload = await begun(either, 1000)
    answers = await asyncio.gather(*(send(either, upload, b"x") for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [200] * 3 + [400] * 2
    assert (await send(either, upload, b"x")).error()["code"] == "too_many_parts"
    await until(lambda: len(either.left_behind()) == 3)


async def test_a_wrong_completion_says_why_and_the_upload_goes_on(either: Rig) -> None:
    upload, foreign = await begun(either, len(GOOD)), await begun(either, len(GOOD))
    head, tail = cut(GOOD, 500)
    a, b = await sent(either, upload, head, tail)
    (c,) = await sent(either, foreign, GOOD)
    stored = either.left_behind()
    wrong: list[tuple[Any, str | None, list[str]]] = [
        (None, "part_ids", ["required"]),
        ("x", "part_ids", ["array"]),
        ({"0": a}, "part_ids", ["array"]),
        ([a, 5], "part_ids.1", ["string"]),
        ([a, None], "part_ids.1", ["string"]),
        ([a, "nonsense"], "part_ids.1", ["nonsense"]),
        ([a, f"part_{UNKNOWN}"], "part_ids.1", [UNKNOWN]),
        ([a, c], "part_ids.1", [c]),
        ([a, b.replace("part_", "file-")], "part_ids.1", [b.removeprefix("part_")]),
        ([a, upload], "part_ids.1", [upload]),
        ([a, b, a], "part_ids.2", [a, "part_ids[0]"]),
        ([a, a.removeprefix("part_")], "part_ids.1", [a]),
        ([a, "x\0"], "part_ids.1", []),
        ([a], "part_ids", ["500", str(len(GOOD))]),
        ([], "part_ids", ["0", str(len(GOOD))]),
        ([a] * (MAX_PARTS + 1), "part_ids", [str(MAX_PARTS)]),
    ]
    for ids, param, named in wrong:
        answer = await complete(either, upload, ids)
        assert (answer.status, answer.error()["param"]) == (400, param), (ids, answer)
        for text in named:
            assert text in answer.error()["message"], (ids, answer)
        assert either.left_behind() == stored
    for digest, expected in ((5, "md5"), ("", "md5"), (md5(GOOD)[1:], "md5"), ([md5(GOOD)], "md5")):
        answer = await complete(either, upload, [a, b], md5=digest)
        assert (answer.status, answer.error()["param"]) == (400, expected), digest
    for order in ([a, b], [b, a]):
        answer = await complete(either, upload, order, md5=md5(b"else"))
        found = md5(GOOD if order == [a, b] else tail + head)
        assert (answer.status, answer.error()["code"]) == (400, "checksum_mismatch")
        assert found in answer.error()["message"]
        assert md5(b"else") in answer.error()["message"]
    assert either.left_behind() == stored
    assert await all_files(either) == []
    assert (await look(either, upload)).json["status"] == "pending"
    # All forms of an id, and both of an MD5.
    bare = [a.removeprefix("part_"), b.replace("_", "-")]
    digest = base64.b64encode(bytes.fromhex(md5(GOOD))).decode()
    done = await complete(either, upload.removeprefix("upload_"), bare, md5=digest, base="/ai/v1")
    assert await content(either, done.json["file"]["id"]) == GOOD
    await check_blobs(either)


async def test_who_repeats_a_completion_gets_the_same_answer(either: Rig) -> None:
    upload = await begun(either, len(GOOD))
    parts = await sent(either, upload, GOOD)
    done = await complete(either, upload, parts)
    for ids in (parts, parts, [], [f"part_{UNKNOWN}"]):
        again = await complete(either, upload, ids)
        assert (again.status, again.json) == (200, done.json)
    assert await all_files(either) == [done.json["file"]["id"]]
    is_conflict(await send(either, upload, b"x"), "upload_completed")
    is_conflict(await cancel(either, upload), "upload_completed")
    await check_blobs(either)
    # The file is a file of its own; when it is gone, the upload has none.
    assert (await either.ask("DELETE", f"/v1/files/{done.json['file']['id']}")).status == 200
    for shown in (await look(either, upload), await complete(either, upload, parts)):
        assert shown.status == 200
        assert (shown.json["status"], shown.json["file"]) == ("completed", None)


async def test_of_completions_at_once_one_makes_the_file(either: Rig) -> None:
    for turn in range(3):
        data = chat_file(500, mark=str(turn))
        upload = await begun(either, len(data))
        parts = await sent(either, upload, *cut(data, 9_000, 30_000))
        answers = await asyncio.gather(*(complete(either, upload, parts, md5=md5(data)) for _ in range(4)))
        assert {answer.status for answer in answers} == {200}
        assert len({answer.body for answer in answers}) == 1
        assert len(await all_files(either)) == turn + 1
        await check_blobs(either)


class _Gate:
    """Holds completions just before the transaction that ends them.

    Args:
        monkeypatch: to put it there.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrived, self.open = asyncio.Event(), asyncio.Event()
        real = Intake.finish

        async def held(intake: Intake) -> Any:
            taken = await real(intake)
            self.arrived.set()
            await self.open.wait()
            return taken

        monkeypatch.setattr(Intake, "finish", held)


async def test_a_cancellation_during_a_completion_wins(either: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = await begun(either, len(GOOD))
    parts = await sent(either, upload, GOOD)
    gate = _Gate(monkeypatch)
    completing = asyncio.create_task(complete(either, upload, parts))
    await gate.arrived.wait()
    assert (await cancel(either, upload)).json["status"] == "cancelled"
    gate.open.set()
    is_conflict(await completing, "upload_cancelled")
    assert await all_files(either) == []
    assert await part_blobs(either) == set()
    await check_blobs(either)


async def test_a_part_that_comes_during_a_completion_goes_with_it(either: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = await begun(either, len(GOOD))
    parts = await sent(either, upload, GOOD)
    gate = _Gate(monkeypatch)
    completing = asyncio.create_task(complete(either, upload, parts))
    await gate.arrived.wait()
    await sent(either, upload, b"late")
    gate.open.set()
    assert (await completing).status == 200
    is_conflict(await send(either, upload, b"too late"), "upload_completed")
    assert await part_blobs(either) == set()
    assert len(await noted_dead(either)) == 2
    await check_blobs(either)


async def test_a_completion_that_began_in_time_may_end_late(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    async with running(database_url, tmp_path, clock=clock) as rig:
        kept, swept = await begun(rig, len(GOOD)), await begun(rig, len(GOOD))
        parts = {upload: await sent(rig, upload, GOOD) for upload in (kept, swept)}
        gate = _Gate(monkeypatch)
        clock.now += LIFETIME - 1
        completing = {upload: asyncio.create_task(complete(rig, upload, parts[upload])) for upload in (kept, swept)}
        await until(lambda: len([key for key in rig.left_behind() if key.startswith("index/")]) == 2)
        clock.now += 1
        async with rig.context.database.write() as connection:  # as the sweep does, but for one of them
            await connection.execute(
                sa.update(schema.uploads)
                .where(schema.uploads.c.id == kept.removeprefix("upload_"))
                .values(expires_at=int(clock.now) + 1)
            )
            assert await uploads.sweep(connection, int(clock.now), 10) > 0
            await connection.execute(
                sa.update(schema.uploads)
                .where(schema.uploads.c.id == kept.removeprefix("upload_"))
                .values(expires_at=int(clock.now))
            )
        gate.open.set()
        assert (await completing[kept]).json["status"] == "completed"
        is_conflict(await completing[swept], "upload_expired")
        assert len(await all_files(rig)) == 1
        await check_blobs(rig)


async def test_an_upload_expires_after_an_hour(database_url: str, tmp_path: Path) -> None:
    clock = Clock()
    async with running(database_url, tmp_path, clock=clock) as rig:
        upload = await begun(rig, len(GOOD))
        parts = await sent(rig, upload, GOOD)
        clock.now += LIFETIME - 1
        assert (await look(rig, upload)).json["status"] == "pending"
        clock.now += 1
        for is_swept in (False, True):
            shown = (await look(rig, upload)).json
            assert (shown["status"], shown["file"], shown["parts"]) == ("expired", None, [])
            is_conflict(await send(rig, upload, b"x"), "upload_expired")
            is_conflict(await complete(rig, upload, parts), "upload_expired")
            is_conflict(await cancel(rig, upload), "upload_expired")
            assert len(await noted_dead(rig)) == is_swept
            async with rig.context.database.write() as connection:
                assert (await uploads.sweep(connection, int(clock.now), 10) > 0) != is_swept
        await check_blobs(rig)
        clock.now += uploads.KEPT
        async with rig.context.database.write() as connection:
            await uploads.sweep(connection, int(clock.now), 10)
        for answer in (await look(rig, upload), await send(rig, upload, b"x"), await complete(rig, upload, parts)):
            assert answer.status == 404


async def test_a_cancelled_upload_is_over(either: Rig) -> None:
    upload = await begun(either, len(GOOD))
    parts = await sent(either, upload, *cut(GOOD, 100))
    answer = await cancel(either, upload)
    assert (answer.status, answer.json["status"], answer.json["file"]) == (200, "cancelled", None)
    assert await part_blobs(either) == set()
    assert len(await noted_dead(either)) == 2
    assert (await look(either, upload)).json["parts"] == []
    for again in (
        await cancel(either, upload),
        await send(either, upload, b"x"),
        await complete(either, upload, parts),
    ):
        is_conflict(again, "upload_cancelled")
    await check_blobs(either)


async def test_what_is_not_there_and_what_is_somebody_else_s_look_the_same(either: Rig) -> None:
    mine, yours = [bearing(await make_key(either.context, owner)) for owner in ("me", "you")]
    upload = await begun(either, len(GOOD), headers=mine)
    (part,) = await sent(either, upload, GOOD, **mine)
    for id in (upload, f"upload_{UNKNOWN}", "upload_x", "%00", upload.replace("upload_", "file-"), "x" * 4000):
        for answer in (
            await look(either, id, headers=yours),
            await cancel(either, id, headers=yours),
            await complete(either, id, [part], headers=yours),
            await send(either, id, b"x", **yours),
        ):
            assert answer.status == 404, (id, answer)
            error = answer.error()
            assert error["param"] == "id"
            assert error["message"].startswith("No such Upload object: ")
    own = await begun(either, len(GOOD), headers=yours)
    answer = await complete(either, own, [part], headers=yours)
    assert (answer.status, answer.error()["code"]) == (400, "unknown_part")
    assert (await complete(either, upload, [part], headers=mine)).status == 200
    async with either.context.database.read() as connection:
        assert (await connection.execute(sa.select(schema.files.c.owner))).scalar_one() == "me"
        key = (await connection.execute(sa.select(schema.files.c.api_key))).scalar_one()
        begun_with = sa.select(schema.uploads.c.api_key).where(schema.uploads.c.owner == "me")
        assert key == (await connection.execute(begun_with)).scalar_one()


async def test_parts_count_against_the_quota_until_they_are_a_file(either: Rig) -> None:
    mine = bearing(await make_key(either.context, max_upload_bytes=len(GOOD) + 10))
    refused = await begin(either, len(GOOD) + 11, headers=mine)
    assert (refused.status, refused.error()["code"]) == (429, "upload_bytes_exceeded")
    upload = await begun(either, len(GOOD), headers=mine)
    other = await begun(either, len(GOOD), headers=mine)
    parts = await sent(either, upload, *cut(GOOD, 100), **mine)
    refused = await send(either, other, b"x" * 11, **mine)
    assert (refused.status, refused.error()["code"]) == (429, "upload_bytes_exceeded")
    refused = await send(either, other, b"x" * 200_000, **mine)
    assert refused.status in (413, 429)
    assert len(either.left_behind()) == 2
    done = await complete(either, upload, parts, headers=mine)
    assert done.status == 200
    await sent(either, other, b"x" * 10, **mine)
    assert (await send(either, other, b"x", **mine)).status == 429
    assert (await either.ask("DELETE", f"/v1/files/{done.json['file']['id']}", headers=mine)).status == 200
    await sent(either, other, b"x", **mine)


async def test_a_failing_disk_is_said_and_leaves_the_upload_pending(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = await begun(rig, len(GOOD))
    parts = await sent(rig, upload, GOOD)
    stored = rig.left_behind()

    async def broken(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("the disk is gone")

    for name in ("write", "close"):
        with monkeypatch.context() as patch:
            patch.setattr(f"batchery.store.blobs.Writer.{name}", broken)
            assert (await send(rig, upload, b"x" * 10)).status == 503
            assert (await complete(rig, upload, parts)).status == 503
    for module, name in (("uploads", "insert_part"), ("files", "insert"), ("uploads", "end")):
        with monkeypatch.context() as patch:
            patch.setattr(f"batchery.store.{module}.{name}", broken)
            answer = await (send(rig, upload, b"x") if name == "insert_part" else complete(rig, upload, parts))
            assert answer.status == 503
            assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert rig.left_behind() == stored
    assert await all_files(rig) == []
    assert (await complete(rig, upload, parts)).status == 200
    await check_blobs(rig)


async def test_blobs_stay_when_the_row_may_be_there_after_all(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = await begun(rig, len(GOOD))

    async def lost(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("the connection was lost")

    with monkeypatch.context() as patch:
        patch.setattr(uploads, "get_part", lost)  # the insert is done, the commit fails, and nobody can be asked
        assert (await send(rig, upload, GOOD)).status == 503
    assert len(rig.left_behind()) == 1


async def test_parts_that_vanish_under_a_completion(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their blobs go some time after the upload has ended: whoever still reads them learns what has become of it."""
    gone = await begun(rig, len(GOOD))
    parts = await sent(rig, gone, GOOD)
    (blob,) = await part_blobs(rig)
    await rig.context.blobs.delete([blob])
    answer = await complete(rig, gone, parts)  # which nobody has ended: the store has lost it
    assert answer.status == 503
    real = BlobStore.stream

    def ended_meanwhile(end: Awaitable[Answer]) -> Any:
        async def stream(*arguments: Any, **options: Any) -> AsyncIterator[bytes]:
            monkeypatch.setattr(BlobStore, "stream", real)
            await end
            raise StoreUnavailable("no such blob")
            yield b""

        return stream

    for ending, status in (("cancel", 409), ("complete", 200)):
        upload = await begun(rig, len(GOOD))
        parts = await sent(rig, upload, GOOD)
        end = cancel(rig, upload) if ending == "cancel" else complete(rig, upload, parts)
        monkeypatch.setattr(BlobStore, "stream", ended_meanwhile(end))
        answer = await complete(rig, upload, parts)
        assert answer.status == status, answer
    assert len(await all_files(rig)) == 1


async def test_a_client_that_goes_away_in_a_part_leaves_nothing(rig: Rig) -> None:
    upload = await begun(rig, 90_000_000)
    _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    head = f"POST /v1/uploads/{upload}/parts HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; "
    head += f"boundary={BOUNDARY}\r\nContent-Length: 60000000\r\n\r\n"
    writer.write(head.encode() + form(file_part(b"x" * 16_000_000, name="data"))[:-20])
    await until(rig.left_behind)
    writer.transport.abort()
    await until(lambda: not rig.left_behind())
    assert (await look(rig, upload)).json["parts"] == []


async def test_there_are_so_many_places_for_completions_as_for_uploads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(sqlite_url(tmp_path / "places.db"), tmp_path, max_uploads=1) as rig:
        one, two = await begun(rig, len(GOOD)), await begun(rig, len(GOOD))
        parts = {upload: await sent(rig, upload, GOOD) for upload in (one, two)}
        gate = _Gate(monkeypatch)
        completing = asyncio.create_task(complete(rig, one, parts[one]))
        await gate.arrived.wait()
        refused = await complete(rig, two, parts[two])
        assert (refused.status, refused.error()["code"]) == (429, "too_many_uploads")
        gate.open.set()
        assert (await completing).status == 200
        assert (await complete(rig, two, parts[two])).status == 200
