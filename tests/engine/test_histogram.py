"""Values are counted into the buckets that they belong to."""

from __future__ import annotations

from batchery.engine.histogram import Histogram
from batchery.store.workers import Distribution


def test_values_lie_in_the_bucket_whose_end_they_do_not_pass() -> None:
    histogram = Histogram((1.0, 10.0))
    assert histogram.distribution() == Distribution([1.0, 10.0], [0, 0, 0], 0.0)
    for value in (0.0, 1.0, 1.5, 10.0, 11.0, 1e9):
        histogram.observe(value)
    assert histogram.distribution() == Distribution([1.0, 10.0], [2, 2, 2], 1e9 + 23.5)
