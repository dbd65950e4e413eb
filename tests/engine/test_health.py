"""Health: an upstream that is down is asked gently, and is full again within a few answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from batchery.engine.health import LONGEST_PAUSE, PROBES, ROW, Health


def broken_down(now: float = 0.0) -> Health:
    health = Health()
    for _ in range(ROW):
        health.failed(now)
    return health


def test_failures_among_successes_do_not_count() -> None:
    health = Health()
    for _ in range(1_000):
        for _ in range(ROW - 1):
            health.failed(0.0)
        health.succeeded(256)
    assert not health.down
    assert health.limit(256) == 256
    assert health.wait(0.0) == 0.0


def test_a_row_of_failures_leaves_probes_only() -> None:
    health = broken_down()
    assert health.down
    assert health.limit(256) == PROBES
    assert health.limit(1) == 1
    assert health.wait(0.0) > 0


def test_pauses_grow_to_the_longest_and_no_further() -> None:
    health, now, pauses = broken_down(), 0.0, []
    for _ in range(20):
        pauses.append(round(health.wait(now), 6))
        now += pauses[-1] + 1e-6
        health.failed(now)
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE


def test_what_was_under_way_counts_as_one() -> None:
    health = broken_down()
    wait = health.wait(0.0)
    for _ in range(256):
        health.failed(0.0)
    assert health.wait(0.0) == wait


def test_good_answers_open_it_again_by_doubling() -> None:
    health = broken_down()
    allowed = []
    while health.down:
        health.succeeded(256)
        allowed.append(health.limit(256))
        assert health.wait(0.0) == 0.0
    assert allowed == [4, 8, 16, 32, 64, 128, 256]


@given(outcomes=st.lists(st.booleans(), max_size=200), limit=st.integers(1, 500))
def test_something_may_always_be_sent_in_the_end(outcomes: list[bool], limit: int) -> None:
    health, now = Health(), 0.0
    for good in outcomes:
        now += health.wait(now)
        if good:
            health.succeeded(limit)
        else:
            health.failed(now)
        assert 1 <= health.limit(limit) <= limit
        assert 0 <= health.wait(now) <= LONGEST_PAUSE
