"""The bodies of the Uploads API: what is taken, and that nothing else gets through."""

from __future__ import annotations

import base64
import json
import string
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.wire import ids
from batchery.wire.bodies import ExpiresAfter
from batchery.wire.errors import BadRequest
from batchery.wire.uploads import (
    CompleteUpload,
    CreateUpload,
    check_md5,
    parse_complete_upload,
    parse_create_upload,
)

GOOD: dict[str, Any] = {"filename": "a.jsonl", "purpose": "batch", "bytes": 7, "mime_type": "application/jsonl"}
PART = "0123456789abcdef" * 2
OTHER = "f" * 32

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["batch", PART, "created_at"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def encoded(**body: Any) -> bytes:
    """A body as JSON."""
    return json.dumps(body).encode()


def outcome(data: bytes) -> CreateUpload | BadRequest:
    """What becomes of a creation."""
    try:
        return parse_create_upload(data)
    except BadRequest as error:
        return error


def test_a_good_creation() -> None:
    assert parse_create_upload(encoded(**GOOD, unknown=1)) == CreateUpload(**GOOD)
    assert parse_create_upload(encoded(**GOOD, expires_after=None)) == CreateUpload(**GOOD)
    expiry = {"anchor": "created_at", "seconds": 3600}
    assert parse_create_upload(encoded(**GOOD, expires_after=expiry)).expires_after == ExpiresAfter(seconds=3600)
    assert parse_create_upload(encoded(**GOOD | {"bytes": 0})).bytes == 0


@pytest.mark.parametrize("field", sorted(GOOD))
@given(value=json_values)
def test_a_field_is_taken_as_it_is_or_refused_by_name(field: str, value: Any) -> None:
    parsed = outcome(encoded(**GOOD | {field: value}))
    if isinstance(parsed, BadRequest):
        assert parsed.param is None or parsed.param.split(".")[0] == field  # None where it was not even JSON
    else:
        found = getattr(parsed, field)
        assert found == value
        assert type(found) is type(GOOD[field])


@given(st.dictionaries(st.sampled_from(["part_ids", "md5", "x"]), json_values) | json_values)
def test_any_completion_is_taken_or_refused(body: Any) -> None:
    with suppress(BadRequest):
        wanted = parse_complete_upload(json.dumps(body).encode())
        assert len(wanted.part_ids) == len(body["part_ids"])


@given(st.binary(max_size=200))
def test_any_bytes_are_taken_or_refused(data: bytes) -> None:
    for parse in (parse_create_upload, parse_complete_upload):
        with suppress(BadRequest):
            parse(data)


@given(st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), unique=True, max_size=20), st.data())
def test_the_order_of_parts_is_kept_and_a_double_is_found(keys: list[str], data: st.DataObject) -> None:
    written = [data.draw(st.sampled_from([key, "part-" + key, ids.show("part", key)])) for key in keys]
    assert parse_complete_upload(encoded(part_ids=written)) == CompleteUpload(part_ids=keys)
    if keys:
        again = data.draw(st.sampled_from(keys))
        with pytest.raises(BadRequest) as caught:
            parse_complete_upload(encoded(part_ids=[*written, again]))
        assert caught.value.param == f"part_ids.{len(keys)}"
        assert f"part_ids[{keys.index(again)}]" in caught.value.message


@given(st.binary(min_size=16, max_size=16))
def test_an_md5_may_be_hex_or_base64(digest: bytes) -> None:
    for written in (digest.hex(), digest.hex().upper(), base64.b64encode(digest).decode()):
        assert check_md5(written, "md5") == digest.hex()
        assert parse_complete_upload(encoded(part_ids=[PART], md5=written)).md5 == digest.hex()


@given(st.text(string.printable) | st.binary().map(lambda data: base64.b64encode(data).decode()) | json_values)
def test_whatever_else_is_no_md5(value: Any) -> None:
    with suppress(BadRequest):
        found = check_md5(value, "md5")
        assert len(bytes.fromhex(found)) == 16
        assert value.lower() == found or base64.b64decode(value).hex() == found


@pytest.mark.parametrize("ids", [[PART, PART], [PART, "part_" + PART], [PART, OTHER, "part-" + OTHER]])
def test_a_part_is_named_once(ids: list[str]) -> None:
    with pytest.raises(BadRequest, match="once"):
        parse_complete_upload(encoded(part_ids=ids))
