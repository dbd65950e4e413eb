"""Query parameters: what each kind accepts, and what its refusal says."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from fractions import Fraction
from urllib.parse import quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.server.parameters import MAX_WORDS, Parameters
from batchery.wire.errors import BadRequest


def given_as(value: str) -> Parameters:
    """The parameter `p` with this value."""
    return Parameters(f"p={quote_plus(value)}".encode())


def test_a_parameter_that_is_not_there() -> None:
    none = Parameters(b"q=1")
    assert none.text("p") is None
    assert none.whole("p", 1) is None
    assert none.choice("p", ("a",)) is None
    assert none.words("p", ("a",)) is None
    assert none.moment("p", math.floor) is None
    assert not none.flag("p")


def test_one_that_is_there_twice() -> None:
    assert Parameters(b"p=1&p=1").whole("p", 0) == 1
    with pytest.raises(BadRequest, match="2 times") as caught:
        Parameters(b"p=1&p=2").text("p")
    assert caught.value.param == "p"


@pytest.mark.parametrize("value", ["", "0", "101", "-1", "+1", "1.0", "1e1", " 1", "١", "9" * 31, "\0"])
def test_what_is_no_whole_number(value: str) -> None:
    with pytest.raises(BadRequest, match="from 1 to 100") as caught:
        given_as(value).whole("p", 1, 100)
    assert caught.value.param == "p"


@pytest.mark.parametrize("value", ["", "yes", "True", "1", "true,false", "true "])
def test_what_is_no_flag(value: str) -> None:
    with pytest.raises(BadRequest, match="true, false"):
        given_as(value).flag("p")


def test_flags() -> None:
    assert given_as("true").flag("p")
    assert not given_as("false").flag("p")


@pytest.mark.parametrize(
    ("value", "words"),
    [("a", ("a",)), ("b,a", ("b", "a")), (" a , b ", ("a", "b")), ("a,a,b,a", ("a", "b"))],
)
def test_words(value: str, words: tuple[str, ...]) -> None:
    assert given_as(value).words("p", ("a", "b")) == words


@pytest.mark.parametrize("value", ["", ",", "a,", "a,,b", "c", "a,c", "A", "a b", "a;b", "c" * 9000])
def test_what_is_no_list_of_words(value: str) -> None:
    with pytest.raises(BadRequest, match="one or several of a, b") as caught:
        given_as(value).words("p", ("a", "b"))
    assert caught.value.param == "p"
    assert len(caught.value.message) < 300


def test_there_is_an_end_to_the_number_of_values() -> None:
    values = [str(value) for value in range(MAX_WORDS + 1)]
    assert given_as(",".join(values[1:])).several("p", str.isdigit, "digits") == tuple(values[1:])
    with pytest.raises(BadRequest, match=f"{MAX_WORDS + 1} values"):
        given_as(",".join(values)).several("p", str.isdigit, "digits")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("1735689600", 1735689600),
        ("999999999999", 999999999999),
        ("1.5", Fraction(3, 2)),
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t00:00:00z", 0),
        ("1970-01-01 00:00:00Z", 0),
        ("2025-01-01T00:00:00Z", 1735689600),
        ("2025-01-01T01:30:00+01:30", 1735689600),
        ("2024-12-31T22:30:00-01:30", 1735689600),
        ("2025-01-01T00:00:00-00:00", 1735689600),
        ("2025-01-01T00:00:00.25Z", 1735689600 + Fraction(1, 4)),
        ("2016-12-31T23:59:60Z", 1483228800),
        ("2024-02-29T00:00:00Z", 1709164800),
        ("0001-01-01T00:00:00+23:59", -62135596800 - 86_340),
        ("9999-12-31T23:59:59-23:59", 253402300799 + 86_340),
        ("1969-12-31T23:59:59.5Z", Fraction(-1, 2)),
    ],
)
def test_moments(value: str, seconds: Fraction) -> None:
    assert given_as(value).moment("p", math.floor) == math.floor(seconds)
    assert given_as(value).moment("p", math.ceil) == math.ceil(seconds)


@given(
    moment=st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1)),
    offset=st.integers(-1439, 1439),
)
def test_any_moment_with_any_offset(moment: datetime, offset: int) -> None:
    there = moment.replace(tzinfo=timezone(timedelta(minutes=offset)))
    since = there - datetime(1970, 1, 1, tzinfo=UTC)
    assert given_as(there.isoformat()).moment("p", math.floor) == since // timedelta(seconds=1)
    assert given_as(there.isoformat()).moment("p", math.ceil) == -(-since // timedelta(seconds=1))
    # As people write it who do not know that a plus sign must be percent-encoded.
    assert Parameters(f"p={there.isoformat()}".encode()).moment("p", math.floor) == since // timedelta(seconds=1)


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "now", "-1", "+1", "1e9", "1.", ".5", "1735689600000", "9" * 40, "١", "0x10", "nan", "inf"),
        *("2025-01-01", "2025-01-01T00:00:00", "2025-01-01T00:00Z", "20250101T000000Z", "2025-W01-1T00:00:00Z"),
        *("2025-02-30T00:00:00Z", "2025-13-01T00:00:00Z", "2025-01-01T24:00:00Z", "2025-01-01T00:60:00Z"),
        *("2025-01-01T00:00:61Z", "2025-01-01T00:00:00+24:00", "2025-01-01T00:00:00+00:60", "0000-01-01T00:00:00Z"),
        *("2025-01-01T00:00:00+0100", "2025-01-01T00:00:00.Z", "2025-01-01T00:00:00Z\n", "2025-01-01T00:00:00Zx"),
    ],
)
def test_what_is_no_moment(value: str) -> None:
    with pytest.raises(BadRequest, match="RFC 3339") as caught:
        given_as(value).moment("p", math.floor)
    assert caught.value.param == "p"


@given(st.text(st.sampled_from("0123456789-:.TZtz+ "), max_size=30))
def test_whatever_looks_like_a_moment_is_one_or_is_refused(value: str) -> None:
    try:
        moment = given_as(value).moment("p", math.floor)
    except BadRequest:
        return
    assert moment is not None
    assert abs(moment) < 1 << 50
