"""Which completion window to ask for: as named, or the one that meets a deadline. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta

from batchery.client.errors import ApiError, SettingsError
from batchery.wire.windows import DEFAULT_WINDOWS, MAX_SECONDS, UNITS, window_seconds

_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd])", re.ASCII)
_CLOCK = re.compile(r"([0-9]{1,2}):([0-9]{2})", re.ASCII)
_WINDOW = re.compile(r"(?<![\w.])[1-9][0-9]{0,6}[smhd](?!\w)", re.ASCII)


def choose_window(offered: Sequence[str], seconds: float) -> tuple[str, str]:
    """The window for work that should be done within so many seconds, and the reason, for people.

    It is the longest that still ends in time, since longer ones cost less where prices differ; if none does, the
    shortest, which is then a hope and not a promise.

    Args:
        offered: what the server offers.
        seconds: until the deadline.
    """
    by_length = sorted(offered, key=window_seconds)
    fitting = [window for window in by_length if window_seconds(window) <= seconds]
    if fitting:
        return fitting[-1], f"the window {fitting[-1]} ends before the deadline"
    return by_length[0], f"no window it offers ends before the deadline, so the shortest is taken: {by_length[0]}"


def deadline_of(by: str | None, within: str | None, now: datetime) -> float | None:
    """The deadline, in Unix seconds, that `--by` or `--within` names; None if neither is given.

    Args:
        by: a time of day such as `06:00` (the next one there is), or a date with a time as ISO 8601 writes it; without
            an offset in local time.
        within: a length such as `4h`, `90m` or `1.5h`.
        now: with its time zone.

    Raises:
        SettingsError: both are given, or one cannot be read, or names the past.
    """
    if by is not None and within is not None:
        raise SettingsError("--by and --within both name a deadline; say one of them")
    if within is not None:
        match = _AMOUNT.fullmatch(within.strip())
        seconds = float(match[1]) * UNITS[match[2]] if match else 0.0
        if not 0 < seconds <= MAX_SECONDS:
            raise SettingsError(f"--within takes a number and a unit (s, m, h, d), such as 4h or 90m, not {within!r}")
        return now.timestamp() + seconds
    if by is None:
        return None
    clock = _CLOCK.fullmatch(by.strip())
    try:
        if clock is not None:
            moment = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
            if moment <= now:
                moment += timedelta(days=1)
        else:
            moment = datetime.fromisoformat(by.strip())
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=now.tzinfo)
    except ValueError:
        raise SettingsError(f"--by takes a time such as 06:00 or 2026-01-31T06:00, not {by!r}") from None
    if moment <= now:
        raise SettingsError(f"--by {by} is over already")
    return moment.timestamp()


def offered_windows(error: ApiError) -> tuple[str, ...]:
    """The windows that a refusal names as offered; none if it is not about the window."""
    text = str(error)
    if error.status not in (400, 422) or "window" not in text.lower():
        return ()
    # What was refused is quoted first; the offer comes after it.
    _, found, rest = text.partition("use one of")
    return tuple(dict.fromkeys(_WINDOW.findall(rest if found else text)))


def windows_offered(named: Sequence[str] | None) -> tuple[str, ...]:
    """What to choose from: the settings' windows for the server, else those of the common API."""
    return tuple(named) if named else DEFAULT_WINDOWS
