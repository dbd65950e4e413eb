"""The line index: what goes in comes out, and a damaged blob says so."""

from __future__ import annotations

import zlib
from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.store import line_index
from batchery.store.line_index import InvalidIndexError
from batchery.wire.file_index import ONE_MODEL_TOO_MANY, PARSE, BadLines, FileIndex
from batchery.wire.lines import Limits
from batchery.wire.prefixes import Prefixes
from batchery.wire.validation import validate

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def bad_lines(draw: st.DrawFn, requests: int) -> BadLines:
    count = draw(st.integers(0, 10))
    unsigned32 = st.lists(st.integers(0, 2**32 - 1), min_size=count, max_size=count)
    return BadLines(
        limit=draw(st.integers(1, 2**31)),
        starts=array("Q", draw(st.lists(st.integers(0, 2**64 - 1), min_size=count, max_size=count))),
        lengths=array("I", draw(unsigned32)),
        numbers=array("I", draw(unsigned32)),
        firsts=array(
            "i", draw(st.lists(st.integers(ONE_MODEL_TOO_MANY, requests - 1), min_size=count, max_size=count))
        ),
    )


@st.composite
def indexes(draw: st.DrawFn) -> FileIndex:
    count = draw(st.integers(0, 30))
    models = tuple(draw(st.lists(texts, unique=True, max_size=4)))
    by_model = tuple(array("I", draw(st.lists(st.integers(0, 2**32 - 1), max_size=10))) for _ in models)
    numbers = draw(st.none() | st.lists(st.integers(1, 2**32 - 1), min_size=count, max_size=count))
    return FileIndex(
        starts=array("Q", draw(st.lists(st.integers(0, 2**64 - 1), min_size=count, max_size=count))),
        lengths=array("I", draw(st.lists(st.integers(0, 2**32 - 1), min_size=count, max_size=count))),
        numbers=None if numbers is None else array("I", numbers),
        models=models,
        by_model=by_model,
        urls=tuple(draw(st.lists(texts, max_size=3))),
        bad=draw(bad_lines(count)),
        prefixes=draw(prefixes(count)),
    )


@st.composite
def prefixes(draw: st.DrawFn, count: int) -> Prefixes:
    keys = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
    groups = draw(st.none() | st.lists(st.integers(0, len(keys) - 1), min_size=count, max_size=count))
    return Prefixes(None if groups is None else array("H", groups), array("Q", keys))


def sealed(blob: bytes) -> bytes:
    """A blob of the second or third version with the right checksum at its end."""
    return blob + zlib.crc32(blob).to_bytes(4, "little")


def first_version(index: FileIndex) -> bytes:
    """The blob of an index without bad lines, as it was written before there was a second version."""
    header = msgspec.msgpack.encode(
        [
            len(index),
            index.numbers is not None,
            index.models,
            [len(requests) for requests in index.by_model],
            index.urls,
        ]
    )
    arrays = [index.starts, index.lengths, *([] if index.numbers is None else [index.numbers]), *index.by_model]
    return b"BATCHIX1" + len(header).to_bytes(4, "little") + header + b"".join(values.tobytes() for values in arrays)


@given(indexes())
def test_round_trip(index: FileIndex) -> None:
    blob = b"".join(line_index.encode(index))
    assert line_index.decode(blob) == index
    assert line_index.decode(memoryview(blob)) == index


def second_version(index: FileIndex) -> bytes:
    """The blob of an index without prefixes, as it was written before there was a third version."""
    pieces = line_index.encode(msgspec.structs.replace(index, prefixes=Prefixes(None, array("Q"))))
    length = int.from_bytes(pieces[0][8:12], "little")
    header = msgspec.msgpack.encode(msgspec.msgpack.decode(pieces[0][12 : 12 + length])[:-2])
    return sealed(b"BATCHIX2" + len(header).to_bytes(4, "little") + header + b"".join(pieces[1:-1]))


@given(indexes())
def test_the_second_version_is_still_read(index: FileIndex) -> None:
    clean = msgspec.structs.replace(index, prefixes=Prefixes())
    assert line_index.decode(second_version(clean)) == clean


@given(indexes())
def test_a_group_that_has_no_key_is_refused(index: FileIndex) -> None:
    wrong = Prefixes(array("H", [1]) * len(index), array("Q", [5]))
    blob = b"".join(line_index.encode(msgspec.structs.replace(index, prefixes=wrong)))
    if len(index):
        with pytest.raises(InvalidIndexError):
            line_index.decode(blob)
    else:
        assert line_index.decode(blob).prefixes == wrong


@given(indexes())
def test_the_first_version_is_still_read(index: FileIndex) -> None:
    clean = msgspec.structs.replace(index, bad=BadLines(), prefixes=Prefixes())
    assert line_index.decode(first_version(clean)) == clean
    with pytest.raises(InvalidIndexError):
        line_index.decode(first_version(clean) + b"\0")


def test_the_index_of_a_real_file() -> None:
    data = b"".join(
        b'{"custom_id":"%d","method":"POST","url":"/v1/embeddings","body":{"model":"%s","input":"x"}}\n\n'
        % (i, (b"a", b"b")[i % 2])
        for i in range(10)
    )
    report = validate([data], Limits(), lambda start, length: data[start : start + length])
    index = line_index.decode(b"".join(line_index.encode(report.index)))
    assert index == report.index
    assert [list(requests) for requests in index.by_model] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert [index.number(i) for i in range(3)] == [1, 3, 5]


def test_the_index_of_a_file_with_bad_lines() -> None:
    line = b'{"custom_id":"a","method":"POST","url":"/v1/embeddings","body":{"model":"m"}}\n'
    data = line + b"{\n" + line + b"x" * 200 + b"\n"
    report = validate([data], Limits(line_bytes=100), lambda start, length: data[start : start + length])
    index = line_index.decode(b"".join(line_index.encode(report.index)))
    assert index == report.index
    assert (len(index), list(index.bad.numbers), list(index.bad.firsts)) == (1, [2, 3, 4], [PARSE, 0, PARSE])
    assert (index.bad.limit, index.bad.is_too_large(2)) == (100, True)


def decode_or_refuse(blob: bytes) -> None:
    try:
        index = line_index.decode(blob)
    except InvalidIndexError:
        return
    assert len(index.lengths) == len(index)
    assert index.numbers is None or len(index.numbers) == len(index)
    assert len(index.models) == len(index.by_model)
    assert index.prefixes.groups is None or len(index.prefixes.groups) == len(index)
    assert all(index.prefixes.key(request) in index.prefixes.keys for request in range(len(index)))
    assert len(index.bad.lengths) == len(index.bad.numbers) == len(index.bad.firsts) == len(index.bad)


@given(indexes(), st.data())
def test_a_cut_blob_is_refused(index: FileIndex, data: st.DataObject) -> None:
    blob = b"".join(line_index.encode(index))
    cut = blob[: data.draw(st.integers(0, len(blob) - 1))]
    with pytest.raises(InvalidIndexError):
        line_index.decode(cut)


@given(indexes(), st.data())
def test_a_changed_byte_is_refused(index: FileIndex, data: st.DataObject) -> None:
    blob = bytearray(b"".join(line_index.encode(index)))
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InvalidIndexError):
        line_index.decode(bytes(blob))


@given(indexes(), st.data())
def test_changed_bytes_are_refused_or_give_an_index(index: FileIndex, data: st.DataObject) -> None:
    """Also where the checksum cannot help."""
    clean = msgspec.structs.replace(index, bad=BadLines())
    for whole in (first_version(clean), b"".join(line_index.encode(index))[:-4]):
        blob = change(whole, data)
        decode_or_refuse(blob)
        decode_or_refuse(sealed(blob))


def change(whole: bytes, data: st.DataObject) -> bytes:
    blob = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, min(len(blob), 60) - 1))] = data.draw(st.integers(0, 255))
    return bytes(blob)


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_give_an_index(data: bytes) -> None:
    decode_or_refuse(data)
    for magic in (b"BATCHIX1", b"BATCHIX2"):
        for blob in (magic + data, magic + len(data).to_bytes(4, "little") + data):
            decode_or_refuse(blob)
            decode_or_refuse(sealed(blob))


@pytest.mark.parametrize(
    "header",
    [
        b"\x95\xff\xc2\x90\x90\x90",  # -1 requests
        b"\x95\x00\xc2\x91\xa1m\x91\xff\x90",  # -1 requests for a model
        b"\x95\x00\xc2\x91\xa1m\x90\x90",  # a model without a count
        b"\x95\x00\xc2\x91\xa1\xff\x91\x00\x90",  # a model that is not UTF-8
        b"\x95\xcf\xff\xff\xff\xff\xff\xff\xff\xff\xc2\x90\x90\x90",  # 2**64 - 1 requests
        b"\x96\x00\xc2\x90\x90\x90" + b"\x91" * 100_000,  # deep nesting in what a later version might add
    ],
)
def test_headers_that_do_not_add_up(header: bytes) -> None:
    with pytest.raises(InvalidIndexError):
        line_index.decode(b"BATCHIX1" + len(header).to_bytes(4, "little") + header)


@pytest.mark.parametrize(
    ("header", "arrays"),
    [
        (b"\x97\x00\xc2\x90\x90\x90\xff\x01", b""),  # -1 bad lines
        (b"\x97\x00\xc2\x90\x90\x90\x01\x01", bytes(16)),  # a bad line without all that belongs to it
        (b"\x97\x00\xc2\x90\x90\x90\x01\x01", bytes(24)),  # more than there should be
        (b"\x97\x00\xc2\x90\x90\x90\x01\x01", bytes(20)),  # a repeat of request 0, which is not there
        (b"\x97\x00\xc2\x90\x90\x90\x01\x01", bytes(16) + b"\xfd\xff\xff\xff"),  # -3
    ],
)
def test_bad_lines_that_do_not_add_up(header: bytes, arrays: bytes) -> None:
    blob = b"BATCHIX2" + len(header).to_bytes(4, "little") + header + arrays
    with pytest.raises(InvalidIndexError):
        line_index.decode(sealed(blob))
