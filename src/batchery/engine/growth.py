"""The limiter's growth by one for each answer, and what is seen on the way.

TCP's slow start: as answers come within one answer time for all in flight, the number doubles in each. It ends where
answers take longer and no more work is done; where they are refused it is for the limiter to end it. Pure.
"""

from __future__ import annotations

SLOWER = 1.5
"""How much longer answers take when growth ends: some wait for others."""

LESS = 0.3
"""The loss of work, relative to the most that was seen, that ends it in any case."""

FEWEST = 16


class Growth:
    """One growth, from a number on.

    Args:
        since: when there was that number; monotonic seconds.
        number: in flight.
        latency: how long answers take there, in seconds; None where that is to be found out first.

    Attributes:
        latency: that.
    """

    def __init__(self, since: float, number: int, latency: float | None) -> None:
        self.latency = latency
        self._since = since
        self._first = number
        self._started: float | None = None
        self._results = 0
        self._latency = 0.0
        self._steps = [(since, number)]  # since when there was which number
        self._seen: dict[int, float] = {}  # with how many in flight how many were answered a second, at most

    def grew(self, now: float, number: int) -> None:
        """There is one more."""
        if number >= 1.1 * self._steps[-1][1]:
            self._steps.append((now, number))

    def number_at(self, at: float) -> int:
        """The number that there was at some time."""
        return max((number for since, number in self._steps if since < at), default=self._first)

    def count(self, now: float, began: float, number: int) -> tuple[float, int, float] | None:
        """Count an answer, with so many in flight.

        Returns:
            Once there are enough to tell how long they take: in how many seconds how many came, and how long they took
            in the mean. Then the count begins anew.
        """
        if began < self._since:
            return None
        if self._started is None:
            self._started = now
        self._results += 1
        self._latency += now - began
        seconds = max(1e-6, now - self._started)
        # The first answers to come are the quick ones, so at first all that were sent are needed.
        enough = self._first if self.latency is None else max(FEWEST, number // 4)
        if self._results < enough or seconds < (self.latency or 0.0):
            return None  # answers may come in bursts, since they were sent in bursts
        seen = seconds, self._results, self._latency / self._results
        self._started, self._results, self._latency = now, 0, 0.0
        return seen

    def has_ended(self, now: float, seconds: float, results: int, latency: float, *, ceiling: int, gain: float) -> bool:
        """Whether growth ends with what was seen last.

        Args:
            now: monotonic seconds.
            seconds: in which so many results came.
            results: answers.
            latency: how long they took, in the mean.
            ceiling: the highest number.
            gain: the least gain of work for twice the number.
        """
        number, rate = self.number_at(now - seconds / 2 - latency), results / seconds
        self._seen[number] = max(rate, self._seen.get(number, 0.0))
        if self.latency is None:
            self.latency = latency
        elif latency > SLOWER * self.latency:
            half = max((r for n, r in self._seen.items() if n <= number / 2), default=0.0)
            most = max(self._seen.values())
            if rate < half * (1 + gain) or rate < (1 - LESS) * most:
                return True
        return number == ceiling

    def enough(self, tolerance: float) -> int:
        """The smallest number that did as much as any, but for a small share."""
        most = max(self._seen.values())
        return min(number for number, rate in self._seen.items() if rate >= (1 - tolerance) * most)
