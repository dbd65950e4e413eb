"""The result index: what is noted is found again, whichever way it was noted."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.store.result_index import CODES, DamagedIndexError, ResultIndex, Status, decode, encode
from batchery.wire.results import Kind


def empty(count: int) -> ResultIndex:
    return ResultIndex.empty(array("I", range(1, count + 1)))


@given(
    st.data(),
    st.lists(st.tuples(st.integers(1, 1 << 20), st.integers(1, 50)), max_size=20),
    st.integers(0, 1 << 40),
    st.sampled_from(("output", "error")),
)
def test_lines_in_a_row_are_noted_as_each_by_itself(
    data: st.DataObject, lines: list[tuple[int, int]], start: int, kind: Kind
) -> None:
    good = data.draw(st.integers(0, 25))
    requests = data.draw(st.permutations(range(25)))[: len(lines)]
    together, one_by_one = empty(25), empty(25)
    ends: list[int] = []
    for request, (length, attempts) in zip(requests, lines, strict=True):
        before = ends[-1] if ends else 0
        ends.append(before + length)
        status: Status = "invalid" if request >= good else "completed" if kind == "output" else "failed"
        one_by_one.put(request, status, start + before, length, attempts)
    together.put_lines(kind, start, array("I", requests), array("I", ends), [attempts for _, attempts in lines], good)
    assert together == one_by_one


def test_it_is_read_as_it_was_written() -> None:
    index = empty(3)
    index.put_lines("output", 100, [2, 0], [10, 25], [1, 3], 3)
    found = decode(b"".join(encode(index)))
    assert found == index
    assert list(found.statuses) == [CODES["completed"], CODES["pending"], CODES["completed"]]
    assert (list(found.starts), list(found.lengths), list(found.attempts)) == ([110, 0, 100], [15, 0, 10], [3, 0, 1])


def test_what_was_cut_is_not_read() -> None:
    with pytest.raises(DamagedIndexError):
        decode(b"".join(encode(empty(3)))[:-1])
