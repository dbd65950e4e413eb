"""Strict JSON against a slow reference: the standard library, told to be strict."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchery.wire import strict_json
from batchery.wire.strict_json import MAX_DEPTH, NotJson, NotUtf8, describe, is_json, loads, mask_surrogates

from .json_texts import anything, few_keys, mutated, prove, prove_more, repeating, spelled, values, well_formed


class Refused(Exception):
    """The reference says no."""


class Beyond(Exception):
    """JSON by its grammar that `loads` refuses by intent: half a surrogate pair, or a number beyond float."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise Refused("repeated key")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise Refused(name)


def _walk(value: Any, depth: int = 1) -> None:
    if isinstance(value, str):
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise Beyond
    elif isinstance(value, float):
        if math.isinf(value):
            raise Beyond
    elif isinstance(value, list | dict):
        if depth > MAX_DEPTH:
            raise Refused("depth")
        for item in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            _walk(item, depth + 1)


def reference(data: bytes) -> Any:
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except ValueError as error:  # of which UnicodeDecodeError is one
        raise Refused(str(error)) from None
    _walk(value)
    return value


def same(one: Any, other: Any) -> bool:
    """Equal in value, in type (1 is not 1.0 nor True), in the sign of a zero and in the order of keys."""
    return repr(one) == repr(other)


@prove_more
@given(anything)
@example(b'{"a":1,"\\u0061":2}')  # the same key in two spellings
@example(b'{"\\u003a":1,"a":2,"a":3}')  # one colon gained, one lost
@example(b'{"x":"\\u003A","a":2,"a":3}')
@example(b'{"a" :1,"a"\t:2}')  # whitespace before the colon
@example(b'{"a:":1,"a:":2}')  # colons inside the key
@example(b'[{"b":{"a":1,"a":{"c":":"}}}]')
@example(b'{"a":"\\":","a":"\\\\"}')
@example(b'{"a":123456789012345678901234567890,"a":1}')  # beyond what the encoder takes
@example(b'{"":1,"":2}')
@example(b'{"\\ud83d\\ude00":1,"\xf0\x9f\x98\x80":2}')
@example(b"[1e400]")
@example(b'["\\ud83d"]')
@example(b'["\\ud83d\\ud83d"]')
@example(b'["\\ude00\\ud83d"]')
@example(b"\xef\xbb\xbf{}")
@example(b"{}\x00")
@example(b"")
def test_agrees_with_the_reference(data: bytes) -> None:
    try:
        expected = reference(data)
    except (Refused, Beyond):
        with pytest.raises(NotJson):
            loads(data)
    else:
        assert same(loads(data), expected)


@prove
@given(values)
def test_reads_what_the_standard_library_writes(value: Any) -> None:
    assert same(loads(json.dumps(value).encode()), value)
    assert same(loads(json.dumps(value, ensure_ascii=False, indent=1).encode()), value)


@prove_more
@given(repeating)
def test_finds_repeated_keys_in_any_spelling(data: bytes) -> None:
    try:
        reference(data)
    except Refused:
        with pytest.raises(NotJson, match="stands twice"):
            loads(data)
    else:
        loads(data)


@prove
@given(st.data(), few_keys, st.integers(0, 100))
def test_finds_a_repeated_key_at_any_depth(data: st.DataObject, key: str, depth: int) -> None:
    one, other = data.draw(spelled(key)), data.draw(spelled(key))
    text = f'{{"x":{{"y":1}},{one} : ":",{other}: "\\u003a"}}'
    for level in range(depth):
        text = f"[{text}]" if level % 2 else f'{{"k:{level}":{text}}}'
    with pytest.raises(NotJson, match="stands twice"):
        loads(text.encode())


@prove
@given(st.lists(st.sampled_from("[{"), min_size=1, max_size=MAX_DEPTH + 2).map("".join), st.text(alphabet='[]{}"\\:'))
def test_the_bound_on_nesting_is_exact(opening: str, noise: str) -> None:
    """Whatever stands in strings, before or after."""
    noise = json.dumps(noise * 40)
    text = noise
    for bracket in reversed(opening):
        text = f'[{noise},{text},[],"]"]' if bracket == "[" else f'{{{noise}:{text},"[{{":{{}}}}'
    deepest = len(opening) + 1  # of the empty brackets inside the innermost
    if deepest > MAX_DEPTH:
        with pytest.raises(NotJson, match="nested deeper"):
            loads(text.encode())
    else:
        loads(text.encode())


@pytest.mark.parametrize(
    ("open_", "close"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]"), ('[1,{"]":"[{","a":', "}]")]
)
def test_128_levels_pass_and_129_do_not(open_: str, close: str) -> None:
    levels = len(close)
    text = open_ * (MAX_DEPTH // levels)
    closing = close * (MAX_DEPTH // levels)
    loads(f"{text}1{closing}".encode())
    with pytest.raises(NotJson, match="nested deeper"):
        loads(f"{text}[]{closing}".encode())


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
        b'[{"a":' * 50_000 + b"1" + b"}]" * 50_000,
        b'"' + b"[" * 100_000,  # a string without an end
        b"]" * 100_000 + b"[" * 100_000,
        b'[\\"' * 100_000,  # backslashes outside strings
        b"[]" * 100_000,
    ],
    ids=lambda data: repr(data[:8]),
)
def test_brackets_without_end_are_refused_without_recursion(data: bytes) -> None:
    with pytest.raises(NotJson):
        loads(data)
    assert not is_json(data)


TEN_MB = 10 * 1024 * 1024


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b'"' + b"[" * TEN_MB + b'"', id="brackets in a string"),
        pytest.param(b'"' + b'\\"' * (TEN_MB // 2) + b'"', id="escaped quotes"),
        pytest.param(b'"' + b'\\"[{' * (TEN_MB // 4) + b'"', id="escaped quotes and brackets"),
        pytest.param(b'"' + b"\\\\" * (TEN_MB // 2) + b'"', id="backslashes"),
        pytest.param(b'"' + b"::\\u003a" * (TEN_MB // 8) + b'"', id="colons"),
        pytest.param(b'"' + b"\\ud83d\\ude00" * (TEN_MB // 12) + b'"', id="surrogate pairs"),
    ],
)
def test_ten_megabytes_take_a_moment(data: bytes) -> None:
    started = time.process_time()
    loads(data)
    assert time.process_time() - started < 2


def test_many_keys_take_a_moment() -> None:
    data = json.dumps({str(i): ":" for i in range(200_000)}).encode()
    started = time.process_time()
    loads(data)
    loads(data.replace(b'":"', b'"\\u003a"'))
    with pytest.raises(NotJson, match="'0' stands twice"):
        loads(data[:-1] + b',"0":1}')
    assert time.process_time() - started < 4


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b'"\xff"', 1),
        (b'{"a":"ok","b\xc3":1}', 12),  # in a key
        (b'"\xed\xa0\x80"', 1),  # a surrogate, encoded
        (b'"\xc0\x80"', 1),  # an overlong NUL
        (b'"\xf4\x90\x80\x80"', 1),  # beyond U+10FFFF
        (b'"abc\xe2\x82', 4),  # cut off
        (b"{\xff", 1),  # outside strings
        (b'"\xc3\xa9\xff"', 3),
    ],
)
def test_bad_utf8_is_located(data: bytes, offset: int) -> None:
    with pytest.raises(NotUtf8) as caught:
        loads(data)
    assert caught.value.offset == offset


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (rb'"\ud83d"', "surrogate"),
        (rb'{"a":"x\ude00y"}', "surrogate"),
        (rb'{"\ud83d":1}', "surrogate"),
        (rb'"\ud83d\u0041"', "surrogate"),
        (rb'["\ud83d",]', "trailing comma|malformed|truncated"),  # also bad otherwise: not blamed on the surrogate
        (b"1e400", "range"),
        (b"1" * 5000, "range|too long"),
        (b"NaN", "malformed"),
        (b"[1,]", "trailing comma"),
        (b"", "truncated"),
    ],
)
def test_the_reason_is_said(data: bytes, words: str) -> None:
    with pytest.raises(NotJson, match=words):
        loads(data)


@prove_more
@given(st.one_of(anything, mutated(st.sampled_from([rb'["\ud83d","\\ud83d","\uDE00"]', rb'{"\ud83d\ude00":1e999}']))))
@example(rb'"\ud83d"')
@example(rb'"\\ud83d"')
@example(rb'"\\\ud83d"')
@example(rb'"\ud83"')
@example(rb"\ud83d")
def test_the_grammar_alone_agrees_with_the_reference(data: bytes) -> None:
    """`is_json` knows nothing of repeats, ranges and surrogates."""
    try:
        text = data.decode()
        json.loads(text, parse_constant=_refuse_constant, parse_int=len, parse_float=len)
        expected = True
    except (ValueError, Refused):
        expected = False
    assert is_json(data) is expected
    masked = mask_surrogates(data)
    assert len(masked) == len(data)
    assert is_json(masked) is expected
    if b"\\u" not in data:
        assert masked is data


@prove
@given(well_formed)
def test_masking_changes_only_surrogates(data: bytes) -> None:
    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            return "".join(char if char <= "\uffff" else "\ufffd\ufffd" for char in value)
        if isinstance(value, list):
            return [replaced(item) for item in value]
        return value

    value = json.loads(data)
    if isinstance(value, str | list) and "{" not in str(value):
        raw = json.dumps(value).encode()  # every character beyond U+FFFF as a pair
        assert same(json.loads(mask_surrogates(raw)), replaced(value))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("gpt", "'gpt'"),
        ("x" * 65, "'" + "x" * 61 + "...'"),
        ("\u2028\n", "'\\u2028\\n'"),  # one line
        (7, "7"),
        (7.5, "7.5"),
        pytest.param(10**5000, "a number", id="huge"),  # whose digits Python refuses to write
        (True, "a boolean"),
        (None, "null"),
        ([1], "an array"),
        ({}, "an object"),
    ],
)
def test_describe(value: Any, text: str) -> None:
    assert describe(value) == text


def test_the_message_of_a_repeat_does_not_carry_the_data() -> None:
    key = "k" * 1_000_000
    with pytest.raises(NotJson) as caught:
        loads(json.dumps({key: 1}).encode()[:-1] + f', "{key}": 2}}'.encode())
    assert len(str(caught.value)) < 200


def test_duplicate_check_never_says_no_wrongly_when_the_value_cannot_be_encoded() -> None:
    assert strict_json.loads(b'{"a":18446744073709551616}') == {"a": 2**64}
