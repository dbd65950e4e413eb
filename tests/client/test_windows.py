"""The window that meets a deadline, and deadlines as people write them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from batchery.client.errors import ApiError, SettingsError
from batchery.client.windows import choose_window, deadline_of, offered_windows

NOW = datetime(2026, 3, 1, 22, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("hours", "window", "reason"),
    [
        (30, "24h", "ends before"),
        (24, "24h", "ends before"),
        (8, "1h", "ends before"),
        (0.5, "1h", "no window it offers"),
    ],
)
def test_the_longest_window_that_ends_in_time(hours: float, window: str, reason: str) -> None:
    chosen, why = choose_window(("24h", "1h"), hours * 3600)
    assert chosen == window
    assert reason in why


@pytest.mark.parametrize(
    ("by", "within", "left"),
    [
        ("06:00", None, timedelta(hours=8)),
        ("22:00", None, timedelta(days=1)),
        ("2026-03-02T00:30", None, timedelta(hours=2.5)),
        ("2026-03-02T00:30+01:00", None, timedelta(hours=1.5)),
        (None, "4h", timedelta(hours=4)),
        (None, "1.5h", timedelta(minutes=90)),
    ],
)
def test_deadlines(by: str | None, within: str | None, left: timedelta) -> None:
    deadline = deadline_of(by, within, NOW)
    assert deadline is not None
    assert deadline - NOW.timestamp() == left.total_seconds()


@pytest.mark.parametrize(
    ("by", "within"),
    [("25:00", None), ("soon", None), ("2026-01-01T00:00", None), (None, "4"), (None, "0h"), ("1:00", "1h")],
)
def test_a_deadline_that_cannot_be(by: str | None, within: str | None) -> None:
    with pytest.raises(SettingsError):
        deadline_of(by, within, NOW)


@pytest.mark.parametrize(
    ("status", "message", "windows"),
    [
        (400, "completion_window '4h' is not offered here; use one of: 24h, 1h.", ("24h", "1h")),
        (400, "Invalid completion_window: only 24h is supported", ("24h",)),
        (400, "the model gpt-4 is not known", ()),
        (500, "completion_window 24h", ()),
    ],
)
def test_what_a_refusal_says_is_offered(status: int, message: str, windows: tuple[str, ...]) -> None:
    assert offered_windows(ApiError(message, status=status)) == windows
