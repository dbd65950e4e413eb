"""How many results a second a worker records, smoothed: what it is worth in estimates of when work will be done.

Pure; the clock is an argument.
"""

from __future__ import annotations

import math

SMOOTHING = 60.0
"""Seconds of steady work after which the former rate counts for about a third."""


SHORTEST = 0.1
"""Seconds below which a look says nothing yet, because results come in groups."""


class Throughput:
    """Results a second, as long as there is work; while there is none the last value stays.

    Args:
        now: monotonic seconds.

    Attributes:
        rate: results a second; 0 before the first.
    """

    def __init__(self, now: float) -> None:
        self.rate = 0.0
        self._since = now
        self._recorded = 0
        self._had_work = False

    def observe(self, recorded: int, has_work: bool, now: float) -> float:
        """Take a look.

        Args:
            recorded: results so far, in all.
            has_work: whether there is work just now.
            now: monotonic seconds.

        Returns:
            The rate.
        """
        seconds, results = now - self._since, recorded - self._recorded
        if seconds < SHORTEST:
            self._had_work = self._had_work and has_work
            return self.rate
        sample = results / seconds
        if self.rate == 0:
            self.rate = sample
        elif self._had_work and has_work:
            self.rate += (sample - self.rate) * -math.expm1(-seconds / SMOOTHING)
        else:
            # There was no work for a part of the time, so this says only how fast it was at least.
            self.rate = max(self.rate, sample)
        self._since, self._recorded, self._had_work = now, recorded, has_work
        return self.rate
