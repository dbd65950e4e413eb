"""Result lines: one line to every reader, the upstream's own bytes inside, and no answer lost that is JSON."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchery.wire.results import (
    MAX_CODE,
    MAX_MESSAGE,
    Failure,
    InvalidBody,
    Usage,
    check_answer,
    error_body,
    failure_line,
    failure_of,
    one_line,
    success_line,
)
from batchery.wire.strict_json import is_json

from .json_texts import anything, mutated, prove, prove_more, spellings, texts, values, well_formed

any_text = st.text(st.characters(), max_size=20)  # with lone surrogates
SPLITTERS = ("\n", "\r", "\u2028", "\u2029", "\u0085")

pretty = values.flatmap(
    lambda value: spellings(value, blank=st.sampled_from(["", " ", "\n", "\r\n", "\t"])).map(str.encode)
)
"""JSON as servers print it, over many lines."""


def assert_one_line(line: bytes) -> dict[str, Any]:
    """One line to every reader: bytes, str, and each official client."""
    text = line.decode()
    assert text.endswith("\n")
    assert len(text.splitlines()) == len(line.splitlines()) == 1
    assert not any(char in text[:-1] for char in SPLITTERS)
    parsed: dict[str, Any] = json.loads(line)
    return parsed


def success(body: bytes, **change: Any) -> bytes:
    fields: dict[str, Any] = {
        "id": "batch_req_1",
        "custom_id": "a",
        "status": 200,
        "request_id": "r",
        "body": body,
    } | change
    return success_line(**fields)


def same(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)


# --- answers --------------------------------------------------------------------------------------------------------


def test_a_success_line() -> None:
    body, usage = check_answer(b'{"id":"x","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}')
    assert success_line("batch_req_1", "a", 200, "req-1", body) == (
        b'{"id":"batch_req_1","custom_id":"a","response":{"status_code":200,"request_id":"req-1",'
        b'"body":{"id":"x","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}},"error":null}\n'
    )
    assert usage == Usage(input_tokens=3, output_tokens=4)


@prove_more
@given(st.one_of(anything, pretty, mutated(pretty)))
@example(b'"\\ud83d"')
@example(b'{"usage":{"prompt_tokens":1e400}}')
@example(b'{"usage":"\xff"}')
@example(b'{"usage":"\\ud83d"}')
@example(b'{"x":"\xff"}')
@example(b"[1e400]")
@example(b'{"a":1,"a":2}')
@example(b"NaN")
@example(b'"\xe2\x80\xa8\xc2\x85\\u2028"')
def test_any_body_is_kept_or_refused(body: bytes) -> None:
    """Whatever is JSON by its grammar is an answer that was paid for; nothing else gets into a line."""
    bare = body.removeprefix(b"\xef\xbb\xbf")
    try:
        safe, _ = check_answer(body)
    except InvalidBody:
        assert not is_json(bare)
        return
    assert is_json(bare)
    line = success(safe)
    assert same(assert_one_line(line)["response"]["body"], json.loads(bare))
    if not any(char in bare.decode() for char in SPLITTERS):
        assert safe == bare.strip()
    assert check_answer(safe)[0] == safe


@prove
@given(pretty)
def test_a_body_parses_equal_in_a_strict_parser_too(body: bytes) -> None:
    safe, _ = check_answer(body)
    assert same(msgspec.json.decode(safe), msgspec.json.decode(body))


@prove
@given(well_formed)
def test_a_safe_body_is_not_touched(body: bytes) -> None:
    bare = body.strip()
    if not any(char in bare.decode() for char in SPLITTERS):
        assert one_line(bare) is bare
        assert success(check_answer(bare)[0]).count(b'"body":' + bare + b'},"error":null}\n') == 1


@pytest.mark.parametrize(
    ("body", "safe"),
    [
        (b'{\n  "a": 1\r\n}\n', b'{   "a": 1  }'),
        ('{"a":"\u2028\u2029\u0085"}'.encode(), rb'{"a":"\u2028\u2029\u0085"}'),
        ('{"\u2028":1}'.encode(), rb'{"\u2028":1}'),  # keys too
        ('"\\\\\u2028"'.encode(), rb'"\\\u2028"'),  # behind an escaped backslash
        ('"\u2027\u202a\u0084\u0086â"'.encode(), '"\u2027\u202a\u0084\u0086â"'.encode()),  # the neighbours stay
        (rb'"\u2028\n\r\u0085"', rb'"\u2028\n\r\u0085"'),  # escapes stay as they are
        (rb'"cut \ud83d"', rb'"cut \ud83d"'),  # half an emoji: JSON by its grammar
        (rb'{"usage":"\ud83d"}', rb'{"usage":"\ud83d"}'),
        (b'{"a":1e999}', b'{"a":1e999}'),
        (b'{"a":' + b"9" * 5000 + b"}", b'{"a":' + b"9" * 5000 + b"}"),
        (b'{"usage":' + b"9" * 5000 + b"}", b'{"usage":' + b"9" * 5000 + b"}"),
        (b'{"a":1.10,"b":1E2,"c":-0.0}', b'{"a":1.10,"b":1E2,"c":-0.0}'),  # digits as they came
        (b'{"a":1,"a":2}', b'{"a":1,"a":2}'),
        (b"\xef\xbb\xbf{}", b"{}"),  # a BOM inside a line would be no JSON
        (b" [1] ", b"[1]"),
        (b"7", b"7"),
        (b"null", b"null"),
        (b"[" * 500 + b"]" * 500, b"[" * 500 + b"]" * 500),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_what_becomes_of_bodies(body: bytes, safe: bytes) -> None:
    assert check_answer(body)[0] == safe
    assert error_body(body) == safe


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"  ", "not JSON"),
        (b"<html>", "not JSON"),
        (b'{"a":', "not JSON"),
        (b'{"a":1} trailing', "not JSON"),
        (b'{"a":NaN}', "not JSON"),
        (b'{"a":"\n"}', "not JSON"),
        (b'{"a":"\x1e"}', "not JSON"),
        (b"data: {}\n\ndata: [DONE]", "not JSON"),  # a stream nobody asked for
        (b'{"a":"\xff"}', "not UTF-8 at byte 6"),
        (b'{"usage":"\xff"}', "not UTF-8 at byte 10"),
        (b'{"a":"\xed\xa0\xbd"}', "not UTF-8 at byte 6"),
        ("{}".encode("utf-16"), "not UTF-8 at byte 0"),
        (rb'{"a":"\ud83"}', "not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        (b'{"usage":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_answers_that_are_no_json(body: bytes, words: str) -> None:
    with pytest.raises(InvalidBody, match=words):
        check_answer(body)


@prove
@given(texts, texts, st.integers(200, 299))
def test_names_come_back_as_they_were(custom_id: str, request_id: str, status: int) -> None:
    parsed = assert_one_line(success(b"{}", custom_id=custom_id, request_id=request_id, status=status))
    assert parsed == {
        "id": "batch_req_1",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": request_id, "body": {}},
        "error": None,
    }


# --- usage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        # Chat completions, with both details.
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 20,
                "total_tokens": 30,
                "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 5},
            },
            Usage(input_tokens=10, cached_tokens=4, output_tokens=20, reasoning_tokens=5),
        ),
        # vLLM leaves the details null.
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 20,
                "total_tokens": 30,
                "prompt_tokens_details": None,
            },
            Usage(input_tokens=10, output_tokens=20),
        ),
        # Completions and embeddings.
        ({"prompt_tokens": 8, "total_tokens": 8}, Usage(input_tokens=8)),
        # Responses.
        (
            {
                "input_tokens": 36,
                "input_tokens_details": {"cached_tokens": 6},
                "output_tokens": 87,
                "output_tokens_details": {"reasoning_tokens": 7},
                "total_tokens": 123,
            },
            Usage(input_tokens=36, cached_tokens=6, output_tokens=87, reasoning_tokens=7),
        ),
        # Rerankers give the total alone.
        ({"total_tokens": 56}, Usage(input_tokens=56)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, None),
        # Nothing, or nonsense, is nothing.
        (None, None),
        ({}, None),
        ([], None),
        (7, None),
        ("10", None),
        ({"prompt_tokens": "10"}, None),
        ({"prompt_tokens": True}, None),
        ({"prompt_tokens": -1}, None),
        ({"prompt_tokens": 10.0}, None),
        ({"prompt_tokens": 2**63, "completion_tokens": 2**40}, None),  # a sum of those would not fit 64 bits
        ({"prompt_tokens": 2**40 - 1}, Usage(input_tokens=2**40 - 1)),
        ({"prompt_tokens": None, "input_tokens": 5}, Usage(input_tokens=5)),
        ({"prompt_tokens": 5, "prompt_tokens_details": [1]}, Usage(input_tokens=5)),
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": "x"}}, Usage(input_tokens=5)),
    ],
)
def test_usage_of_each_kind_of_answer(usage: Any, expected: Usage | None) -> None:
    assert check_answer(json.dumps({"object": "x", "usage": usage, "z": [1]}).encode())[1] == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{}", None),
        (b"[1]", None),
        (b'[{"usage":{"prompt_tokens":1}}]', None),
        (rb'{"text":"\ud83d","usage":{"prompt_tokens":1}}', Usage(input_tokens=1)),  # cut emoji, paid all the same
        (rb'{"usage":{"prompt_tokens":1,"x":"\ud83d"}}', Usage(input_tokens=1)),
        (b'{"usage":{"prompt_tokens":1,"x":1e999}}', Usage(input_tokens=1)),
        (b'{"usage":{"prompt_tokens":1e999,"output_tokens":2}}', None),  # the answer stays, its usage cannot be read
        (b'{"usage":{"input_tokens":1,"input_tokens_details":{"cached_tokens":1}}}', Usage(1, 1)),
        (b'{"usage":{"prompt_tokens":9,"input_tokens_details":{"cached_tokens":1},"x":[]}}', Usage(9, 1)),
        (rb'{"us\u0061ge":{"prompt_tokens":1}}', Usage(input_tokens=1)),
        (b'{"text":"\\"usage\\":{\\"prompt_tokens\\":9}","usage":{"prompt_tokens":1}}', Usage(input_tokens=1)),
    ],
)
def test_usage_of_odd_answers(body: bytes, expected: Usage | None) -> None:
    assert check_answer(body)[1] == expected


hostile_usage = st.dictionaries(
    st.sampled_from(
        [
            "prompt_tokens",
            "input_tokens",
            "completion_tokens",
            "output_tokens",
            "total_tokens",
            "prompt_tokens_details",
            "input_tokens_details",
            "completion_tokens_details",
            "output_tokens_details",
        ]
    ),
    st.one_of(
        values,
        st.integers(-5, 2**65),
        st.dictionaries(st.sampled_from(["cached_tokens", "reasoning_tokens"]), values | st.integers(), max_size=2),
    ),
)


@prove
@given(hostile_usage)
def test_usage_is_small_whole_numbers(usage: dict[str, Any]) -> None:
    read = check_answer(json.dumps({"usage": usage}).encode())[1]
    if read is not None:
        counts = (read.input_tokens, read.cached_tokens, read.output_tokens, read.reasoning_tokens)
        assert all(type(count) is int and 0 <= count < 2**40 for count in counts)
        assert any(counts)


def test_usage_adds_up() -> None:
    total = Usage(1, 2, 3, 4)
    total.add(Usage(10, 20, 30, 40))
    assert total == Usage(input_tokens=11, cached_tokens=22, output_tokens=33, reasoning_tokens=44)


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_failure_line() -> None:
    line = failure_line(
        "batch_req_1", "a", Failure("c", "m"), status=400, request_id="r", body=error_body(b'{"error":{}}')
    )
    assert line == (
        b'{"id":"batch_req_1","custom_id":"a","response":{"status_code":400,"request_id":"r","body":{"error":{}}},'
        b'"error":{"code":"c","message":"m"}}\n'
    )


def test_a_failure_line_without_an_answer() -> None:
    assert failure_line("batch_req_1", "a", Failure("batch_expired", "m")) == (
        b'{"id":"batch_req_1","custom_id":"a","response":null,"error":{"code":"batch_expired","message":"m"}}\n'
    )


def test_the_failure_line_of_a_bad_line() -> None:
    assert failure_line("batch_req_1", None, Failure("invalid_json_line", "m"), line=7) == (
        b'{"id":"batch_req_1","custom_id":null,"response":null,"error":{"code":"invalid_json_line","message":"m"},'
        b'"line":7}\n'
    )


@prove
@given(any_text, any_text, any_text, any_text, st.none() | st.integers(1, 2**32))
def test_any_text_makes_one_failure_line(
    custom_id: str, code: str, message: str, request_id: str, line: int | None
) -> None:
    """Lone surrogates too (a header of raw bytes): they become question marks, not exceptions."""
    out = failure_line("i", custom_id, Failure(code, message), status=500, request_id=request_id, line=line)
    parsed = assert_one_line(out)

    def sent(text: str) -> str:
        return text.encode(errors="replace").decode()

    assert parsed["custom_id"] == sent(custom_id)
    assert parsed["error"] == {"code": sent(code), "message": sent(message)}
    assert parsed["response"] == {"status_code": 500, "request_id": sent(request_id), "body": None}
    assert parsed.get("line") == line


@prove_more
@given(st.one_of(anything, pretty, mutated(pretty)), st.integers(100, 999))
@example(b'{"error":{"message":"\\ud83d"}}', 400)
def test_any_failed_answer_makes_one_line(body: bytes, status: int) -> None:
    failure = failure_of(status, body)
    assert 1 <= len(failure.code) <= MAX_CODE
    assert 1 <= len(failure.message) <= MAX_MESSAGE
    parsed = assert_one_line(failure_line("i", "a", failure, status=status, request_id="r", body=error_body(body)))
    bare = body.removeprefix(b"\xef\xbb\xbf")
    kept = parsed["response"]["body"]
    assert same(kept, json.loads(bare) if is_json(bare) else {"raw": body.decode(errors="replace")})


@pytest.mark.parametrize(
    ("status", "value", "code", "message"),
    [
        # OpenAI.
        (
            400,
            {"error": {"message": "too long", "type": "invalid_request_error", "param": "messages", "code": "context"}},
            "context",
            "too long",
        ),
        (
            400,
            {"error": {"message": "no", "type": "invalid_request_error", "code": None}},
            "invalid_request_error",
            "no",
        ),
        (401, {"error": {"message": "no", "type": "", "code": ""}}, "invalid_api_key", "no"),
        # vLLM: a number as code, nested or at the top.
        (400, {"error": {"message": "no", "type": "BadRequestError", "code": 400}}, "BadRequestError", "no"),
        (
            400,
            {"object": "error", "message": "no", "type": "BadRequestError", "param": None, "code": 400},
            "BadRequestError",
            "no",
        ),
        (404, {"error": {"message": "no", "code": 404}}, "404", "no"),
        (404, {"error": {"message": "no", "code": 404.0, "type": None}}, "404", "no"),
        (404, {"error": {"message": "no", "code": 40003.5}}, "40003.5", "no"),
        # FastAPI.
        (422, {"detail": "Unprocessable"}, "unprocessable_entity", "Unprocessable"),
        (
            422,
            {"detail": [{"loc": ["body", "model"], "msg": "Field required", "type": "missing"}]},
            "unprocessable_entity",
            "Field required",
        ),
        (400, {"detail": {"error": "no", "x": 1}}, "invalid_request", "no"),
        # Anthropic.
        (
            529,
            {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
            "overloaded_error",
            "Overloaded",
        ),
        # Google wraps the answer into a list.
        (400, [{"error": {"code": 400, "message": "no", "status": "INVALID_ARGUMENT"}}], "400", "no"),
        # An error that is a text, here and there with more beside it.
        (400, {"error": "no such model"}, "invalid_request", "no such model"),
        (500, "went wrong", "server_error", "went wrong"),
        # No error where one would be.
        (503, {"error": None, "message": "later"}, "service_unavailable", "later"),
        (503, {"error": {}}, "service_unavailable", "The upstream answered with HTTP status 503."),
        (503, {"error": "", "code": "busy"}, "busy", "The upstream answered with HTTP status 503."),
        (418, {}, "http_418", "The upstream answered with HTTP status 418."),
        (418, [], "http_418", "The upstream answered with HTTP status 418."),
        (418, None, "http_418", "The upstream answered with HTTP status 418."),
        # Hostile shapes.
        (400, {"error": {"code": True, "type": ["x"], "message": 7}}, "invalid_request", None),
        (400, {"error": {"code": True, "type": "kind"}}, "kind", None),
        (400, {"error": {"code": {"a": 1}, "message": {"message": {"message": "deep"}}}}, "invalid_request", "deep"),
        (400, {"error": [1, 2]}, "invalid_request", None),
        (400, {"error": {"code": "c" * 1000, "message": "m" * 100_000}}, "c" * 127 + "…", "m" * 4095 + "…"),
    ],
)
def test_the_cause_that_an_answer_states(status: int, value: Any, code: str, message: str | None) -> None:
    message = message or f"The upstream answered with HTTP status {status}."
    assert failure_of(status, json.dumps(value).encode()) == Failure(code, message)


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (502, b"<html><h1>502 Bad Gateway</h1></html>", "bad_gateway"),
        (500, b"", "server_error"),
        (429, b"slow down", "rate_limit_exceeded"),
        (504, b"\xff\xfe", "gateway_timeout"),
        (400, b"[" * 100_000, "invalid_request"),
        (400, b'{"error":{"code":' + b"9" * 5_000 + b"}}", "invalid_request"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_an_answer_that_states_no_cause(status: int, body: bytes, code: str) -> None:
    assert failure_of(status, body) == Failure(code, f"The upstream answered with HTTP status {status}.")
    if is_json(body):
        assert error_body(body) == body
    else:
        assert json.loads(error_body(body)) == {"raw": body.decode(errors="replace")}


def test_deep_causes_end() -> None:
    body = b'{"detail":' * 600 + b'"x"' + b"}" * 600
    assert failure_of(400, body).code == "invalid_request"


def test_a_cut_emoji_in_a_message_is_replaced() -> None:
    assert failure_of(400, rb'{"error":{"message":"a\ud83d","code":"c"}}') == Failure("c", "a\ufffd")
