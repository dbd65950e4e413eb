"""Server-sent events from pieces that are cut anywhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.client import events
from batchery.client.events import Event, read_events

STREAM = b": hello\n\nretry: 2000\n\nid: a\nevent: status\ndata: {}\n\ndata:x\r\ndata: y\r\n\r\nevent: cut off\ndata: 1"


@given(st.lists(st.integers(0, len(STREAM)), max_size=9).map(sorted))
def test_any_cut_gives_the_same_events(cuts: list[int]) -> None:
    places = [0, *cuts, len(STREAM)]
    pieces = [STREAM[a:b] for a, b in pairwise(places)]
    assert list(read_events(pieces)) == [Event("status", b"{}", "a"), Event("message", b"x\ny", "a")]


def test_a_body_without_lines_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_EVENT", 100)
    with pytest.raises(ValueError, match="without an end"):
        list(read_events([b"x" * 60, b"x" * 60]))
