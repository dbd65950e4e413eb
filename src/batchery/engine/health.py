"""Health: whether an upstream answers at all, and how gently one that does not is to be asked.

After a row of failures that say that nobody is there (no connection, 502, 503, 504) without one answer, an upstream is
taken to be down: from then on only a request or two at a time is sent, with growing pauses, however many wait. Each
answer doubles that again, so a server that comes back is not met by everything at once, and is full within a few
answers. Other failures may be the fault of one batch, which must not hold up the others.

Pure: the clock is an argument. It never gives a request up; `retry` and `breaker` do.
"""

from __future__ import annotations

AWAY = frozenset((502, 503, 504))
"""Statuses by which a proxy, or the server itself, says that it is not there."""

ROW = 20
"""Failures in a row from which an upstream is taken to be down."""

PROBES = 2
"""Requests at a time that then find out whether it is back."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0


class Health:
    """Of one upstream.

    Attributes:
        down: whether it is taken to be down.
    """

    def __init__(self) -> None:
        self.down = False
        self._row = 0
        self._allowed = PROBES
        self._pause = FIRST_PAUSE
        self._quiet_until = float("-inf")

    def limit(self, limit: int) -> int:
        """How many of the requests that the limit allows may be in flight."""
        return limit if not self.down else min(limit, self._allowed)

    def wait(self, now: float) -> float:
        """Seconds until the next request may be sent; 0 for now.

        Args:
            now: monotonic seconds.
        """
        return max(0.0, self._quiet_until - now) if self.down else 0.0

    def succeeded(self, limit: int) -> None:
        """It answered a request, whatever it said.

        Args:
            limit: what may be in flight at an upstream that is well.
        """
        self._row = 0
        if not self.down:
            return
        self._allowed *= 2
        self._pause = FIRST_PAUSE
        self._quiet_until = float("-inf")
        if self._allowed >= limit:
            self.down = False

    def failed(self, now: float) -> None:
        """It was not there.

        Args:
            now: monotonic seconds.
        """
        self._row += 1
        if self._row < ROW:
            return
        if not self.down:
            self.down = True
            self._pause = FIRST_PAUSE
        self._allowed = PROBES
        if now >= self._quiet_until:
            # Those that were under way when it broke down fail together and count as one.
            self._quiet_until = now + self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
