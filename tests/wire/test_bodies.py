"""The bodies of requests: only a good object or a 400 that names the field."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchery.wire.bodies import CreateBatch, ExpiresAfter, check_expires_after, parse_create_batch
from batchery.wire.errors import BadRequest
from batchery.wire.lines import URLS

from .json_texts import anything, prove_more, texts, values

GOOD: dict[str, Any] = {
    "input_file_id": "file-1",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
}
FIELDS = {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}


def encode(**change: Any) -> bytes:
    return json.dumps(GOOD | change).encode()


def refused(data: bytes) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        parse_create_batch(data)
    error = caught.value
    assert len(error.message) < 1_000
    assert error.message.isprintable()
    msgspec.json.encode(error.envelope())
    return error


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {}),
        ({"metadata": None}, {"metadata": None}),
        ({"metadata": {}}, {"metadata": {}}),
        ({"metadata": {"a": "b"}}, {"metadata": {"a": "b"}}),
        ({"metadata": {"": ""}}, {"metadata": {"": ""}}),
        ({"metadata": {str(i): "" for i in range(16)}}, {"metadata": {str(i): "" for i in range(16)}}),
        ({"metadata": {"漢" * 64: "😀" * 512}}, {"metadata": {"漢" * 64: "😀" * 512}}),  # characters, not bytes
        ({"metadata": {"a\x00": "\u2028"}}, {"metadata": {"a\x00": "\u2028"}}),
        ({"output_expires_after": None}, {}),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 3600}},
            {"output_expires_after": ExpiresAfter(seconds=3600)},
        ),
        ({"completion_window": "1 fortnight"}, {"completion_window": "1 fortnight"}),  # for `require_window`
        ({"unknown": {"a": 1}}, {}),
    ],
)
def test_good_bodies(change: dict[str, Any], expected: dict[str, Any]) -> None:
    assert parse_create_batch(encode(**change)) == CreateBatch(**GOOD | expected)


@pytest.mark.parametrize("url", URLS)
def test_each_endpoint(url: str) -> None:
    assert parse_create_batch(encode(endpoint=url)).endpoint == url


WRONG = [7, 7.5, 10**400, True, [], {}, ["24h"], {"a": 1}]


@pytest.mark.parametrize("field", ["input_file_id", "endpoint", "completion_window"])
def test_each_text_is_required(field: str) -> None:
    absent = json.dumps({key: value for key, value in GOOD.items() if key != field}).encode()
    for data in (absent, encode(**{field: None})):
        error = refused(data)
        assert (error.param, error.code) == (field, "missing_required_parameter")
        assert field in error.message
    for wrong in [*WRONG, ""]:
        error = refused(encode(**{field: wrong}))
        assert (error.param, error.code) == (field, "invalid_type")
        assert f"{field} must be a non-empty string, not " in error.message


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"endpoint": "/v1/images"}, "endpoint", "'/v1/images' is not supported; use one of: /v1/chat/completions"),
        ({"endpoint": "/v1/chat/completions "}, "endpoint", "not supported"),
        ({"endpoint": "x" * 100_000}, "endpoint", "..."),
        ({"endpoint": "\u2028"}, "endpoint", "'\\u2028'"),
        ({"metadata": []}, "metadata", "not an array"),
        ({"metadata": "a=b"}, "metadata", "not a string"),
        ({"metadata": 1}, "metadata", "not a number"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "has 17 pairs; the most is 16"),
        ({"metadata": {"k" * 65: ""}}, "metadata", "65 characters; the most is 64"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "513 characters; the most is 512"),
        ({"metadata": {"k": 1}}, "metadata.k", "metadata['k'] must be a string, not 1"),
        ({"metadata": {"k": None}}, "metadata.k", "not null"),
        ({"metadata": {"k": {}}}, "metadata.k", "not an object"),
        ({"output_expires_after": 3600}, "output_expires_after", "not a number"),
        ({"output_expires_after": []}, "output_expires_after", "not an array"),
        ({"output_expires_after": {}}, "output_expires_after.anchor", "'created_at', not null"),
        (
            {"output_expires_after": {"anchor": "now", "seconds": 3600}},
            "output_expires_after.anchor",
            "'created_at', not 'now'",
        ),
        (
            {"output_expires_after": {"anchor": "created_at"}},
            "output_expires_after.seconds",
            "from 3600 to 2592000, not null",
        ),
    ],
)
def test_bad_bodies(change: dict[str, Any], param: str, words: str) -> None:
    error = refused(encode(**change))
    assert error.param == param
    assert words in error.message


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"input_file_id=file-1", "invalid_json"),
        (encode().replace(b'"24h"', b"NaN"), "invalid_json"),
        (encode().replace(b'"24h"', b'"\xff"'), "invalid_json"),
        (encode().replace(b'"24h"', b'"\\ud83d"'), "invalid_json"),
        (encode()[:-1] + b',"endpoint":"/v1/embeddings"}', "invalid_json"),  # which of the two?
        (b"[" * 100_000, "invalid_json"),
        (b"[]", "invalid_type"),
        (b'"text"', "invalid_type"),
        (b"null", "invalid_type"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_what_is_no_object(data: bytes, code: str) -> None:
    error = refused(data)
    assert (error.param, error.code) == (None, code)


bodies = st.fixed_dictionaries(
    {},
    optional={
        "input_file_id": st.one_of(texts, values),
        "endpoint": st.one_of(st.sampled_from(URLS), values),
        "completion_window": st.one_of(st.just("24h"), values),
        "metadata": st.one_of(
            st.dictionaries(texts | st.text("k", min_size=60, max_size=70), texts, max_size=18),
            st.dictionaries(texts, values, max_size=3),
            values,
        ),
        "output_expires_after": st.one_of(
            st.fixed_dictionaries(
                {},
                optional={"anchor": st.just("created_at") | values, "seconds": st.integers(3500, 2_600_000) | values},
            ),
            values,
        ),
    },
)


@prove_more
@given(st.one_of(bodies.map(lambda value: json.dumps(value).encode()), anything))
@example(encode(metadata={str(i): "x" for i in range(16)}))
def test_any_body_is_a_batch_or_a_bad_request(data: bytes) -> None:
    try:
        created = parse_create_batch(data)
    except BadRequest:
        error = refused(data)
        assert error.param is None or error.param.split(".")[0] in FIELDS
    else:
        sent = json.loads(data)
        assert created.input_file_id == sent["input_file_id"] != ""
        assert created.endpoint == sent["endpoint"]
        assert created.completion_window == sent["completion_window"]
        assert created.metadata == sent.get("metadata")
        expiry = sent.get("output_expires_after")
        assert created.output_expires_after == (expiry and ExpiresAfter(seconds=expiry["seconds"]))


@pytest.mark.parametrize("seconds", [3_600, 3_601, 86_400, 2_592_000])
def test_expiry_within_bounds(seconds: int) -> None:
    assert check_expires_after("created_at", seconds, "expires_after") == ExpiresAfter(seconds=seconds)


@pytest.mark.parametrize(
    "seconds",
    [
        3_599,
        2_592_001,
        0,
        -3_600,
        3_600.0,
        math.inf,
        math.nan,
        True,
        None,
        "3600",
        [3600],
        pytest.param(10**5000, id=""),
    ],
)
def test_expiry_out_of_bounds(seconds: Any) -> None:
    with pytest.raises(BadRequest, match=r"expires_after\[seconds\].* from 3600 to 2592000, not ") as caught:
        check_expires_after("created_at", seconds, "expires_after")
    assert caught.value.param == "expires_after.seconds"


@pytest.mark.parametrize("anchor", [None, "", "CREATED_AT", "last_active_at", 1, [], {}, b"created_at"])
def test_expiry_from_another_anchor(anchor: Any) -> None:
    with pytest.raises(BadRequest, match=r"expires_after\[anchor\] must be 'created_at', not ") as caught:
        check_expires_after(anchor, 3_600, "expires_after")
    assert caught.value.param == "expires_after.anchor"
