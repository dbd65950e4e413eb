"""When a failed call is tried again."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from batchery.client.retry import Failure, Patience, parse_retry_after, pause_before_retry

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def pause(failure: Failure, *, tries: int = 1, elapsed: float = 0, answered: bool = True) -> float | None:
    return pause_before_retry(failure, Patience(), tries=tries, elapsed=elapsed, answered=answered, jitter=0)


def test_pauses_double_up_to_the_longest() -> None:
    assert [pause(Failure(), tries=tries) for tries in range(1, 8)] == [0.5, 1, 2, 4, 8, 8, 8]


def test_jitter_only_shortens() -> None:
    assert pause_before_retry(Failure(), Patience(), tries=1, elapsed=0, answered=True, jitter=1) == 0.375


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
def test_passing_statuses_are_retried(status: int) -> None:
    assert pause(Failure(status)) == 0.5


@pytest.mark.parametrize("status", [301, 400, 401, 402, 403, 404, 409, 413, 422])
def test_final_statuses_are_not(status: int) -> None:
    assert pause(Failure(status)) is None
    assert pause(Failure(status, should_retry=True)) == 0.5


def test_the_server_may_forbid_a_retry() -> None:
    assert pause(Failure(503, should_retry=False)) is None


def test_retry_after_is_a_floor_as_far_as_patience_goes() -> None:
    assert pause(Failure(429, 30)) == 30
    assert pause(Failure(429, 0.1)) == 0.5
    assert pause(Failure(429, 121)) is None


def test_a_server_never_heard_of_is_given_up_sooner() -> None:
    assert pause(Failure(), elapsed=4) == 0.5
    assert pause(Failure(), elapsed=4, answered=False) is None
    assert pause(Failure(503), elapsed=4, answered=False) == 0.5
    assert pause(Failure(), elapsed=120) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("7", 7),
        ("0.5", 0.5),
        ("-3", 0),
        ("Fri, 02 Jan 2026 03:04:35 GMT", 30),
        ("Fri, 02 Jan 2026 03:00:00 GMT", 0),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("", None),
    ],
)
def test_retry_after_in_all_its_forms(text: str | None, seconds: float | None) -> None:
    assert parse_retry_after(text, NOW) == seconds
