"""Input lines: which are requests, what is said of the others, and where each of them is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.wire.lines import (
    BOM,
    MAX_CUSTOM_ID,
    MAX_FILE_BYTES,
    MAX_LINE_BYTES,
    MAX_MODEL,
    MAX_REQUESTS,
    URLS,
    Limits,
    Problem,
    Request,
    parse_line,
    read_request,
)
from tests.wire.examples import CODES, GOOD, request

from .json_texts import anything, objects, prove, prove_more, spellings, texts


def test_the_limits_are_the_missions() -> None:
    assert (MAX_FILE_BYTES, MAX_REQUESTS, MAX_LINE_BYTES, MAX_CUSTOM_ID) == (209_715_200, 50_000, 10_485_760, 64)
    assert (
        Limits()
        == Limits(MAX_FILE_BYTES, MAX_LINE_BYTES, MAX_REQUESTS)
        == Limits(file_bytes=209_715_200, line_bytes=10_485_760, requests=50_000)
    )


@pytest.mark.parametrize("url", URLS)
def test_each_url_is_good(url: str) -> None:
    assert parse_line(json.dumps(GOOD | {"url": url}).encode(), 1, Limits()) == Request("a", url, "m")


@pytest.mark.parametrize(
    "change",
    [
        {"custom_id": "x" * 64},
        {"custom_id": "漢" * 64},  # characters, not bytes
        {"custom_id": "😀" * 64},  # nor UTF-16 units
        {"custom_id": " "},  # any Unicode
        {"custom_id": "\u2028\x00\n"},
        {"body": {"model": "m", "stream": False}},
        {"body": {"model": "m", "stream": None}},  # explicit nulls are passed through
        {"body": {"model": "m", "messages": None, "extra": {"deep": [1]}}},
        {"body": {"model": "x" * 256}},
        {"extra": 1, "id": None},  # what we do not know is not ours to refuse
    ],
)
def test_good_lines(change: dict[str, Any]) -> None:
    value = GOOD | change
    for line in (json.dumps(value).encode(), json.dumps(value, ensure_ascii=False).encode()):
        parsed = parse_line(line, 1, Limits())
        assert parsed == Request(value["custom_id"], value["url"], value["body"]["model"])
        again = read_request(line)
        assert (again.custom_id, again.url) == (value["custom_id"], value["url"])
        assert json.loads(bytes(again.body)) == value["body"]


MISSING = object()


@pytest.mark.parametrize(
    ("change", "code", "param", "words"),
    [
        ({"custom_id": MISSING}, "missing_required_parameter", "custom_id", "'custom_id' is missing"),
        ({"method": MISSING}, "missing_required_parameter", "method", "'method' is missing"),
        ({"url": MISSING}, "missing_required_parameter", "url", "'url' is missing"),
        ({"body": MISSING}, "missing_required_parameter", "body", "'body' is missing"),
        ({"custom_id": ""}, "invalid_custom_id", "custom_id", "1 to 64 characters; this one has 0"),
        ({"custom_id": "x" * 65}, "invalid_custom_id", "custom_id", "this one has 65"),
        ({"custom_id": "😀" * 65}, "invalid_custom_id", "custom_id", "this one has 65"),
        ({"custom_id": 7}, "invalid_custom_id", "custom_id", "a number"),
        ({"custom_id": None}, "invalid_custom_id", "custom_id", "null"),
        ({"custom_id": ["a"]}, "invalid_custom_id", "custom_id", "an array"),
        ({"method": "GET"}, "invalid_method", "method", "'POST', not 'GET'"),
        ({"method": "post"}, "invalid_method", "method", "'POST'"),  # as the mission has it
        ({"method": None}, "invalid_method", "method", "not null"),
        ({"method": {}}, "invalid_method", "method", "not an object"),
        ({"url": "/v1/images"}, "invalid_url", "url", "/v1/chat/completions, /v1/completions"),
        ({"url": "/v1/chat/completions/"}, "invalid_url", "url", "not supported"),
        ({"url": "https://api.openai.com/v1/chat/completions"}, "invalid_url", "url", "not supported"),
        ({"url": None}, "invalid_url", "url", "null"),
        ({"url": ["/v1/completions"]}, "invalid_url", "url", "an array"),
        ({"url": "/" * 10_000}, "invalid_url", "url", "..."),
        ({"body": None}, "missing_required_parameter", "body", "not null"),
        ({"body": "{}"}, "missing_required_parameter", "body", "not a string"),
        ({"body": []}, "missing_required_parameter", "body", "not an array"),
        ({"body": {}}, "missing_required_parameter", "body.model", "it is missing"),
        ({"body": {"model": ""}}, "missing_required_parameter", "body.model", "it is ''"),
        ({"body": {"model": None}}, "missing_required_parameter", "body.model", "it is null"),
        ({"body": {"model": 4}}, "missing_required_parameter", "body.model", "it is 4"),
        ({"body": {"model": 10**300}}, "missing_required_parameter", "body.model", "it is a number"),
        ({"body": {"model": ["m"]}}, "missing_required_parameter", "body.model", "it is an array"),
        ({"body": {"model": "x" * 257}}, "missing_required_parameter", "body.model", "longer than 256"),
        ({"body": {"model": "a\x00b"}}, "missing_required_parameter", "body.model", "U+0000"),  # PostgreSQL cannot
        ({"body": {"model": "m", "stream": True}}, "streaming_unsupported", "body.stream", "set it to false"),
    ],
)
def test_bad_fields(change: dict[str, Any], code: str, param: str, words: str) -> None:
    value = {key: item for key, item in (GOOD | change).items() if item is not MISSING}
    problem = parse_line(json.dumps(value).encode(), 7, Limits())
    assert isinstance(problem, Problem)
    assert (problem.code, problem.param, problem.line) == (code, param, 7)
    assert words in problem.message
    assert problem.message.startswith("Line 7")
    assert problem.custom_id == ("a" if param != "custom_id" else None)
    assert len(problem.message) < 400


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b"{", "invalid_json_line", "Line 3 is not valid JSON: "),
        (b"[]", "invalid_json_line", "not an object"),
        (b'"text"', "invalid_json_line", "not an object"),
        (b"null", "invalid_json_line", "not an object"),
        (b"7", "invalid_json_line", "not an object"),
        (b"{} {}", "invalid_json_line", "trailing characters"),
        (b"{'a':1}", "invalid_json_line", "not valid JSON"),
        (b'{"a":NaN}', "invalid_json_line", "not valid JSON"),
        (request()[:-1] + b',"custom_id":"a"}', "invalid_json_line", "'custom_id' stands twice"),
        (request()[:-2] + b',"mod\\u0065l":"n"}}', "invalid_json_line", "'model' stands twice"),
        (request(messages=["X"]).replace(b'"X"', b'{"role":1,"role":1}'), "invalid_json_line", "'role' stands twice"),
        (request(deep="X").replace(b'"X"', b"[" * 127 + b"]" * 127), "invalid_json_line", "nested deeper than 128"),
        (request(text="X").replace(b"X", b"\\ud83d"), "invalid_json_line", "surrogate"),
        (BOM + request(), "invalid_json_line", "not valid JSON"),  # only the file's first line may have one
        (b"\x0c{}", "invalid_json_line", "not valid JSON"),
        (request() + b"\x00", "invalid_json_line", "not valid JSON"),
        (request(text="X").replace(b"X", b"\xff"), "invalid_utf8", "at byte "),
        (request(text="X").replace(b"X", b"\xed\xa0\xbd"), "invalid_utf8", "Save the file as UTF-8"),
        ("{\u201ca\u201d:1}".encode("cp1252"), "invalid_utf8", "at byte 1"),
    ],
)
def test_lines_that_are_no_json(line: bytes, code: str, words: str) -> None:
    problem = parse_line(line, 3, Limits())
    assert isinstance(problem, Problem)
    assert (problem.code, problem.param, problem.line, problem.custom_id) == (code, None, 3, None)
    assert words in problem.message


def test_126_levels_fit_beside_the_line_and_its_body() -> None:
    line = request(deep="X").replace(b'"X"', b"[" * 126 + b"]" * 126)
    assert isinstance(parse_line(line, 1, Limits()), Request)


@prove_more
@given(anything)
def test_any_bytes_are_a_request_or_a_problem(line: bytes) -> None:
    parsed = parse_line(line, 5, Limits())
    if isinstance(parsed, Problem):
        assert parsed.code in CODES
        assert parsed.line == 5
        assert parsed.message.isprintable()


hostile_fields = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": st.one_of(texts, st.none(), st.integers()),
        "method": st.sampled_from(["POST", "GET", None, 1]),
        "url": st.one_of(st.sampled_from(URLS), texts, st.none()),
        "body": st.one_of(
            st.none(),
            st.fixed_dictionaries({}, optional={"model": st.one_of(texts, st.none()), "stream": st.booleans()}),
        ),
        "extra": objects,
    },
)


@prove
@given(hostile_fields.flatmap(spellings))
def test_a_request_is_just_what_the_fields_say(line: str) -> None:
    value = json.loads(line)
    parsed = parse_line(line.encode(), 1, Limits())
    custom_id, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    model: Any = body.get("model") if isinstance(body, dict) else None
    good = (
        isinstance(custom_id, str)
        and 1 <= len(custom_id) <= 64
        and value.get("method") == "POST"
        and url in URLS
        and isinstance(body, dict)
        and isinstance(model, str)
        and 1 <= len(model) <= MAX_MODEL
        and "\0" not in model
        and body.get("stream") is not True
    )
    assert (parsed == Request(custom_id, url, model)) if good else isinstance(parsed, Problem)


# --- a file ---------------------------------------------------------------------------------------------------------
