"""The `Prefer` header: what is a wish to wait, and what is passed over."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.server.prefer import LONGEST_WAIT, MAX_LENGTH, wait_of


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ([], None),
        ([""], None),
        (["wait=5"], 5),
        (["wait=0"], 0),
        (["wait=007"], 7),
        (["WAIT=5"], 5),
        (["wait = 5"], 5),
        (["\twait\t=\t5 "], 5),
        (['wait="5"'], 5),
        (['wait="\\5"'], 5),
        (["wait=61"], LONGEST_WAIT),
        (["wait=" + "9" * 900], LONGEST_WAIT),
        (["respond-async, wait=5"], 5),
        (["respond-async,wait=5,handling=lenient"], 5),
        (["respond-async", "wait=5"], 5),
        (["respond-async; foo=bar; wait=3, wait=5"], 5),
        (["wait=5; foo"], 5),
        (["wait=5;"], 5),
        (['foo="a, wait=3"; bar, wait=5'], 5),
        (['foo="a\\", wait=3", wait=5'], 5),
        ([",, ,wait=5,"], 5),
        # Of several, the first counts, also when it is wrong.
        (["wait=3, wait=5"], 3),
        (["wait=3", "wait=5"], 3),
        (["wait=x, wait=5"], None),
        # Malformed, or no number of seconds.
        (["wait"], None),
        (["wait="], None),
        (['wait=""'], None),
        (["wait=-1"], None),
        (["wait=+1"], None),
        (["wait=1.5"], None),
        (["wait=1e1"], None),
        (["wait=٥"], None),
        (["wait=5s"], None),
        (['wait=" 5"'], None),
        (["awaiting=5"], None),
        (["5"], None),
        # Something malformed is passed over, up to the next comma that is not in quotes.
        (["foo bar, wait=5"], 5),
        (["é, wait=5"], 5),
        (["foo=@, wait=5"], 5),
        (['foo=@"a, wait=3", wait=5'], 5),
        (['foo="open, wait=5'], 5),
        (["=5, wait=5"], 5),
        (["x" * MAX_LENGTH + ", wait=5"], None),
    ],
)
def test_examples(headers: list[str], wait: int | None) -> None:
    assert wait_of(headers) == wait


@given(st.lists(st.text(st.sampled_from('wait=0123456789," \\;\tx-é'), max_size=80), max_size=4))
def test_anything_is_a_wait_or_nothing(headers: list[str]) -> None:
    wait = wait_of(headers)
    assert wait is None or 0 <= wait <= LONGEST_WAIT
    if wait is not None:
        assert re.search(r"wait", ",".join(headers))


@given(st.lists(st.text(st.characters(max_codepoint=255), max_size=200), max_size=4), st.integers(0, 10**20))
def test_a_wait_that_comes_first_is_seen_whatever_follows(others: list[str], seconds: int) -> None:
    wanted = None if len(",".join([f"wait={seconds}", *others])) > MAX_LENGTH else min(seconds, LONGEST_WAIT)
    assert wait_of([f"wait={seconds}", *others]) == wanted


@pytest.mark.parametrize("piece", ['a="\\",', 'a="', "a=b;", "a,", ";", '"\\', "a=", ' \t;a="b'])
def test_a_hostile_header_is_read_in_no_time(piece: str) -> None:
    assert wait_of([(piece * MAX_LENGTH)[: MAX_LENGTH - 1]]) is None
