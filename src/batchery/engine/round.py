"""A round of the limiter: what is measured of one number in flight. Pure."""

from __future__ import annotations

import math


class Round:
    """Answers counted from some time on.

    How fast answers come depends on how many others were there with them. So after a change of the number, as many as
    were in flight, which were sent under the former number, are let pass first; then all that come are counted.
    Counting only those sent since the change would miss more of what a server does the longer its answers take, and so
    more of it at every larger number.

    Attributes:
        changed_at: when it began; monotonic seconds.
        results: answers counted.
    """

    def __init__(self) -> None:
        self._unsettled = 0
        self.begin(float("-inf"))

    def begin(self, now: float, *, unsettled: int = 0) -> None:
        """Count anew.

        Args:
            unsettled: where the number has changed, how many were or are in flight, the larger of both.
        """
        self._unsettled = max(unsettled, self._unsettled)
        self.changed_at = now
        self._started: float | None = None
        self.results = 0
        self._work = 0.0
        self._squares = 0.0
        self._latency = 0.0
        self._filled = 0

    def add(self, now: float, *, began: float, in_flight: int, work: float) -> bool:
        """Count an answer.

        Args:
            now, began: when it came, and when its request was sent; monotonic seconds.
            in_flight: how many were there with it.
            work: what it took, in any unit that stays the same.

        Returns:
            Whether it counts: the time from the first on is measured, so that one does not.
        """
        if self._unsettled > 0:
            self._unsettled -= 1
            return False
        if self._started is None:
            self._started = now
            return False
        self.results += 1
        self._work += work
        self._squares += work * work
        self._latency += now - began
        self._filled += in_flight
        return True

    def settled(self) -> None:
        """Let none pass any more: what was sent under another number is kept out in another way."""
        self._unsettled = 0

    def seconds(self, now: float) -> float:
        """How long answers have been counted; more than 0."""
        return max(1e-6, now - (now if self._started is None else self._started))

    def rate(self, now: float) -> float:
        """Work a second."""
        return self._work / self.seconds(now)

    @property
    def error(self) -> float:
        """The standard error of that, relative to it, if answers came independently of each other."""
        return math.sqrt(self._squares) / self._work if self._work else 1.0

    @property
    def latency(self) -> float:
        """How long an answer took, in the mean; there is at least one."""
        return self._latency / self.results

    def was_filled(self, number: int) -> bool:
        """Whether nearly so many were in flight all the time."""
        return self._filled >= 0.9 * number * self.results
