"""How many requests may be in flight at an upstream: what a dispatcher asks and tells, and the number that is set.

The number that finds itself is in `limiter`.
"""

from __future__ import annotations

from typing import Protocol


class Limit(Protocol):
    """How many requests may be in flight at an upstream."""

    @property
    def limit(self) -> int:
        """Requests that may be in flight now; at least 1."""

    def answered(self, now: float, *, began: float, in_flight: int, work: float) -> None:
        """A request was answered.

        Args:
            now: monotonic seconds.
            began: when it was sent.
            in_flight: requests that were in flight, this one included.
            work: what it took the upstream, in tokens; 1 where it does not say.
        """

    def refused(self, now: float, *, began: float, in_flight: int) -> None:
        """The upstream said that it is too much, or did not answer in time; arguments as for `answered`."""


class FixedLimit:
    """A number that the operator has set, and that is kept to exactly."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def answered(self, now: float, *, began: float, in_flight: int, work: float) -> None:
        """It changes nothing."""

    def refused(self, now: float, *, began: float, in_flight: int) -> None:
        """It changes nothing: the retry waits as the upstream asks."""
