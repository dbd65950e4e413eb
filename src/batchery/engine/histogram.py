"""A histogram: how some values are distributed, counted into buckets from the start of the process. Pure."""

from __future__ import annotations

from bisect import bisect_left

from batchery.store.workers import Distribution


class Histogram:
    """Counts values.

    Args:
        bounds: the upper ends of the buckets, in order; a value on an end lies in the bucket below it.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """One more value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def distribution(self) -> Distribution:
        """What has been counted so far."""
        return Distribution(list(self._bounds), list(self._counts), self._sum)
