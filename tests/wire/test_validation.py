"""A whole input file: the verdict on it, the index, and nothing that depends on how it was cut."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.wire import strict_json
from batchery.wire.file_index import ONE_MODEL_TOO_MANY, PARSE, Counts, problem_of
from batchery.wire.lines import (
    BOM,
    MAX_MODELS,
    MAX_PROBLEMS,
    URLS,
    Limits,
    Problem,
    Request,
    parse_line,
    read_request,
)
from batchery.wire.validation import LineValidator, Report, validate
from tests.wire.examples import CODES, GOOD, request

from .json_texts import anything, objects, prove, spellings, texts


def check(data: bytes, limits: Limits | None = None, chunks: Iterable[bytes] | None = None) -> Report:
    return validate([data] if chunks is None else chunks, limits or Limits(), reader(data))


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda start, length: data[start : start + length]


def found(report: Report) -> list[tuple[str, int | None]]:
    return [(problem.code, problem.line) for problem in report.problems]


def remade(data: bytes, report: Report) -> list[Problem]:
    """The problems of all bad lines, from their bytes again."""
    index, bad = report.index, report.index.bad
    lines = (
        b"never read" if bad.is_too_large(i) else data[bad.starts[i] : bad.starts[i] + bad.lengths[i]]
        for i in range(len(bad))
    )
    return [problem_of(index, i, line) for i, line in enumerate(lines)]


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


# --- one line -------------------------------------------------------------------------------------------------------

custom_ids = st.one_of(st.integers(0, 5).map(str), texts.filter(bool))
good_lines = st.builds(
    lambda custom_id, url, body, model: {
        "custom_id": custom_id,
        "method": "POST",
        "url": url,
        "body": body | {"model": model, "stream": False},
    },
    custom_ids,
    st.sampled_from(URLS),
    objects,
    st.sampled_from(["m", "n", "é"]),
).flatmap(lambda value: spellings(value).map(str.encode))
blanks = st.sampled_from([b"", b" ", b"\t ", b"\x0b", b"\x0c"])
lines = st.one_of(good_lines, good_lines, good_lines, blanks, anything)
endings = st.sampled_from([b"\n", b"\n", b"\r\n"])


@st.composite
def files(draw: Callable[..., Any]) -> bytes:
    """Files with good and bad lines, blank ones, either line break, perhaps a BOM, perhaps no last line break."""
    data: bytes = b"".join(draw(lines) + draw(endings) for _ in range(draw(st.integers(0, 8))))
    if draw(st.booleans()):
        data = BOM + data
    return data + draw(lines) if draw(st.booleans()) else data


FILE_CODES = ("too_many_requests_in_file", "empty_file")
"""What is wrong with a whole file: then nothing of it can run."""

small = st.builds(Limits, line_bytes=st.integers(1, 200), requests=st.integers(1, 8))


@prove
@given(files(), small, st.lists(st.integers(0, 10_000), max_size=12))
def test_the_report_does_not_depend_on_the_chunks(data: bytes, limits: Limits, places: list[int]) -> None:
    whole = check(data, limits)
    assert check(data, limits, cut(data, places)) == whole
    assert check(data, limits, [data[i : i + 1] for i in range(len(data))]) == whole


@prove
@given(files())
def test_a_file_is_its_lines_one_by_one(data: bytes) -> None:
    """Against a slow reference: split on \\n, drop blank lines, parse each."""
    report = check(data)
    physical = data.removeprefix(BOM).split(b"\n")
    expected: list[tuple[int, Request | Problem]] = []
    for number, line in enumerate(physical, 1):
        content = line.removesuffix(b"\r")
        if content.strip(b" \t\r\n\x0b\x0c"):
            expected.append((number, parse_line(content, number, Limits())))
    requests = [(number, parsed) for number, parsed in expected if isinstance(parsed, Request)]
    problems = [parsed for _, parsed in expected if isinstance(parsed, Problem)]
    seen: dict[str, int] = {}
    repeats = []
    for number, parsed in requests:
        if seen.setdefault(parsed.custom_id, number) != number:
            repeats.append(("duplicate_custom_id", number, seen[parsed.custom_id]))

    index = report.index
    repeated = {number for _, number, _ in repeats}
    requests = [(number, parsed) for number, parsed in requests if number not in repeated]
    assert [index.number(i) for i in range(len(index))] == [number for number, _ in requests]
    assert (index.numbers is None) is ([number for number, _ in requests] == list(range(1, len(index) + 1)))
    assert list(index.bad.numbers) == sorted(repeated | {problem.line or 0 for problem in problems})
    assert [index.number(first) for first in index.bad.firsts if first != PARSE] == [first for *_, first in repeats]
    assert [p for p in report.problems if p.code not in ("duplicate_custom_id", "empty_file")] == problems
    assert [
        (p.code, p.line, int(p.message.split("line ")[-1].split(".")[0]))
        for p in report.problems
        if p.code == "duplicate_custom_id"
    ] == repeats
    assert report.problem_count == len(problems) + len(repeats) + (not expected)
    assert report.ok is (report.problem_count == 0)
    assert (report.summary() is None) is report.ok
    assert report.lines == len(physical) - (physical[-1] == b"" and data != BOM)
    assert [p.line or 0 for p in report.problems] == sorted(p.line or 0 for p in report.problems)
    models: dict[str, list[int]] = {}
    counts: dict[str, dict[str, Counts]] = {}
    for i, (_, parsed) in enumerate(requests):
        models.setdefault(parsed.model, []).append(i)
        line = data[index.starts[i] : index.starts[i] + index.lengths[i]]
        assert b"\n" not in line
        before = counts.setdefault(parsed.model, {}).get(parsed.url, Counts(0, 0))
        counts[parsed.model][parsed.url] = Counts(before.requests + 1, before.bytes + len(line))
        again = read_request(line)
        assert (again.custom_id, again.url) == (parsed.custom_id, parsed.url)
        body = bytes(again.body)
        assert body in line
        assert strict_json.loads(body) == strict_json.loads(line)["body"]
    assert dict(zip(index.models, map(list, index.by_model), strict=True)) == models
    assert list(index.models) == list(models)
    assert list(index.urls) == list(dict.fromkeys(parsed.url for _, parsed in requests))
    assert report.groups == counts
    assert [list(urls) for urls in report.groups.values()] == [list(urls) for urls in counts.values()]


@prove
@given(files(), small)
def test_every_problem_can_be_made_again_from_its_line(data: bytes, limits: Limits) -> None:
    report = check(data, limits)
    assert remade(data, report) == [p for p in report.problems if p.code not in FILE_CODES]
    assert report.problem_count == len(report.index.bad) + (not report.can_skip)
    assert report.can_skip is not any(p.code in FILE_CODES for p in report.problems)
    assert report.index.bad.limit == limits.line_bytes


@prove
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=8), small)
def test_any_bytes_in_any_chunks_leave_a_located_verdict(data: bytes, places: list[int], limits: Limits) -> None:
    report = check(data, limits, cut(data, places))
    assert not report.ok  # so short a file of arbitrary bytes has no request
    for problem in report.problems:
        assert problem.code in CODES
        assert problem.message.isprintable()
        assert (problem.line is None) is (problem.code == "empty_file")


A, B = request("a"), request("b")


@pytest.mark.parametrize(
    ("data", "starts", "numbers"),
    [
        (A + b"\n" + B + b"\n", [0, len(A) + 1], [1, 2]),
        (A + b"\n" + B, [0, len(A) + 1], [1, 2]),  # no last line break
        (A + b"\r\n" + B + b"\r\n", [0, len(A) + 2], [1, 2]),
        (A + b"\r\n" + B + b"\r", [0, len(A) + 2], [1, 2]),  # cut between \r and \n
        (BOM + A + b"\n" + B, [3, len(A) + 4], [1, 2]),
        (b"\n\n" + A + b"\n \n\r\n" + B + b"\n\n", [2, len(A) + 7], [3, 6]),
        (BOM + b"\n" + A, [4], [2]),
        (A + b"\n\n", [0], [1]),
        (b"  " + A + b"  \n", [0], [1]),  # blanks around a line belong to it
    ],
)
def test_where_requests_are(data: bytes, starts: list[int], numbers: list[int]) -> None:
    report = check(data)
    assert report.ok
    index = report.index
    assert list(index.starts) == starts
    assert [index.number(i) for i in range(len(index))] == numbers
    assert (index.numbers is None) is (numbers == list(range(1, len(numbers) + 1)))
    assert all(
        data[start : start + length].strip() in (A, B) for start, length in zip(starts, index.lengths, strict=True)
    )


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\u0085", "\u00a0", "\ufeff", "\x7f"])
def test_only_line_feeds_split_lines(char: str) -> None:
    line = json.dumps(GOOD | {"custom_id": f"a{char}b"}, ensure_ascii=False).encode()
    report = check(line + b"\n" + B)
    assert report.ok
    assert (len(report.index), report.lines) == (2, 2)
    assert read_request(line).custom_id == f"a{char}b"


@pytest.mark.parametrize("byte", [b"\x0b", b"\x0c", b"\x1c", b"\x1d", b"\x1e", b"\r"])
def test_control_characters_neither_split_nor_pass(byte: bytes) -> None:
    report = check(A.replace(b'"a"', b'"a' + byte + b'"') + b"\n" + B)
    assert found(report) == [("invalid_json_line", 1)]
    assert report.index.number(0) == 2


def test_a_second_bom_is_an_error() -> None:
    assert found(check(BOM + BOM + A)) == [("invalid_json_line", 1)]
    assert found(check(A + b"\n" + BOM + B)) == [("invalid_json_line", 2)]


@pytest.mark.parametrize("data", [b"", b"\n", b"\n\n \r\n", BOM, BOM + b"\r\n", b" "])
def test_empty_files(data: bytes) -> None:
    report = check(data)
    assert found(report) == [("empty_file", None)]
    assert report.summary() == report.problems[0].message


def test_utf16_is_said_to_be_no_utf8() -> None:
    data = (A + b"\n" + B).decode().encode("utf-16")
    assert found(check(data))[0] == ("invalid_utf8", 1)


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [b"", BOM])
@pytest.mark.parametrize("after", [b"", b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("step", [1, 7, 1_000_000])
def test_a_line_may_be_just_as_long_as_the_limit(before: bytes, after: bytes, step: int) -> None:
    """The BOM and the \\r are not the line's."""
    for spare, expected in ((0, []), (-1, [("line_too_large", 1)])):
        data = before + A + after + (b"" if after in (b"", b"\r") else B[:-1] + b"}")
        limits = Limits(line_bytes=len(A) + spare)
        chunks = [data[i : i + step] for i in range(0, len(data), step)]
        report = check(data, limits, chunks)
        assert found(report)[:1] == expected


def test_a_long_line_is_not_held() -> None:
    validator = LineValidator(Limits(line_bytes=1000))
    for _ in range(1000):
        validator.feed(b"x" * 1000)
        assert len(validator._tail) <= 1004
    validator.feed(b"\n" + A)
    report = validator.finish(reader(b""))
    assert found(report) == [("line_too_large", 1)]
    assert (report.index.starts[0], report.index.number(0)) == (1_000_001, 2)


@pytest.mark.parametrize("step", [1, 1_000_000])
def test_too_long_lines_are_requests_too_and_blank_ones_are_no_exception(step: int) -> None:
    """Once found only when the line came in pieces, or only when it came whole."""
    limits = Limits(line_bytes=100, requests=2)
    for data, expected in [
        (A + b"\n" + A.replace(b'"a"', b'"c"') + b"\n" + b"x" * 200, [("too_many_requests_in_file", 3)]),
        (b" " * 200 + b"\n" + A, [("line_too_large", 1)]),
        (b" " * 100 + b"\n" + A, []),
    ]:
        assert found(check(data, limits, [data[i : i + step] for i in range(0, len(data), step)])) == expected


def test_reading_stops_at_the_first_request_too_many() -> None:
    limits = Limits(requests=3)
    lines = [request(str(i)) for i in range(3)]
    assert check(b"\n".join(lines) + b"\n\n\r\n", limits).ok  # blank lines are none
    validator = LineValidator(limits)
    for line in lines:
        validator.feed(b"\n" + line)
    assert not validator.stopped
    validator.feed(b"\n\n" + request("x") + b"\n" + b"bad\n" * 10)
    assert validator.stopped
    validator.feed(b"bad\n" * 10)
    report = validator.finish(reader(b"\n".join([b"", *lines])))
    assert found(report) == [("too_many_requests_in_file", 6)]
    assert "more than 3" in report.problems[0].message
    assert (len(report.index), report.lines) == (3, 6)


def test_bad_lines_count_as_requests() -> None:
    data = b"{\n[\n" + request("x") + b"\n" + request("y")
    assert found(check(data, Limits(requests=3))) == [
        ("invalid_json_line", 1),
        ("invalid_json_line", 2),
        ("too_many_requests_in_file", 4),
    ]


def test_problems_are_capped_but_counted() -> None:
    report = check(b"{\n" * (MAX_PROBLEMS + 5))
    assert (len(report.problems), report.problem_count) == (MAX_PROBLEMS, MAX_PROBLEMS + 5)
    assert report.summary() == report.problems[0].message + f" ({MAX_PROBLEMS + 5} problems in all)"


def test_of_too_many_problems_the_first_by_line_are_kept() -> None:
    """Duplicates are known last, but one on line 2 must not give way to bad JSON on line 1005."""
    data = A + b"\n" + A + b"\n" + b"{\n" * (MAX_PROBLEMS + 5)
    report = check(data)
    assert report.problem_count == MAX_PROBLEMS + 6
    assert found(report) == [("duplicate_custom_id", 2)] + [
        ("invalid_json_line", n) for n in range(3, MAX_PROBLEMS + 2)
    ]


def test_duplicates_name_both_lines() -> None:
    report = check(b"\n".join([A, b"", B, A, b"{", A]))
    assert found(report) == [("duplicate_custom_id", 4), ("invalid_json_line", 5), ("duplicate_custom_id", 6)]
    first = report.problems[0]
    assert first.message.startswith("Line 4: custom_id 'a' was already used on line 1.")
    assert (first.param, first.custom_id) == ("custom_id", "a")
    assert "line 1" in report.problems[2].message


@pytest.mark.parametrize(
    ("one", "other"),
    [("é", "e\u0301"), ("a", "A"), ("a", "a "), ("1", "１")],  # equal to people, not to a program
)
def test_custom_ids_are_compared_by_code_point(one: str, other: str) -> None:
    assert check(request(one) + b"\n" + request(other)).ok


def test_custom_ids_in_different_spellings_are_equal() -> None:
    assert found(check(A + b"\n" + A.replace(b'"a"', b'"\\u0061"'))) == [("duplicate_custom_id", 2)]


def test_a_bad_lines_custom_id_is_not_taken() -> None:
    bad = A.replace(b"POST", b"GET")
    assert found(check(bad + b"\n" + A)) == [("invalid_method", 1)]


def test_equal_hashes_are_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def equal(text: str) -> int:
        hashed.append(text)
        return 7

    monkeypatch.setattr("batchery.wire.validation.hash", equal, raising=False)
    data = b"\n".join([A, B, request("c"), A, B])
    report = check(data)
    assert hashed == ["a", "b", "c", "a", "b"]
    assert found(report) == [("duplicate_custom_id", 4), ("duplicate_custom_id", 5)]
    assert list(report.index.bad.firsts) == [0, 1]
    assert remade(data, report) == list(report.problems)


def test_half_a_file_of_duplicates_takes_seconds() -> None:
    data = b"\n".join(request(str(i % 25_000)) for i in range(50_000))
    started = time.process_time()
    report = check(data)
    assert time.process_time() - started < 5
    assert report.problem_count == 25_000
    assert len(report.problems) == MAX_PROBLEMS
    assert found(report)[0] == ("duplicate_custom_id", 25_001)
    assert found(report)[-1] == ("duplicate_custom_id", 26_000)
    again = remade(data, report)
    assert again[:MAX_PROBLEMS] == list(report.problems)
    assert again[-1].message.startswith("Line 50000: custom_id '24999' was already used on line 25000.")
    assert (len(again), len(report.index), report.index.numbers) == (25_000, 25_000, None)


def test_what_only_repeats_ask_for_is_not_in_the_index() -> None:
    first = request("a", "m")
    again = request("a", "n").replace(b"chat/completions", b"embeddings")
    other = request("b", "o")
    report = check(b"\n".join([first, again, b"{", other]))
    index = report.index
    assert (index.models, list(map(list, index.by_model))) == (("m", "o"), [[0], [1]])
    assert index.urls == ("/v1/chat/completions",)
    assert report.groups == {
        "m": {"/v1/chat/completions": Counts(1, len(first))},
        "o": {"/v1/chat/completions": Counts(1, len(other))},
    }
    assert [index.number(i) for i in range(len(index))] == [1, 4]
    assert list(index.bad.numbers) == [2, 3]
    assert list(index.bad.firsts) == [0, PARSE]


def test_the_first_use_is_counted_among_the_good_requests() -> None:
    """Its own place moves up when repeats before it are taken out."""
    data = b"\n".join([A, A, b"", B, A, B])
    report = check(data)
    assert [report.index.number(i) for i in range(len(report.index))] == [1, 4]
    assert list(report.index.bad.firsts) == [0, 0, 1]
    assert remade(data, report) == list(report.problems)


def test_a_file_may_name_many_models_but_not_any_number() -> None:
    lines = [request(str(i), f"model-{i}") for i in range(MAX_MODELS)]
    assert check(b"\n".join(lines)).ok
    more = [request("x", "one-more"), request("y", "model-0"), request("z", "two-more")]
    report = check(b"\n".join(lines + more))
    assert found(report) == [
        ("missing_required_parameter", MAX_MODELS + 1),
        ("missing_required_parameter", MAX_MODELS + 3),
    ]
    assert {(p.param, p.custom_id) for p in report.problems} == {("body.model", "x"), ("body.model", "z")}
    assert len(report.index) == MAX_MODELS + 1
    assert report.index.number(MAX_MODELS) == MAX_MODELS + 2
    assert list(report.index.bad.firsts) == [ONE_MODEL_TOO_MANY] * 2
    assert remade(b"\n".join(lines + more), report) == list(report.problems)


@pytest.mark.parametrize("before", [b"", BOM])
@pytest.mark.parametrize("step", [1, 7, 1_000_000])
def test_a_line_too_long_is_known_by_its_length(before: bytes, step: int) -> None:
    """However it is cut, and whether it begins with a BOM or ends with a carriage return."""
    limits = Limits(line_bytes=150)
    for length in (150, 151, 153, 154, 155, 156, 300):
        data = before + b"x" * length + b"\r\n" + A + b"\n" + b"y" * length
        report = check(data, limits, [data[i : i + step] for i in range(0, len(data), step)])
        bad = report.index.bad
        assert len(report.index) == 1
        assert [bad.is_too_large(i) for i in range(2)] == [length > 150] * 2
        assert remade(data, report) == list(report.problems)
        whole = (0, len(before) + length + 1) if length > 150 else (len(before), length)
        assert (bad.starts[0], bad.lengths[0]) == whole


def test_a_line_longer_than_an_index_can_say_is_too_long_all_the_same() -> None:
    validator = LineValidator(Limits(line_bytes=10))
    validator.feed(b"x" * 1000)
    validator._tail_length = 2**32 + 5
    validator.feed(b"\n" + A)
    bad = validator.finish(reader(b"")).index.bad
    assert (bad.lengths[0], bad.is_too_large(0)) == (2**32 - 1, True)
    assert bad.starts[1] == 2**32 + 6


def test_a_line_that_newer_rules_would_take_is_still_refused() -> None:
    data = A.replace(b"POST", b"GET") + b"\n" + B
    report = check(data)
    problem = problem_of(report.index, 0, A)
    assert (problem.code, problem.line, problem.custom_id) == ("invalid_json_line", 1, "a")
    assert "rules that have changed since" in problem.message


def test_a_file_of_bad_lines_can_be_passed_over_but_not_one_with_too_many() -> None:
    assert check(b"{\n[").can_skip
    assert check(A).can_skip
    assert not check(b"").can_skip
    assert not check(A + b"\n" + B, Limits(requests=1)).can_skip
    assert not check(b"{\n" * 3, Limits(requests=2)).can_skip


def test_memory_per_request_is_flat() -> None:
    """The index is arrays: 8 + 4 bytes for the place, 4 for its model, 8 for the hash; no object per request."""
    index = check(b"\n".join(request(str(i)) for i in range(1000))).index
    assert (index.starts.itemsize, index.lengths.itemsize) == (8, 4)
    assert [list(requests) for requests in index.by_model] == [list(range(1000))]
    assert index.by_model[0].itemsize == 4
