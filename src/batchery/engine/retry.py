"""When, if at all, a request is sent again: a decision as a value, made without a clock of its own.

Retried are what another try may mend: no connection, a broken connection, a timeout, and the statuses 408, 409, 429
and 5xx; other answers are final at once. The wait is exponential with full jitter (a uniform draw between 0 and the
ceiling, after the AWS Architecture Blog's "Exponential Backoff And Jitter"), never shorter than the server asked. It
goes on until the completion window allows no more, with one exception: a request that keeps failing, and did so also
while the same upstream answered others well, is at fault itself and ends after `MAX_FAILURES` attempts.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from batchery.upstreams.base import Answer, Fault

BASE = 0.5
CEILING = 30.0
UNREACHABLE_CEILING = 3.0
"""A refused connection costs next to nothing, and the server that refuses may be back any moment."""

MAX_FAILURES = 10
"""Failures after which a request that is at fault itself is given up: about a minute with these waits."""

OWN_FAILURES = 2
"""How many of them must have come while others succeeded; one alone may be the beginning of an outage."""

_RETRIED = frozenset((408, 409, 429))
_CAPACITY = frozenset((429, 503))


class Tries(msgspec.Struct):
    """What is known of a request's attempts so far.

    Attributes:
        attempts: how many were made, the last one included.
        failures: how many of them failed in a way that may be the request's own fault.
        own_failures: how many of those came after the upstream had answered others well since the failure before, or
            since the first attempt began.
    """

    attempts: int = 0
    failures: int = 0
    own_failures: int = 0


def is_retryable(outcome: Answer | Fault) -> bool:
    """Whether another try may end better."""
    return isinstance(outcome, Fault) or outcome.status in _RETRIED or outcome.status >= 500


def may_be_own_fault(outcome: Answer | Fault) -> bool:
    """Whether a retryable failure may be the request's own fault; lack of capacity and a missing server never are."""
    if isinstance(outcome, Fault):
        return outcome.kind != "unreachable"
    return outcome.status not in _CAPACITY


def note_failure(tries: Tries, outcome: Answer | Fault, *, others_succeeded: bool) -> None:
    """Count a retryable failure.

    Args:
        tries: of the request; changed.
        outcome: of its last attempt.
        others_succeeded: whether the upstream answered others well since the failure before, or since the first
            attempt began.
    """
    if may_be_own_fault(outcome):
        tries.failures += 1
        tries.own_failures += others_succeeded


def is_given_up(tries: Tries, outcome: Answer | Fault) -> bool:
    """Whether a request has shown that it is at fault itself."""
    return may_be_own_fault(outcome) and tries.failures >= MAX_FAILURES and tries.own_failures >= OWN_FAILURES


def next_try(
    outcome: Answer | Fault, tries: Tries, *, now: float, deadline: float, draw: Callable[[], float]
) -> float | None:
    """When to send a request again.

    Args:
        outcome: of the attempt just made.
        tries: all its attempts, that one included.
        now: Unix seconds.
        deadline: when the window ends; nothing begins from then on.
        draw: a uniform draw from 0 to 1.

    Returns:
        Unix seconds; None when this outcome is final.
    """
    if not is_retryable(outcome) or is_given_up(tries, outcome):
        return None
    left = deadline - now
    if left < BASE:
        return None
    unreachable = isinstance(outcome, Fault) and outcome.kind == "unreachable"
    highest = UNREACHABLE_CEILING if unreachable else CEILING
    wait = draw() * min(highest, left, BASE * 2.0 ** min(tries.attempts - 1, 16))
    if isinstance(outcome, Answer) and outcome.retry_after is not None:
        # The jitter comes on top of what was asked, so that the refused do not all come back at one instant.
        wait += outcome.retry_after
    return None if wait >= left else now + wait
