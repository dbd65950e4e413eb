"""Identifiers: which spellings are read, and that none but those are."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.wire import ids
from batchery.wire.ids import Kind

from .json_texts import prove

KEY = "0123456789abcdef" * 2
keys = st.text("0123456789abcdef", min_size=32, max_size=32)
kinds = st.sampled_from(get_args(Kind))


def test_ids_are_shown_as_the_contract_has_them() -> None:
    assert ids.show("file", KEY) == f"file-{KEY}"
    assert ids.show("batch", KEY) == f"batch_{KEY}"


@pytest.mark.parametrize("kind", ["file", "batch"])
@pytest.mark.parametrize("separator", ["-", "_", None])
def test_each_prefix_is_read(kind: Kind, separator: str | None) -> None:
    assert ids.parse(kind, KEY if separator is None else f"{kind}{separator}{KEY}") == KEY


@pytest.mark.parametrize(
    "text",
    [
        f"batch-{KEY}",  # another kind
        f"batch_{KEY}",
        f"batch_req_{KEY}",
        f"file{KEY}",
        f"file--{KEY}",
        f"-{KEY}",
        f"File-{KEY}",
        f"file-file-{KEY}",
        KEY[1:],  # 31 digits
        KEY + "0",  # 33
        KEY.upper(),
        KEY[:-1] + "g",
        KEY[:-1] + "٣",  # a digit, but not of ours
        KEY[:-1] + "\uff11",
        KEY + "\n",
        KEY + "\x00",
        " " + KEY,
        f"file-{KEY}/content",
        f"{KEY[:8]}-{KEY[8:12]}-{KEY[12:16]}-{KEY[16:20]}-{KEY[20:]}",  # a UUID with its dashes
        "",
        "file-",
    ],
)
def test_nothing_else_is_read(text: str) -> None:
    assert ids.parse("file", text) is None


@prove
@given(kinds, keys)
def test_what_is_shown_is_read(kind: Kind, key: str) -> None:
    assert ids.parse(kind, ids.show(kind, key)) == key
    other: Kind = "batch" if kind == "file" else "file"
    assert ids.parse(other, ids.show(kind, key)) is None


@prove
@given(kinds, st.text(st.characters(), max_size=50) | st.text("0123456789abcdef-_file", max_size=50))
def test_any_text_names_a_key_or_nothing(kind: Kind, text: str) -> None:
    key = ids.parse(kind, text)
    assert key is None or (text.endswith(key) and re.fullmatch("[0-9a-f]{32}", key))


@prove
@given(keys, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_request_ids_are_derived_and_distinct(batch: str, one: int, other: int) -> None:
    assert re.fullmatch("batch_req_[0-9a-f]{32}", ids.request_id(batch, one))
    assert (ids.request_id(batch, one) == ids.request_id(batch, other)) is (one == other)
    assert ids.request_id(batch, one) == ids.request_id(batch, one)
    assert ids.parse("batch", ids.request_id(batch, one)) is None  # a request is no batch
