"""Uploads: well-formed in every shape that clients send, malformed in every shape that we can think of."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.server.form import boundary_of, clean_filename, read_form
from batchery.server.upload import OVERHEAD
from batchery.store.blobs import Writer
from batchery.store.database import sqlite_url
from batchery.wire.errors import BadRequest
from batchery.wire.lines import Limits
from tests.requests import chat_file, chat_line
from tests.server.rig import BOUNDARY, Answer, Rig, field_part, file_part, form, running, until

GOOD = chat_file(3)
PURPOSE = field_part("purpose", "batch")
HEAD = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n".encode()


async def content(rig: Rig, id: str) -> Answer:
    return await rig.ask("GET", f"/v1/files/{id}/content")


GOOD_FORMS = [
    form(PURPOSE, file_part(GOOD)),
    form(file_part(GOOD), PURPOSE),
    form(file_part(GOOD)),
    form(file_part(GOOD, filename=None), PURPOSE),
    form(field_part("unknown", "x"), file_part(GOOD), field_part("", "y")),
    b"a preamble\r\n" + form(file_part(GOOD), PURPOSE) + b"an epilogue",
    form(
        file_part(GOOD),
        field_part("expires_after[anchor]", "created_at"),
        field_part("expires_after[seconds]", "3600"),
    ),
    form(
        field_part("expires_after.seconds", "3600"),
        field_part("expires_after.anchor", "created_at"),
        file_part(GOOD),
    ),
]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_form_in_any_order_is_taken_and_comes_back_byte_for_byte(rig: Rig, chunked: bool) -> None:
    async def pieces(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 7):
            yield body[start : start + 7]

    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    for body in GOOD_FORMS:
        answer = await rig.ask("POST", "/v1/files", data=pieces(body) if chunked else body, headers=headers)
        assert answer.status == 200, answer
        file = answer.json
        assert list(file) == [
            *("id", "object", "bytes", "created_at", "filename", "purpose", "status", "status_details", "expires_at")
        ]
        assert (file["object"], file["purpose"], file["status"]) == ("file", "batch", "processed")
        assert file["bytes"] == len(GOOD)
        assert file["expires_at"] - file["created_at"] == (3600 if b"3600" in body else 2_592_000)
        back = await content(rig, file["id"])
        assert back.body == GOOD
        assert back.headers["content-type"] == "application/x-ndjson"
        assert (back.headers["x-last-line"], back.headers["x-incomplete"]) == ("3", "false")
    assert len(rig.left_behind()) == 2 * len(GOOD_FORMS)


BAD_FORMS = [
    ("no file", form(PURPOSE), "file"),
    ("no parts", form(), "file"),
    ("another name", form(PURPOSE, file_part(GOOD, name="data")), "file"),
    ("two files", form(file_part(GOOD), file_part(GOOD)), "file"),
    ("a foreign purpose", form(file_part(GOOD), field_part("purpose", "fine-tune")), "purpose"),
    ("an empty purpose", form(field_part("purpose", ""), file_part(GOOD)), "purpose"),
    ("two purposes", form(PURPOSE, PURPOSE, file_part(GOOD)), "purpose"),
    ("a long field", form(field_part("note", "x" * 5000), file_part(GOOD)), "note"),
    ("a file elsewhere", form(file_part(GOOD * 20, name="data"), PURPOSE), "data"),
    ("many fields", form(*(field_part(f"f{i}", "x") for i in range(40)), file_part(GOOD)), None),
    ("bytes in a field", form(file_part(GOOD), field_part("purpose", "batch") + b"\xff"), "purpose"),
    ("no anchor", form(file_part(GOOD), field_part("expires_after[seconds]", "3600")), "expires_after.anchor"),
    *(
        (
            f"seconds {seconds}",
            form(
                file_part(GOOD),
                field_part("expires_after[anchor]", "created_at"),
                field_part("expires_after[seconds]", seconds),
            ),
            "expires_after.seconds",
        )
        for seconds in ("3599", "2592001", "", "1e4", "-3600", "3600.0", "٣٦٠٠", "9" * 900)
    ),
    ("cut off", form(PURPOSE, file_part(GOOD))[:-8], None),
    ("cut off in the file", form(PURPOSE, file_part(GOOD))[:-60], None),
    ("empty", b"", None),
    ("another boundary", form(PURPOSE, file_part(GOOD), boundary="other"), None),
    ("no headers", b"--%b\r\n\r\nx\r\n--%b--\r\n" % (BOUNDARY.encode(), BOUNDARY.encode()), None),
    ("bare line feeds", form(PURPOSE, file_part(GOOD)).replace(b"\r\n", b"\n"), None),
    ("a huge header", form(b"X-Y: " + b"z" * 100_000 + b"\r\n" + file_part(GOOD)), None),
    ("many headers", form(b"".join(b"X-%d: z\r\n" % i for i in range(50)) + file_part(GOOD)), None),
    ("a lying part", form(b"Content-Length: 5\r\n" + file_part(GOOD)), None),
]


async def test_a_bad_form_is_refused_and_leaves_nothing(rig: Rig) -> None:
    for case, body, param in BAD_FORMS:
        answer = await rig.post_form(body)
        assert answer.status == 400, (case, answer)
        assert answer.error()["param"] == param, (case, answer)
        assert rig.left_behind() == [], case
    assert (await rig.ask("GET", "/v1/files")).json["data"] == []


@pytest.mark.parametrize("length", [None, 5, 1_000_000])
async def test_a_body_that_ends_early_leaves_nothing(rig: Rig, length: int | None) -> None:
    body = form(PURPOSE, file_part(chat_file(2000, padding=1000)))
    if length is None:
        sent = HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\nbroken" % (len(body), body)
    else:
        sent = HEAD + b"Content-Length: %d\r\n\r\n" % (len(body) + length) + body
    # Somebody who has hung up may or may not get the answer.
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        answer = await rig.raw(sent)
        assert answer.status == 400
        answer.error()
    await until(lambda: not rig.left_behind())
    assert (await rig.ask("GET", "/v1/files")).json["data"] == []


async def test_a_client_that_goes_away_leaves_nothing_and_raises_nothing(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(HEAD + b"Content-Length: 90000000\r\n\r\n" + form(file_part(chat_file(16_000, padding=1000)))[:-20])
    await until(rig.left_behind)
    writer.transport.abort()
    await until(lambda: not rig.left_behind())
    assert (await rig.ask("GET", "/v1/files")).json["data"] == []
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err


def padding(size: int) -> bytes:
    """Blank lines of so many bytes in all."""
    return (b" " * 999 + b"\n") * (size // 1000) + b"\n" * (size % 1000)


@pytest.fixture
async def small(tmp_path: Path) -> Any:
    """A server with small limits and little patience."""
    limits = Limits(file_bytes=5_000_000, line_bytes=2_000, requests=1_000)
    async with running(
        sqlite_url(tmp_path / "small.db"), tmp_path, limits=limits, idle_timeout=0.2, file_expiry=None
    ) as rig:
        yield rig


async def test_a_silent_client_is_given_up(small: Rig) -> None:
    part = form(PURPOSE, file_part(chat_file(4000, padding=1000)))[:3_000_000]
    answer = await small.raw(HEAD + b"Content-Length: 4000000\r\n\r\n" + part, finish=False)
    assert answer.status == 408
    assert answer.error()["code"] == "request_timeout"
    assert small.left_behind() == []


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("over", [1, OVERHEAD * 2])
async def test_a_file_over_the_limit_is_refused_and_leaves_nothing(small: Rig, over: int, chunked: bool) -> None:
    body = form(PURPOSE, file_part(padding(small.context.limits.file_bytes + over)))

    async def pieces() -> Any:
        yield body

    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    answer = await small.ask("POST", "/v1/files", data=pieces() if chunked else body, headers=headers)
    assert answer.status == 413
    assert str(small.context.limits.file_bytes) in answer.error()["message"]
    assert small.left_behind() == []


async def test_an_announced_length_over_the_limit_is_refused_before_the_body(small: Rig) -> None:
    answer = await small.raw(HEAD + b"Content-Length: 90000000000\r\n\r\n", finish=False)
    assert answer.status == 413
    answer.error()


async def test_the_official_client_is_told_that_its_file_is_too_large(small: Rig) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await small.openai.files.create(file=padding(30_000_000), purpose="batch")
    assert caught.value.status_code == 413
    assert caught.value.param == "file"


async def test_padding_around_the_file_counts_too(small: Rig) -> None:
    epilogue = b"x" * (small.context.limits.file_bytes + OVERHEAD)
    body = form(file_part(GOOD)) + epilogue
    sent = HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    answer = await small.raw(sent, finish=False)
    assert answer.status == 413
    assert small.left_behind() == []


async def test_a_file_of_exactly_the_limit_is_taken(small: Rig) -> None:
    data = chat_file(3)
    data += padding(small.context.limits.file_bytes - len(data))
    file = await small.upload(data)
    assert file["bytes"] == small.context.limits.file_bytes
    assert file["status"] == "processed"
    assert file["expires_at"] is None
    got = await content(small, file["id"])
    assert got.body == data
    assert got.headers["x-last-line"] == str(data.count(b"\n"))


@pytest.mark.parametrize(
    ("data", "code", "lines", "is_indexed"),
    [
        (b"", "has no requests", 0, False),
        (b"\n\n", "has no requests", 2, False),
        (b"nonsense", "Line 1", 1, True),
        (chat_file(2) + b"{}\n" + chat_file(2)[:-1], "Line 3", 5, True),
        (chat_line("a", "x") + chat_line("b", "x") + chat_line("a", "x"), "already used on line 1", 3, True),
        (chat_file(1_200), "more than 1000 requests", 1200, False),
        (chat_line("a", "x" * 3000), "Line 1 is longer", 1, True),
        (chat_line("a", "x") + b"\xff\n", "not valid UTF-8", 2, True),
    ],
)
async def test_a_file_with_bad_lines_is_kept_and_says_so(
    small: Rig, data: bytes, code: str, lines: int, is_indexed: bool
) -> None:
    file = await small.upload(data)
    assert file["status"] == "error"
    assert code in file["status_details"]
    got = await content(small, file["id"])
    assert got.body == data
    assert got.headers["x-last-line"] == str(lines)
    assert len(small.left_behind()) == 1 + is_indexed


async def test_equal_ids_far_apart_are_read_back_from_the_store(rig: Rig) -> None:
    data = chat_line("twice", "first") + chat_file(3000, padding=800) + chat_line("twice", "last")
    file = await rig.upload(data)
    assert "Line 3002" in file["status_details"]
    assert "already used on line 1" in file["status_details"]


async def test_twenty_megabytes_by_the_official_client(rig: Rig, tmp_path: Path) -> None:
    data = chat_file(5_000, padding=4_000)
    path = tmp_path / "twenty.jsonl"
    path.write_bytes(data)
    file = await rig.openai.files.create(file=path, purpose="batch")
    assert (file.filename, file.bytes, file.status) == ("twenty.jsonl", len(data), "processed")
    assert (await rig.openai.files.content(file.id)).content == data


async def test_others_are_served_while_a_file_is_validated(rig: Rig) -> None:
    body = form(file_part(chat_file(5_000, padding=4_000)))
    uploading = asyncio.create_task(rig.post_form(body))
    served = 0
    while not uploading.done():
        assert (await rig.ask("GET", "/healthz")).status == 200
        served += 1
    assert (await uploading).status == 200
    assert served > 3


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error")])
@pytest.mark.parametrize("method", ["write", "close"])
async def test_a_failing_disk_is_said_and_leaves_nothing_and_passes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, method: str, fault: OSError
) -> None:
    real = Writer.__init__

    def faulty(self: Writer, *arguments: Any) -> None:
        real(self, *arguments)
        self._file = _Faulty(self._file, method, fault)  # type: ignore[assignment]

    monkeypatch.setattr(Writer, "__init__", faulty)
    data = chat_file(3000, padding=1000)
    answer = await rig.post_form(form(file_part(data), PURPOSE))
    assert answer.status == 503
    assert answer.error()["code"] == ("storage_full" if fault.errno == errno.ENOSPC else "storage_unavailable")
    assert ("disk is full" in answer.error()["message"]) == (fault.errno == errno.ENOSPC)
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert rig.left_behind() == []
    monkeypatch.setattr(Writer, "__init__", real)
    assert (await rig.upload(data))["status"] == "processed"


class _Faulty:
    """A blob writer of which one method fails."""

    def __init__(self, inner: Any, method: str, fault: OSError) -> None:
        self._inner = inner
        self._method = method
        self._fault = fault

    async def write(self, data: bytes) -> None:
        if self._method == "write":
            raise self._fault
        await self._inner.write(data)

    async def close(self) -> None:
        if self._method == "close":
            raise self._fault
        await self._inner.close()


async def test_a_row_that_cannot_be_written_takes_its_blobs_along(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import OperationalError

    from batchery.store import files

    async def full(*_: Any, **__: Any) -> None:
        raise OperationalError("INSERT", {}, Exception("database or disk is full"))

    with monkeypatch.context() as patch:
        patch.setattr(files, "insert", full)
        answer = await rig.post_form(form(file_part(GOOD)))
    assert answer.status == 503
    assert answer.error()["code"] == "storage_full"
    assert rig.left_behind() == []
    await rig.upload(GOOD)


async def test_blobs_stay_when_the_row_may_be_there_after_all(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchery.store import files
    from batchery.store.errors import StoreUnavailable

    async def lost(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("the connection was lost")

    monkeypatch.setattr(files, "get", lost)  # the insert is done, the commit fails, and nobody can be asked
    answer = await rig.post_form(form(file_part(GOOD)))
    assert answer.status == 503
    assert len(rig.left_behind()) == 2


class _Nowhere:
    """Takes a file's bytes and forgets them."""

    async def add(self, data: bytes) -> None:
        pass


_PIECES = st.sampled_from(
    [
        *(
            b"--" + BOUNDARY.encode(),
            b"--",
            b"\r\n",
            b"\n",
            b"\r",
            b'"',
            b"\\",
            b";",
            b"=",
            b":",
            b"%22",
            b"\x00",
            b"\xff",
        ),
        *(b"Content-Disposition", b"Content-Type", b"Content-Length", b" form-data", b"; name=", b"; filename="),
        *(b'"file"', b'"purpose"', b"batch", b"3", b"-1", b"charset=", b"\xe2\x80\xa8"),
    ]
)


@given(body=st.lists(_PIECES | st.binary(max_size=3), max_size=40).map(b"".join), cut=st.integers(1, 60))
def test_any_bytes_are_a_form_or_a_bad_request(body: bytes, cut: int) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for data in (body, form(file_part(body)), form(field_part("x", "") + body)):
            for start in range(0, len(data), cut):
                yield data[start : start + cut]

    with suppress(BadRequest):
        asyncio.run(read_form(chunks(), BOUNDARY, _Nowhere(), lambda *_: None))


@given(st.text(st.characters(max_codepoint=255)) | st.text('multipar/fo-da;= "\\b').map("multipart/form-data;".__add__))
def test_any_content_type_has_a_boundary_or_is_a_bad_request(header: str) -> None:
    with suppress(BadRequest):
        assert 0 < len(boundary_of(header)) <= 200


@given(st.text())
def test_a_file_name_is_fit_to_be_shown(name: str) -> None:
    clean = clean_filename(name)
    assert clean
    assert len(clean) <= 255
    assert clean.isprintable()
    assert "/" not in clean
    assert "\\" not in clean


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        (None, "upload"),
        ("", "upload"),
        ("a.jsonl", "a.jsonl"),
        ("/tmp/a.jsonl", "a.jsonl"),
        ("C:\\folder\\a.jsonl", "a.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("a\x00b\n.jsonl", "ab.jsonl"),
        ("données 数据.jsonl", "données 数据.jsonl"),
        ("folder/", "upload"),
    ],
)
def test_what_file_names_become(name: str | None, clean: str) -> None:
    assert clean_filename(name) == clean


async def test_a_name_crosses_the_wire(rig: Rig) -> None:
    file = await rig.upload(GOOD, name="/home/me/données.jsonl")
    assert file["filename"] == "données.jsonl"
    assert json.dumps(file["filename"]) == '"donn\\u00e9es.jsonl"'
