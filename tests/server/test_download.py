"""Complete files as HTTP wants them: entity tags, conditions, ranges and content codings."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
import zlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchery.server import compress
from batchery.server.compress import CODINGS, Coding, compressed
from batchery.server.download import byte_range, chosen
from batchery.store import blobs as blob_store
from batchery.store.errors import StoreUnavailable
from tests.requests import chat_file
from tests.server.rig import Answer, Growing, Rig

DATA = chat_file(50, mark="é\x7f")
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
async def plain(rig: Rig) -> AsyncIterator[Rig]:
    """A server, asked by a client that adds no headers and decodes nothing by itself."""
    await rig.http.close()
    async with aiohttp.ClientSession(auto_decompress=False, skip_auto_headers=["Accept-Encoding"]) as session:
        rig.http = session
        yield rig


async def content(rig: Rig, id: str, query: str = "", method: str = "GET", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await rig.ask(method, f"/v1/files/{id}/content{query}", headers=named)


def decoded(coding: str | None, body: bytes) -> bytes:
    """A body, decoded as clients do that stop at the end of the first gzip member or zstd frame."""
    decoder: Any
    if coding is None:
        return body
    if coding == "gzip":
        decoder = zlib.decompressobj(zlib.MAX_WBITS | 16)
    else:
        from backports.zstd import ZstdDecompressor

        decoder = ZstdDecompressor()
    data: bytes = decoder.decompress(body)
    assert decoder.eof, "the body ends too early"
    assert decoder.unused_data == b"", "there is something behind its end"
    return data


# What a client accepts


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        (None, None),
        ("", None),
        ("gzip, deflate", "gzip"),  # the official SDKs
        ("gzip, deflate, br, zstd", "zstd"),  # browsers
        ("GZip", "gzip"),
        ("x-gzip", "gzip"),
        ("zstd;q=0.5, gzip;q=0.9", "gzip"),
        ("zstd;q=0.5,gzip;q=0.5", "zstd"),
        ("gzip;q=0", None),
        ("gzip;q=0.000", None),
        ("gzip;q=0, zstd", "zstd"),
        ("*", "zstd"),
        ("*;q=0", None),
        ("zstd;q=0, *", "gzip"),
        ("gzip;q=0.5, *;q=0.1", "gzip"),
        ("br, deflate", None),
        ("identity", None),
        ("identity, gzip;q=0.5", None),
        ("identity;q=0.5, gzip;q=0.5", "gzip"),
        ("identity;q=0.5, gzip;q=0.6", "gzip"),
        ("*, identity;q=0.1", "zstd"),
        ("gzip ; q=0.7 , identity ; q=0.3", "gzip"),
        ("gzip\t;\tQ=1.000", "gzip"),
        ("gzip;q=1.5", None),  # not a weight: passed over
        ("gzip;q=-1", None),
        ("gzip;q=nan", None),
        ("gzip;q=", None),
        ("gzip;level=9", None),
        ("g zip", None),
        (",,gzip,,", "gzip"),
        ("gzip, gzip;q=0", "gzip"),
        ("é, gzip", "gzip"),
        ("gzip" * 3000, None),
    ],
)
def test_the_coding_is_the_one_that_the_client_weighs_most(accept: str | None, wanted: str | None) -> None:
    assert chosen(accept, 10_000) == wanted


@pytest.mark.parametrize(
    ("accept", "wanted"), [("gzip", None), ("gzip, identity;q=0", "gzip"), ("gzip, *;q=0", "gzip")]
)
def test_what_is_tiny_is_compressed_only_for_those_who_take_nothing_else(accept: str, wanted: str | None) -> None:
    assert chosen(accept, 1023) == wanted
    assert chosen(accept, 1024) == "gzip"
    assert chosen(accept, 10_000, ranged=True) == wanted


@given(st.text(max_size=40) | st.text(alphabet="gzipstd*;q=01., identity-", max_size=40))
def test_any_text_may_be_accepted(accept: str) -> None:
    assert chosen(accept, 10_000) in (None, *CODINGS)


# Ranges


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=0-99", (0, 100)),
        ("bytes=0-100", (0, 100)),
        ("bytes=99-", (99, 100)),
        ("bytes=-1", (99, 100)),
        ("bytes=-100", (0, 100)),
        ("bytes=-101", (0, 100)),
        ("Bytes = 5 - 9", (5, 10)),
        ("bytes=5-9,", (5, 10)),
        ("bytes=0005-0009", (5, 10)),
        ("bytes=0-" + "9" * 900, (0, 100)),
        ("bytes=0-" + "9" * 8000, None),
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("bytes=", None),
        ("bytes", None),
        ("bytes=a-b", None),
        ("bytes=1-2,4-5", None),
        ("bytes=-1-5", None),
        ("bytes=+1-5", None),
        ("bytes=1_0-20", None),
        ("bytes=١-٢", None),
        ("bytes=0x1-2", None),
        ("lines=0-5", None),
        ("0-5", None),
        ("", None),
        (None, None),
    ],
)
def test_one_range_is_understood_and_everything_else_ignored(value: str | None, wanted: tuple[int, int] | None) -> None:
    assert byte_range(value, 100) == wanted


@pytest.mark.parametrize("value", ["bytes=100-", "bytes=100-200", "bytes=-0", "bytes=" + "9" * 900 + "-"])
def test_a_range_behind_the_end_is_empty(value: str) -> None:
    found = byte_range(value, 100)
    assert found is not None
    assert found[0] >= found[1]
    assert byte_range(value, 0) is None


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=60),
    first=st.none() | st.integers(0, 70),
    last=st.none() | st.integers(0, 70),
    read=st.integers(1, 30),
)
async def test_a_range_is_that_part_of_the_file(
    plain: Rig, data: bytes, first: int | None, last: int | None, read: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blob_store, "READ", read)
        uploaded = await plain.upload(data)
        value = f"bytes={'' if first is None else first}-{'' if last is None else last}"
        answer = await content(plain, uploaded["id"], Range=value)
    if not data or (first is None and last is None) or (first is not None and last is not None and last < first):
        assert (answer.status, answer.body) == (200, data)
        assert "content-range" not in answer.headers
        return
    start = max(0, len(data) - (last or 0)) if first is None else first
    part = data[start:] if first is None or last is None else data[start : last + 1]
    if not part:
        assert answer.status == 416
        assert answer.headers["content-range"] == f"bytes */{len(data)}"
        assert answer.error()["code"] == "range_not_satisfiable"
        return
    assert (answer.status, answer.body) == (206, part)
    assert answer.headers["content-range"] == f"bytes {start}-{start + len(part) - 1}/{len(data)}"
    assert answer.headers["content-length"] == str(len(part))
    whole = await content(plain, uploaded["id"], method="HEAD")
    for name in ("etag", "x-last-line", "x-incomplete", "content-type", "accept-ranges", "vary"):
        assert answer.headers[name] == whole.headers[name], name


async def test_several_range_headers_are_several_ranges(rig: Rig) -> None:
    uploaded = await rig.upload(DATA)
    head = f"GET /v1/files/{uploaded['id']}/content HTTP/1.1\r\nHost: x\r\nRange: bytes=0-1\r\nRange: bytes=3-4\r\n\r\n"
    answer = await rig.raw(head.encode(), finish=False)
    assert (answer.status, answer.body) == (200, DATA)


async def test_a_broken_download_is_taken_up_where_it_ended(plain: Rig) -> None:
    uploaded = await plain.upload(DATA)
    first = await content(plain, uploaded["id"], Range="bytes=0-999")
    tag = first.headers["etag"]
    rest = await content(plain, uploaded["id"], Range="bytes=1000-", If_Range=tag, Accept_Encoding="gzip, deflate")
    assert (first.status, rest.status) == (206, 206)
    assert first.body + rest.body == DATA
    for other in ('"another"', f"W/{tag}", tag.strip('"'), "Sat, 01 Jan 2022 00:00:00 GMT", f"{tag}, {tag}", "*"):
        answer = await content(plain, uploaded["id"], Range="bytes=1000-", If_Range=other)
        assert (answer.status, answer.body) == (200, DATA), other
    behind = await content(plain, uploaded["id"], Range="bytes=999999-", If_Range='"another"')
    assert behind.status == 200


async def test_a_range_of_lines_is_no_range_of_bytes(plain: Rig) -> None:
    """Both at once: the lines are sent, and the status says that the range was not applied."""
    uploaded = await plain.upload(DATA)
    lines = DATA.splitlines(keepends=True)
    for query, wanted in (
        ("?offset=48", lines[48:]),
        ("?skip=48", lines[48:]),
        ("?limit=2", lines[:2]),
        ("?limit=50", lines),
    ):
        answer = await content(
            plain, uploaded["id"], query, Range="bytes=0-4", If_None_Match="*", Accept_Encoding="zstd"
        )
        assert (answer.status, answer.body) == (200, b"".join(wanted))
        assert not {"etag", "accept-ranges", "content-range", "content-encoding"} & set(answer.headers)
        assert answer.headers["cache-control"] == "no-store"
    assert (await content(plain, uploaded["id"], "?offset=0", Range="bytes=0-4")).status == 206


# Entity tags


async def test_the_tag_is_the_hash_and_another_one_for_each_coding(plain: Rig) -> None:
    uploaded = await plain.upload(DATA)
    tags = {}
    for coding in (None, *CODINGS):
        answer = await content(plain, uploaded["id"], Accept_Encoding=coding or "identity")
        assert answer.headers.get("content-encoding") == coding
        assert decoded(coding, answer.body) == DATA
        tags[coding] = answer.headers["etag"]
    assert tags == {None: f'"{SHA}"', "gzip": f'"{SHA}-gzip"', "zstd": f'"{SHA}-zstd"'}
    for coding, tag in tags.items():
        for asked_as, other in tags.items():
            answer = await content(
                plain, uploaded["id"], Accept_Encoding=asked_as or "identity", If_None_Match=f'"x,y", W/{tag} ,"z"'
            )
            if coding != asked_as:
                assert (answer.status, answer.headers["etag"]) == (200, other)
                continue
            assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", tag)
            assert answer.headers["x-last-line"] == "50"
            assert answer.headers["x-incomplete"] == "false"
            assert answer.headers["vary"] == "Accept-Encoding"
            assert not {"content-length", "content-encoding", "content-range", "content-type"} & set(answer.headers)


async def test_what_the_client_has_already(plain: Rig) -> None:
    uploaded = await plain.upload(DATA)
    same = ("*", " * ", f'"{SHA}"', f'W/"{SHA}"', f'"a","{SHA}","b"')
    other = (f'"a, {SHA}"', SHA, f"'{SHA}'", f'"{SHA}', f'"{SHA.upper()}"', '""', "", ",,,", '"' * 2001, '"é\xff"')
    for condition in (*same, *other):
        whole = await content(plain, uploaded["id"], If_None_Match=condition)
        ranged = await content(plain, uploaded["id"], If_None_Match=condition, Range="bytes=0-4")
        if condition in same:
            assert [(answer.status, answer.body) for answer in (whole, ranged)] == [(304, b"")] * 2, condition
        else:
            assert (whole.status, whole.body) == (200, DATA), condition
            assert (ranged.status, ranged.body) == (206, DATA[:5]), condition


async def test_another_version_than_the_client_wants(plain: Rig) -> None:
    uploaded = await plain.upload(DATA)
    for condition in (f'"{SHA}"', f'"x", "{SHA}"', "*"):
        answer = await content(plain, uploaded["id"], If_Match=condition, Range="bytes=1-2")
        assert (answer.status, answer.body) == (206, DATA[1:3])
    for condition in ('"x"', f'W/"{SHA}"', SHA):
        answer = await content(plain, uploaded["id"], If_Match=condition, If_None_Match="*")
        assert (answer.status, answer.error()["code"]) == (412, "precondition_failed")
        assert f'"{SHA}"' in answer.error()["message"]


async def test_a_growing_file_has_no_tag_no_range_and_no_coding(plain: Rig) -> None:
    growing = Growing(plain.context)
    await growing.begin()
    lines = DATA.splitlines(keepends=True)
    await growing.grow(*lines[:25])
    asked = {"Range": "bytes=0-4", "If_None_Match": "*", "If_Range": '"x"', "Accept_Encoding": "zstd"}
    answer = await content(plain, growing.file, **asked)
    assert (answer.status, answer.body) == (200, b"".join(lines[:25]))
    assert not {"etag", "accept-ranges", "content-range", "content-encoding"} & set(answer.headers)
    assert answer.headers["cache-control"] == "no-store"
    await growing.finish(*lines[25:])
    done = await content(plain, growing.file)
    assert done.headers["etag"] == f'"{SHA}"'
    await growing.grow_again()
    await growing.grow(b"more\n")
    answer = await content(plain, growing.file, **asked)
    assert (answer.status, answer.body) == (200, DATA + b"more\n")
    await growing.finish()
    again = await content(plain, growing.file, If_None_Match=done.headers["etag"])
    assert (again.status, again.body) == (200, DATA + b"more\n")
    assert again.headers["etag"] != done.headers["etag"]


async def test_a_file_that_was_never_written_has_a_tag_too(either: Rig) -> None:
    uploaded = await either.upload(b"not a request\n")
    batch = (await either.create(uploaded["id"])).json
    assert batch["status"] == "failed"
    empty = await either.upload(b"")
    for id in (batch["output_file_id"], empty["id"]):
        answer = await content(either, id, Range="bytes=0-", Accept_Encoding="gzip")
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")
        assert answer.headers["x-last-line"] == "0"
        assert re.fullmatch(r'"[0-9a-f-]+"', answer.headers["etag"])
        assert (await content(either, id, If_None_Match=answer.headers["etag"])).status == 304


# HEAD

VARYING = {"x-request-id", "date", "transfer-encoding"}


async def test_head_is_get_without_the_body(plain: Rig) -> None:
    uploaded = await plain.upload(DATA)
    growing = Growing(plain.context)
    await growing.begin()
    await growing.grow(*DATA.splitlines(keepends=True))
    conditions: tuple[dict[str, str], ...] = (
        {},
        {"Accept_Encoding": "gzip"},
        {"Accept_Encoding": "zstd"},
        {"If_None_Match": "*"},
        {"If_Match": '"x"'},
        {"Accept_Encoding": "gzip", "If_None_Match": f'"{SHA}-gzip"'},
    )
    queries = ("", "?offset=3", "?limit=2", "?offset=50", "?offset=3&skip=4")
    for id, headers, query in itertools.product((uploaded["id"], growing.file), conditions, queries):
        get = await content(plain, id, query, **headers)
        head = await content(plain, id, query, method="HEAD", **headers)
        assert (head.status, head.body) == (get.status, b"")
        shown, wanted = (
            {name: value for name, value in answer.headers.items() if name not in VARYING} for answer in (head, get)
        )
        assert shown == wanted, (headers, query)


async def test_head_knows_no_ranges(plain: Rig) -> None:
    uploaded = await plain.upload(DATA)
    answer = await content(plain, uploaded["id"], method="HEAD", Range="bytes=0-4")
    assert (answer.status, answer.headers["content-length"]) == (200, str(len(DATA)))


# Codings


async def pieces_of(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


@settings(max_examples=50)
@given(coding=st.sampled_from(CODINGS), pieces=st.lists(st.binary(max_size=300) | st.just(b"a" * 70_000), max_size=12))
async def test_a_coded_body_is_one_stream_that_decodes_to_the_same_bytes(coding: Coding, pieces: list[bytes]) -> None:
    body = b"".join([piece async for piece in compressed(coding, pieces_of(pieces))])
    assert decoded(coding, body) == b"".join(pieces)


@pytest.mark.parametrize("coding", CODINGS)
async def test_compressing_neither_reads_ahead_nor_goes_on_for_nobody(
    coding: Coding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress, "AT_ONCE", 3)
    taken = 0
    closed = False

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken, closed
        try:
            while True:
                taken += 1
                yield b"x" * 100_000
        finally:
            closed = True

    source = endless()
    body = compressed(coding, source)
    for count in range(20):
        assert await anext(body)
        assert taken <= count + compress.AT_ONCE + 1
    assert not asyncio.all_tasks() - {asyncio.current_task()}
    await body.aclose()  # type: ignore[attr-defined]
    await source.aclose()  # type: ignore[attr-defined]
    assert closed


@pytest.mark.parametrize("coding", CODINGS)
async def test_what_cannot_be_read_on_is_never_a_complete_body(coding: Coding) -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield b"first"
        raise StoreUnavailable("gone")

    got = b""
    try:
        async for piece in compressed(coding, failing()):
            got += piece
    except StoreUnavailable:
        pass
    else:
        pytest.fail("it came to an end")
    assert got, "the answer has begun, so that its end is seen to be missing"
    with pytest.raises(AssertionError, match="ends too early"):
        decoded(coding, got)


@pytest.fixture(params=["gzip, deflate", "zstd", "identity"])
def accept(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


async def test_an_input_file_comes_back_byte_for_byte(rig: Rig, monkeypatch: pytest.MonkeyPatch, accept: str) -> None:
    monkeypatch.setattr(blob_store, "READ", 10_000)
    data = chat_file(500, padding=300) + b"\r\n \xff\xfe \n\n\x00" + bytes(range(256)) * 40
    uploaded = await rig.upload(data)
    client = rig.openai.with_options(default_headers={"Accept-Encoding": accept})
    answer = await client.files.with_raw_response.content(uploaded["id"])
    assert answer.http_response.content == data
    assert answer.headers.get("content-encoding", "identity") == accept.partition(",")[0]


async def test_the_official_client_gets_gzip_by_default(rig: Rig) -> None:
    uploaded = await rig.upload(DATA)
    answer = await rig.openai.files.with_raw_response.content(uploaded["id"])
    assert answer.http_response.content == DATA
    assert answer.headers["content-encoding"] in CODINGS
