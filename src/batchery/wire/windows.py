"""Completion windows: the time a batch may take, as text such as `24h`, `1h`, `30m` or `20s`.

A window is echoed as it was sent; only its length in seconds is computed here.
"""

from __future__ import annotations

import re

from batchery.wire.errors import BadRequest

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_SECONDS = 31 * 86400
DEFAULT_WINDOWS = ("24h", "1h")

_WINDOW = re.compile(r"([1-9][0-9]{0,6})([smhd])", re.ASCII)


def window_seconds(window: str) -> int:
    """The length of a window in seconds.

    Args:
        window: a whole number and a unit, `s`, `m`, `h` or `d`: `24h`, `30m`, `20s`, `7d`.

    Raises:
        ValueError: it is not such a text, or longer than 31 days.
    """
    match = _WINDOW.fullmatch(window)
    if match is None:
        raise ValueError(
            f"{window!r} is not a window; write a whole number and a unit (s, m, h, d), such as 24h or 30m"
        )
    seconds = int(match[1]) * UNITS[match[2]]
    if seconds > MAX_SECONDS:
        raise ValueError(f"the window {window!r} is longer than 31 days")
    return seconds


def parse_windows(text: str) -> tuple[str, ...]:
    """The windows of a comma-separated setting such as `24h,1h,30m`, in its order and without repeats.

    Raises:
        ValueError: one of them is not a window, or there is none.
    """
    windows = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not windows:
        raise ValueError("name at least one completion window, such as 24h")
    for window in windows:
        window_seconds(window)
    return windows


def require_window(window: str, accepted: tuple[str, ...]) -> int:
    """The length in seconds of a window that the server offers.

    Raises:
        BadRequest: the server does not offer it; the message lists what it does.
    """
    if window not in accepted:
        raise BadRequest(
            f"completion_window {window[:64]!r} is not offered here; use one of: {', '.join(accepted)}.",
            param="completion_window",
            code="invalid_value",
        )
    return window_seconds(window)
