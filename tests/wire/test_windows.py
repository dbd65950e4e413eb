"""Completion windows: their lengths, and what is said to one that is not offered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.wire.errors import BadRequest
from batchery.wire.windows import (
    DEFAULT_WINDOWS,
    MAX_SECONDS,
    UNITS,
    parse_windows,
    require_window,
    window_seconds,
)

from .json_texts import prove


@pytest.mark.parametrize(
    ("window", "seconds"),
    [
        ("24h", 86_400),
        ("1h", 3_600),
        ("30m", 1_800),
        ("20s", 20),
        ("1s", 1),
        ("7d", 604_800),
        ("31d", 2_678_400),
        ("744h", 2_678_400),
        ("2678400s", 2_678_400),
    ],
)
def test_lengths(window: str, seconds: int) -> None:
    assert window_seconds(window) == seconds


@pytest.mark.parametrize(
    "window",
    [
        "",
        "24",
        "h",
        "0h",  # nothing could run
        "024h",
        "-1h",
        "+1h",
        "1.5h",
        "1H",
        "1w",
        "1 h",
        " 1h",
        "1h ",
        "1h\n",
        "1h1m",
        "１h",  # a digit to Python's int, not to us
        "٣h",
        "32d",
        "745h",
        "2678401s",
        "99999999999999999999h",
        "1" * 5000 + "s",
    ],
    ids=lambda window: repr(window[:20]),
)
def test_what_is_no_window(window: str) -> None:
    with pytest.raises(ValueError, match="window"):
        window_seconds(window)


@prove
@given(st.text(st.characters(), max_size=10) | st.from_regex(r"[0-9]{1,8}[smhd]\n?", fullmatch=True))
def test_any_text_has_a_length_or_is_refused(window: str) -> None:
    try:
        seconds = window_seconds(window)
    except ValueError:
        return
    assert 1 <= seconds <= MAX_SECONDS
    assert seconds == int(window[:-1]) * UNITS[window[-1]]
    assert require_window(window, (window,)) == seconds


@pytest.mark.parametrize(
    ("text", "windows"),
    [
        ("24h,1h", ("24h", "1h")),
        ("1h , 24h,", ("1h", "24h")),  # in the setting's order
        ("24h,24h,1h", ("24h", "1h")),
        ("24h,1d", ("24h", "1d")),  # as long, but echoed as sent
    ],
)
def test_the_setting(text: str, windows: tuple[str, ...]) -> None:
    assert parse_windows(text) == windows


@pytest.mark.parametrize("text", ["", " , ", "24h;1h", "24h,forever"])
def test_a_bad_setting(text: str) -> None:
    with pytest.raises(ValueError, match="window"):
        parse_windows(text)


def test_the_defaults_are_the_missions() -> None:
    assert DEFAULT_WINDOWS == ("24h", "1h")
    assert [window_seconds(window) for window in DEFAULT_WINDOWS] == [86_400, 3_600]


@pytest.mark.parametrize("window", ["2h", "1d", "60m", "24H", "24h\n", "", "x" * 10_000, "\ud800"])
def test_a_window_that_is_not_offered(window: str) -> None:
    """Equal length is not enough: windows are names."""
    with pytest.raises(BadRequest, match="use one of: 24h, 1h") as caught:
        require_window(window, DEFAULT_WINDOWS)
    assert caught.value.param == "completion_window"
    assert len(caught.value.message) < 200
