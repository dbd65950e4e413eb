"""What the limiter counts of refusals, and the share of them that does not depend on the number in flight.

Some servers refuse a share of all requests whatever is in flight: a gateway's own quota, an unwell replica behind a
balancer. Such a share is known by its coming at a smaller number as well; only what comes beyond it says anything of
the number. Pure.
"""

from __future__ import annotations

import math

UNHEARD, MOST_BACKGROUND = 0.002, 0.5
"""Shares of refusals at a number that has proved good: below the first they do not count, above the second they cannot
be the way of a server."""

NEWS = 1.25
"""How many times the share known so far another must be to say that what was taken for a limit was none."""


class Refusals:
    """Answers and refusals since the count last began, of requests sent since then.

    Attributes:
        since: when it began; monotonic seconds.
        ended: requests that were answered or refused.
        refused: those that were refused.
        background: the share that is refused whatever the number; 0 while none is known.
        took: seconds that the last of them took.
    """

    def __init__(self) -> None:
        self.since = float("-inf")
        self.ended = 0
        self.refused = 0
        self.background = 0.0
        self.took = 0.0

    def begin(self, now: float) -> None:
        """Count anew."""
        self.since = now
        self.ended = self.refused = 0

    @property
    def share(self) -> float:
        """The share of refusals."""
        return self.refused / max(1, self.ended)

    @property
    def usual(self) -> float:
        """As many as may come whatever the number in flight: as known, and three standard deviations more."""
        expected = self.background * self.ended
        return expected + 3 * math.sqrt(expected) + 1 if self.background > UNHEARD else 0.0

    @property
    def are_doubtful(self) -> bool:
        """Whether a number that seemed good is refused more than is known to be the server's way."""
        return self.refused >= 2 and self.share > UNHEARD and self.refused > self.usual

    def fade(self) -> None:
        """There were none but the server's own: if they have become fewer, believe it slowly."""
        self.background += 0.1 * min(0.0, self.share - self.background)

    def learn(self, share: float) -> bool:
        """This share came at a smaller number as well.

        Returns:
            Whether it is more than was known, so that what was taken for signs of a limit was none.
        """
        is_news = share > NEWS * max(UNHEARD, self.background)
        self.background = min(MOST_BACKGROUND, max(share, self.background))
        return is_news
