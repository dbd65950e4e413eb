"""Whether a failed call is worth another try, and when: a value, not control flow. It never sleeps or reads a clock."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import msgspec

_RETRIED = (408, 429)


class Patience(msgspec.Struct, frozen=True):
    """How long a client keeps trying one call. All in seconds.

    Attributes:
        unanswered: for a server that has never answered, where a wrong address is likelier than an outage.
        total: for a server that has answered before, or answers now with a passing error.
        first: the first pause; it doubles with each try.
        longest: the longest pause of its own; a server's `Retry-After` may ask for more, up to `total`.
    """

    unanswered: float = 3.0
    total: float = 120.0
    first: float = 0.5
    longest: float = 8.0


class Failure(msgspec.Struct, frozen=True):
    """How a call failed.

    Attributes:
        status: the HTTP status; None where there was no answer.
        retry_after: what the server asked for, in seconds.
        should_retry: what the server advised by `x-should-retry`.
    """

    status: int | None = None
    retry_after: float | None = None
    should_retry: bool | None = None


def pause_before_retry(
    failure: Failure, patience: Patience, *, tries: int, elapsed: float, answered: bool, jitter: float
) -> float | None:
    """Seconds to wait before the next try, or None to give up.

    Doubling back-off with up to a quarter of jitter taken off, as the official SDKs have it.

    Args:
        failure: how the last try failed.
        patience: the client's.
        tries: how many have failed, from 1.
        elapsed: seconds since the first of them began.
        answered: whether the server has ever answered this client.
        jitter: a random number from 0 to 1.
    """
    if failure.should_retry is False:
        return None
    status = failure.status
    if status is not None and status < 500 and status not in _RETRIED and failure.should_retry is not True:
        return None
    pause = min(patience.longest, patience.first * 2.0 ** min(tries - 1, 16)) * (1 - 0.25 * jitter)
    if failure.retry_after is not None:
        pause = max(pause, failure.retry_after)
    budget = patience.total if answered or status is not None else patience.unanswered
    return pause if elapsed + pause <= budget else None


def parse_retry_after(text: str | None, now: datetime) -> float | None:
    """A `Retry-After` header in seconds from now: it holds seconds or an HTTP date (RFC 9110, 10.2.3).

    None where it is absent or unreadable; never negative.
    """
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = parsedate_to_datetime(text)
        except (ValueError, OverflowError):
            return None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        seconds = (moment - now).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
