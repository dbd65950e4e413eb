"""What workers said of themselves with their last heartbeats, as metrics: up to two seconds old.

Every series has the worker's id as a label, so that counters never fall: a worker that starts anew has another id and
begins other series, and those of one that has ended are gone. What is about one upstream has its name as a label too.
Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from batchery.store.workers import Distribution, Snapshot, UpstreamSnapshot

Family = GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily

_GAUGES: tuple[tuple[str, str, Callable[[UpstreamSnapshot], float | None]], ...] = (
    ("in_flight_limit", "Requests that may be in flight, as set or found.", lambda said: said.limit),
    (
        "in_flight_allowed",
        "Requests that may be in flight now: fewer than the limit while the upstream is down or others want it.",
        lambda said: said.allowed,
    ),
    ("upstream_in_flight", "Requests sent and not yet answered.", lambda said: said.in_flight),
    ("upstream_down", "1 while the upstream is taken to be down, and only probed.", lambda said: said.down),
    (
        "breakers_open",
        "Kinds of requests (a model and a url) that are failed without being sent.",
        lambda said: said.tripped,
    ),
    (
        "upstream_queue",
        "Requests that wait at the upstream, whoever sent them, as it says itself.",
        lambda said: said.waiting,
    ),
    (
        "upstream_running",
        "Requests that the upstream works on, whoever sent them, as it says itself.",
        lambda said: said.running,
    ),
    (
        "upstream_cache_usage_ratio",
        "The used share of the upstream's key-value cache, as it says itself.",
        lambda said: said.cache,
    ),
)

_HISTOGRAMS: tuple[tuple[str, str, Callable[[Snapshot], Distribution]], ...] = (
    (
        "commit_duration_seconds",
        "Times that commits of results took, until they were durable.",
        lambda said: said.commit_seconds,
    ),
    ("commit_results", "Results in each of these commits.", lambda said: said.commit_results),
)


def worker_metrics(snapshots: Mapping[str, Snapshot]) -> Iterator[Family]:
    """The metrics of living workers.

    Args:
        snapshots: by the worker's id.
    """
    places = [(worker, said) for worker, snapshot in snapshots.items() for said in snapshot.upstreams]
    for name, text, value in _GAUGES:
        gauge = GaugeMetricFamily(f"batchery_{name}", text, labels=("worker", "upstream"))
        for worker, said in places:
            number = value(said)
            if number is not None:
                gauge.add_metric((worker, said.name), number)
        yield gauge
    attempts = CounterMetricFamily(
        "batchery_attempts",
        "Requests sent that came to an end, by HTTP status or kind of fault.",
        labels=("worker", "upstream", "outcome"),
    )
    unsent = CounterMetricFamily(
        "batchery_unsent", "Requests that were failed without being sent.", labels=("worker", "upstream")
    )
    for worker, said in places:
        for outcome, count in said.attempts.items():
            attempts.add_metric((worker, said.name, outcome), count)
        unsent.add_metric((worker, said.name), said.unsent)
    requests = GaugeMetricFamily(
        "batchery_worker_requests", "Requests that a worker holds.", labels=("worker", "state")
    )
    for worker, snapshot in snapshots.items():
        sent = sum(said.in_flight for said in snapshot.upstreams)
        for state, count in (("in_flight", sent), ("ready", snapshot.ready), ("retrying", snapshot.waiting)):
            requests.add_metric((worker, state), count)
    yield from (requests, attempts, unsent)
    for name, text, distribution in _HISTOGRAMS:
        histogram = HistogramMetricFamily(f"batchery_{name}", text, labels=("worker",))
        for worker, snapshot in snapshots.items():
            histogram.add_metric((worker,), *_buckets(distribution(snapshot)))
        yield histogram


def _buckets(values: Distribution) -> tuple[list[tuple[str, float]], float]:
    """Cumulative buckets, and the sum, as Prometheus has them."""
    ends = [*map(repr, values.bounds), "+Inf"]
    return list(zip(ends, map(float, itertools.accumulate(values.counts)), strict=True)), values.sum
