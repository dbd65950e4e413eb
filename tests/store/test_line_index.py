"""The line index: what goes in comes out, and a damaged blob says so."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.store import line_index
from batchery.store.line_index import InvalidIndexError
from batchery.wire.lines import Limits
from batchery.wire.validation import FileIndex, validate

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


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
    )


@given(indexes())
def test_round_trip(index: FileIndex) -> None:
    blob = b"".join(line_index.encode(index))
    assert line_index.decode(blob) == index
    assert line_index.decode(memoryview(blob)) == index


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


def decode_or_refuse(blob: bytes) -> None:
    try:
        index = line_index.decode(blob)
    except InvalidIndexError:
        return
    assert len(index.lengths) == len(index)
    assert index.numbers is None or len(index.numbers) == len(index)
    assert len(index.models) == len(index.by_model)


@given(indexes(), st.data())
def test_a_cut_blob_is_refused(index: FileIndex, data: st.DataObject) -> None:
    blob = b"".join(line_index.encode(index))
    cut = blob[: data.draw(st.integers(0, len(blob) - 1))]
    with pytest.raises(InvalidIndexError):
        line_index.decode(cut)


@given(indexes(), st.data())
def test_changed_bytes_are_refused_or_give_an_index(index: FileIndex, data: st.DataObject) -> None:
    blob = bytearray(b"".join(line_index.encode(index)))
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, min(len(blob), 60) - 1))] = data.draw(st.integers(0, 255))
    decode_or_refuse(bytes(blob))


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_give_an_index(data: bytes) -> None:
    decode_or_refuse(data)
    decode_or_refuse(b"BATCHIX1" + data)
    decode_or_refuse(b"BATCHIX1" + len(data).to_bytes(4, "little") + data)


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
