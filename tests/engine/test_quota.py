"""Quotas: never more in any minute, hardly less, and what the upstream says is heeded."""

from __future__ import annotations

from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.engine.quota import LONGEST_HOLD, MINUTE, Quota
from batchery.upstreams.base import RateLimit


def send_all(quota: Quota, seconds: float, size: int = 400, pause: float = 0.0) -> list[float]:
    """The times at which requests go out that are always there, for so long."""
    now, sent = 0.0, []
    while now < seconds:
        wait = quota.wait(now)
        if wait > 0:
            now += wait + pause
            continue
        quota.sent(now, size)
        sent.append(now)
    return sent


def most_in_a_minute(sent: list[float]) -> int:
    # A hair less than a minute, for the sums of rounded numbers.
    return max(bisect_left(sent, at + MINUTE - 1e-6) - place for place, at in enumerate(sent))


@given(per_minute=st.integers(1, 2_000), pause=st.sampled_from([0.0, 0.001, 0.7]))
def test_never_more_requests_in_any_minute(per_minute: int, pause: float) -> None:
    sent = send_all(Quota(requests_per_minute=per_minute), 3 * MINUTE, pause=pause)
    assert most_in_a_minute(sent) <= per_minute
    if not pause:
        assert len(sent) >= 3 * per_minute - 1


def test_a_pause_is_not_made_up_for_by_a_burst() -> None:
    quota = Quota(requests_per_minute=60)
    quota.sent(0.0, 1)
    quota.sent(100.0, 1)
    assert quota.wait(100.0) == pytest.approx(1.0)


@given(per_minute=st.integers(10_000, 1_000_000), size=st.integers(0, 40_000), output=st.integers(0, 4_000))
def test_tokens_are_estimated_and_then_corrected(per_minute: int, size: int, output: int) -> None:
    quota = Quota(tokens_per_minute=per_minute)
    now, took, count = 0.0, 0.0, 0
    while now < 10 * MINUTE and count < 2_000:
        now += quota.wait(now)
        estimate = quota.sent(now, size)
        quota.answered(estimate, size // 4, output)
        took += size // 4 + output
        count += 1
    largest = size / 4 + max(output, 256)
    assert took <= per_minute * now / MINUTE + 2 * largest


def test_without_a_quota_nothing_waits() -> None:
    quota = Quota()
    assert quota.sent(0.0, 1_000) == 0.0
    assert quota.wait(0.0) == 0.0


@pytest.mark.parametrize(
    ("told", "wait"),
    [
        (RateLimit(requests_left=0, requests_reset=7.0), 7.0),
        (RateLimit(tokens_left=0, tokens_reset=3.0), 3.0),
        (RateLimit(requests_left=0, requests_reset=7.0, tokens_left=0, tokens_reset=9.0), 9.0),
        (RateLimit(requests_left=1, requests_reset=7.0), 0.0),
        (RateLimit(requests_left=0), 0.0),
        (RateLimit(requests_left=0, requests_reset=86_400.0), LONGEST_HOLD),
    ],
)
def test_what_the_upstream_says_is_left(told: RateLimit, wait: float) -> None:
    quota = Quota()
    quota.told(10.0, told)
    assert quota.wait(10.0) == wait
    assert quota.wait(10.0 + wait) == 0.0
