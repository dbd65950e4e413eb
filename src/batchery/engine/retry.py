"""When, if at all, a request is sent again: a decision as a value, made without a clock of its own.

Retried are what another try may mend: no connection, a broken connection, a timeout, and the statuses 408, 409, 429
and 5xx; other answers are final at once. The wait is exponential with full jitter (a uniform draw between 0 and the
ceiling, after the AWS Architecture Blog's "Exponential Backoff And Jitter"), never shorter than the server asked. It
goes on until the completion window allows no more, with one exception: a request that keeps failing while the same
upstream answers others well is at fault itself, and ends after `MAX_OWN_FAILURES` such failures.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from batchery.upstreams.base import Answer, Fault

BASE = 0.5
CEILING = 30.0
UNREACHABLE_CEILING = 3.0
"""A refused connection costs next to nothing, and the server that refuses may be back any moment."""

MAX_OWN_FAILURES = 8

_RETRIED = frozenset((408, 409, 429))
_CAPACITY = frozenset((429, 503))


class Tries(msgspec.Struct):
    """What is known of a request's attempts so far.

    Attributes:
        attempts: how many were made, the last one included.
        own_failures: how many of them failed although the upstream answered others well since they began.
    """

    attempts: int = 0
    own_failures: int = 0


def is_retryable(outcome: Answer | Fault) -> bool:
    """Whether another try may end better."""
    return isinstance(outcome, Fault) or outcome.status in _RETRIED or outcome.status >= 500


def is_own_failure(outcome: Answer | Fault, *, others_succeeded: bool) -> bool:
    """Whether a failure speaks against the request itself.

    Lack of capacity and a missing server never do; anything else does if the upstream answered other requests well in
    the meantime.

    Args:
        outcome: a retryable one.
        others_succeeded: whether it did, since this attempt began.
    """
    if isinstance(outcome, Fault):
        return others_succeeded and outcome.kind != "unreachable"
    return others_succeeded and outcome.status not in _CAPACITY


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
    if not is_retryable(outcome) or tries.own_failures >= MAX_OWN_FAILURES:
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
