"""Finding texts that appear twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from batchery.client.duplicates import Duplicates


@given(st.lists(st.text(alphabet="abc", max_size=3)))
def test_each_repeat_is_found_with_the_first_of_its_kind(texts: list[str]) -> None:
    duplicates = Duplicates()
    for number, text in enumerate(texts):
        duplicates.add(text, number)
    expected = [(number, texts.index(text)) for number, text in enumerate(texts) if texts.index(text) != number]
    assert duplicates.pairs() == expected
    assert duplicates.count() == len(expected)
