"""When a request is sent again: never too early, never after the window, and not for ever where it is at fault."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from batchery.engine import retry
from batchery.engine.retry import Tries, next_try
from batchery.upstreams.base import Answer, Fault, FaultKind

NOW = 1_000_000.0
TIMEOUT = Fault("timeout", "")
UNREACHABLE = Fault("unreachable", "")
BROKEN = Fault("broken", "")


def answer(status: int, retry_after: float | None = None) -> Answer:
    return Answer(status, b"", retry_after=retry_after)


kinds: list[FaultKind] = ["unreachable", "timeout", "broken"]
faults = st.builds(Fault, st.sampled_from(kinds), st.just(""))
waits = st.none() | st.floats(0, 86_400)
outcomes = faults | st.builds(answer, st.integers(300, 599), waits)
tries = st.builds(Tries, st.integers(1, 10_000), st.integers(0, 20), st.integers(0, 10))
draws = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize(
    ("outcome", "again"),
    [
        (TIMEOUT, True),
        (UNREACHABLE, True),
        (BROKEN, True),
        (answer(408), True),
        (answer(409), True),
        (answer(429), True),
        (answer(500), True),
        (answer(502), True),
        (answer(503), True),
        (answer(504), True),
        (answer(599), True),
        (answer(300), False),
        (answer(302), False),
        (answer(400), False),
        (answer(401), False),
        (answer(403), False),
        (answer(404), False),
        (answer(413), False),
        (answer(422), False),
        (answer(499), False),
    ],
)
def test_what_is_tried_again(outcome: Answer | Fault, again: bool) -> None:
    assert retry.is_retryable(outcome) == again
    assert (next_try(outcome, Tries(1), now=NOW, deadline=NOW + 100, draw=lambda: 0.5) is not None) == again


@pytest.mark.parametrize(
    ("outcome", "own"),
    [
        (TIMEOUT, True),
        (BROKEN, True),
        (answer(500), True),
        (answer(502), True),
        (answer(408), True),
        (answer(409), True),
        (UNREACHABLE, False),  # the server is not there: no request is at fault
        (answer(429), False),  # it is full
        (answer(503), False),
    ],
)
def test_what_speaks_against_the_request_itself(outcome: Answer | Fault, own: bool) -> None:
    assert retry.may_be_own_fault(outcome) == own
    tries = Tries(1)
    retry.note_failure(tries, outcome, others_succeeded=True)
    retry.note_failure(tries, outcome, others_succeeded=False)
    assert (tries.failures, tries.own_failures) == ((2, 1) if own else (0, 0))


@pytest.mark.parametrize(
    ("outcome", "attempts", "longest"),
    [
        (answer(500), 1, 0.5),
        (answer(500), 2, 1.0),
        (answer(500), 3, 2.0),
        (answer(500), 6, 16.0),
        (answer(500), 7, 30.0),  # the ceiling
        (answer(500), 10_000, 30.0),  # no overflow
        (UNREACHABLE, 1, 0.5),
        (UNREACHABLE, 3, 2.0),
        (UNREACHABLE, 4, 3.0),  # a lower one: it may be back any moment
        (UNREACHABLE, 10_000, 3.0),
        (answer(429, 5.0), 1, 5.5),
        (answer(429, 0.0), 2, 1.0),
    ],
)
def test_the_longest_wait(outcome: Answer | Fault, attempts: int, longest: float) -> None:
    at = next_try(outcome, Tries(attempts), now=NOW, deadline=NOW + 10_000, draw=lambda: 1.0)
    assert at == pytest.approx(NOW + longest)
    shortest = next_try(outcome, Tries(attempts), now=NOW, deadline=NOW + 10_000, draw=lambda: 0.0)
    assert shortest == NOW + (outcome.retry_after or 0.0 if isinstance(outcome, Answer) else 0.0)


@given(outcomes, tries, st.floats(-10, 90_000), draws)
def test_never_after_the_window_nor_sooner_than_asked(
    outcome: Answer | Fault, tries: Tries, left: float, drawn: float
) -> None:
    at = next_try(outcome, tries, now=NOW, deadline=NOW + left, draw=lambda: drawn)
    if at is None:
        return
    assert NOW <= at <= NOW + left
    asked = outcome.retry_after if isinstance(outcome, Answer) else None
    if asked is not None:
        assert at >= NOW + asked - 1e-6
    assert at <= NOW + (asked or 0.0) + retry.CEILING + 1e-6


@given(outcomes, tries, draws)
def test_a_retryable_failure_is_tried_again_while_there_is_time(
    outcome: Answer | Fault, tries: Tries, drawn: float
) -> None:
    assume(retry.is_retryable(outcome))
    at = next_try(outcome, tries, now=NOW, deadline=NOW + 200_000, draw=lambda: drawn)
    assert (at is None) == retry.is_given_up(tries, outcome)


@pytest.mark.parametrize(
    ("outcome", "failures", "own_failures", "given_up"),
    [
        (answer(500), 10, 2, True),
        (TIMEOUT, 10, 10, True),
        (answer(500), 9, 9, False),  # not often enough yet
        (answer(500), 10_000, 1, False),  # an outage: nobody succeeds, whoever failed at its beginning counts once
        (answer(429), 10_000, 10_000, False),  # the upstream is full: no request is at fault
        (UNREACHABLE, 10_000, 10_000, False),
    ],
)
def test_when_a_request_is_given_up(outcome: Answer | Fault, failures: int, own_failures: int, given_up: bool) -> None:
    tries = Tries(failures, failures, own_failures)
    assert retry.is_given_up(tries, outcome) == given_up
    at = next_try(outcome, tries, now=NOW, deadline=NOW + 200_000, draw=lambda: 0.5)
    assert (at is None) == given_up


def test_what_the_window_does_not_allow_is_final() -> None:
    full = answer(429, 60.0)
    assert next_try(full, Tries(1), now=NOW, deadline=NOW + 60, draw=lambda: 0.0) is None
    assert next_try(full, Tries(1), now=NOW, deadline=NOW + 60.1, draw=lambda: 0.0) == NOW + 60
    assert next_try(TIMEOUT, Tries(1), now=NOW, deadline=NOW, draw=lambda: 0.0) is None
    assert next_try(TIMEOUT, Tries(1), now=NOW, deadline=NOW - 5, draw=lambda: 0.0) is None


def test_the_wait_is_spread_over_its_whole_range() -> None:
    drawn = [0.0, 0.25, 0.5, 0.75]
    waits = [next_try(answer(500), Tries(3), now=0.0, deadline=100.0, draw=lambda d=d: d) for d in drawn]  # type: ignore[misc]
    assert waits == [0.0, 0.5, 1.0, 1.5]
