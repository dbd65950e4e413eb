"""`GET /metrics`: what the server does, in Prometheus' text format.

What passes over HTTP is counted where every request passes (`batchery.server.exchange`). What stands in the database is
looked up when somebody asks, at most once a second however many ask. Labels have few values, whoever sends what:
routes are templates, never paths, and nothing names an owner or an object.

`docs/operations.md` lists every metric.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
from litestar import Response, get
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from batchery import __version__
from batchery.server.auth import require_key
from batchery.server.context import AnyRequest
from batchery.server.worker_metrics import Family, worker_metrics
from batchery.store import batch_sums, workers
from batchery.store.batch_sums import Due, LiveRequests, Sums
from batchery.store.database import Database
from batchery.store.errors import StoreUnavailable
from batchery.store.schema import ENDED, LIVE
from batchery.store.workers import Snapshot

if TYPE_CHECKING:
    from batchery.server.exchange import Exchange

TEXT = "text/plain; version=0.0.4"

MAX_AGE = 1.0
"""Seconds for which what was found in the database is shown again."""

PATIENCE = 5.0
"""Seconds after which a database that has not answered is out of reach."""

SILENT = 10.0
"""Seconds without a heartbeat after which a worker does not count as alive: as long as its leases last."""

MODELS = 50
"""Models that have a label of their own, those with the most requests queued; the others are `other` together."""

METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"})
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

disable_created_metrics()  # type: ignore[no-untyped-call]


class Traffic(Collector):
    """Counts the requests that pass.

    Args:
        registry: takes the metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._under_way: set[Exchange] = set()
        self._bytes: dict[tuple[str, str], list[int]] = {}
        self._requests = Counter(
            "batchery_http_requests", "Requests that have ended.", ("route", "method", "status"), registry=registry
        )
        self._seconds = Histogram(
            "batchery_http_request_duration_seconds",
            "From a request's first byte to the last of its answer.",
            ("route", "method"),
            buckets=BUCKETS,
            registry=registry,
        )
        self._cut = Counter(
            "batchery_http_answers_cut",
            "Answers that ended before they were complete: the client went away, or the file could not be read on.",
            ("route", "method"),
            registry=registry,
        )
        registry.register(self)

    def began(self, exchange: Exchange) -> None:
        """A request has come."""
        self._under_way.add(exchange)

    def ended(self, exchange: Exchange, seconds: float) -> None:
        """It has been answered, or given up."""
        self._under_way.discard(exchange)
        labels = _labels(exchange)
        route, method = labels
        self._requests.labels(route, method, str(exchange.status) if exchange.status else "none").inc()
        self._seconds.labels(route, method).observe(seconds)
        if exchange.status and not exchange.complete:
            self._cut.labels(route, method).inc()
        counts = self._bytes.setdefault(labels, [0, 0])
        counts[0] += exchange.bytes_in
        counts[1] += exchange.bytes_out

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """What has passed, and what is under way, as of now."""
        running: dict[tuple[str, str], int] = dict.fromkeys(self._bytes, 0)
        totals = {labels: list(counts) for labels, counts in self._bytes.items()}
        for exchange in self._under_way:
            labels = _labels(exchange)
            running[labels] = running.get(labels, 0) + 1
            counts = totals.setdefault(labels, [0, 0])
            counts[0] += exchange.bytes_in
            counts[1] += exchange.bytes_out
        names = ("route", "method")
        in_progress = GaugeMetricFamily("batchery_http_requests_in_progress", "Requests under way.", labels=names)
        for labels, count in running.items():
            in_progress.add_metric(labels, count)
        yield in_progress
        for index, name, text in (
            (0, "received", "Bytes of request bodies."),
            (1, "sent", "Bytes of answers' bodies."),
        ):
            family = CounterMetricFamily(f"batchery_http_{name}_bytes", text, labels=names)
            for labels, counts in totals.items():
                family.add_metric(labels, counts[index])
            yield family


def _labels(exchange: Exchange) -> tuple[str, str]:
    """The route's template, the same under both base paths, and the method."""
    route = exchange.scope.get("path_template") or "unknown"
    return route.removeprefix("/ai"), exchange.method if exchange.method in METHODS else "other"


class Standing(msgspec.Struct, frozen=True):
    """What stands in the database.

    Attributes:
        batches: what there is of each status.
        requests: of live batches, by completion window.
        queue: their requests that have no result yet, by model and completion window.
        due: how live batches stand to their deadlines, by completion window.
        workers: that are alive.
        rate: results that they record a second, all together.
        snapshots: what each of them says of itself, by its id.
    """

    batches: dict[str, Sums]
    requests: dict[str, LiveRequests]
    queue: dict[tuple[str, str], int]
    due: dict[str, Due]
    workers: int
    rate: float
    snapshots: dict[str, Snapshot]


class Metrics:
    """The metrics of one server.

    Args:
        database: the tables.

    Attributes:
        traffic: told of every request.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._registry = CollectorRegistry()
        self.traffic = Traffic(self._registry)
        self._standing: Standing | None = None
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()
        ProcessCollector(registry=self._registry)
        Gauge("batchery_info", "1, with the version.", ("version",), registry=self._registry).labels(__version__).set(1)
        self._registry.register(_StandingCollector(self))

    async def text(self) -> bytes:
        """All of them, as Prometheus reads them.

        Raises:
            StoreUnavailable, StoreFull: the database does not answer.
        """
        async with self._reading:
            if time.monotonic() - self._read_at > MAX_AGE:
                self._standing = await self._read()
                self._read_at = time.monotonic()
        return generate_latest(self._registry)

    async def _read(self) -> Standing:
        try:
            async with asyncio.timeout(PATIENCE), self._database.read() as connection:
                now = time.time()
                alive = [
                    worker for worker in await workers.all_workers(connection) if worker.heartbeat_at >= now - SILENT
                ]
                rate = sum(worker.rate for worker in alive)
                return Standing(
                    batches=await batch_sums.sums_by_status(connection),
                    requests=await batch_sums.live_requests(connection),
                    queue=await batch_sums.queue(connection),
                    due=await batch_sums.due(connection, now, rate),
                    workers=len(alive),
                    rate=rate,
                    snapshots={
                        worker.id: workers.decode_snapshot(worker.snapshot) for worker in alive if worker.snapshot
                    },
                )
        except TimeoutError:
            raise StoreUnavailable(f"the database did not answer within {PATIENCE:g} seconds") from None

    @property
    def standing(self) -> Standing | None:
        """What was found in the database the last time; None before the first."""
        return self._standing


class _StandingCollector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Family]:
        """What stood in the database a moment ago."""
        standing = self._metrics.standing
        if standing is None:
            return
        by_status = GaugeMetricFamily("batchery_batches", "Batches by status.", labels=("status",))
        for status in LIVE + ENDED:
            by_status.add_metric((status,), standing.batches[status].batches if status in standing.batches else 0)
        yield by_status
        all_sums = standing.batches.values()
        results = GaugeMetricFamily("batchery_results", "Results of all batches that there are.", labels=("outcome",))
        results.add_metric(("completed",), sum(sums.completed for sums in all_sums))
        results.add_metric(("failed",), sum(sums.failed for sums in all_sums))
        yield results
        tokens = GaugeMetricFamily("batchery_tokens", "Tokens that these results took and gave.", labels=("kind",))
        tokens.add_metric(("input",), sum(sums.input_tokens for sums in all_sums))
        tokens.add_metric(("output",), sum(sums.output_tokens for sums in all_sums))
        yield tokens
        requests = GaugeMetricFamily(
            "batchery_live_requests",
            "Requests of batches that have not ended; queued ones have no result yet.",
            labels=("window", "state"),
        )
        for window, counts in standing.requests.items():
            for state, count in msgspec.structs.asdict(counts).items():
                requests.add_metric((window, state), count)
        yield requests
        queue = GaugeMetricFamily(
            "batchery_queue", "Requests without a result, by model and completion window.", labels=("model", "window")
        )
        for labels, count in _few_models(standing.queue).items():
            queue.add_metric(labels, count)
        yield queue
        nearest = GaugeMetricFamily(
            "batchery_nearest_deadline_seconds", "Seconds until the first live batch is due.", labels=("window",)
        )
        lag = GaugeMetricFamily(
            "batchery_deadline_lag_seconds",
            "Seconds after its deadline at which the most endangered batch would be done; less than 0 when in time.",
            labels=("window",),
        )
        for window, due in standing.due.items():
            nearest.add_metric((window,), due.nearest)
            if due.lag is not None:
                lag.add_metric((window,), due.lag)
        yield from (nearest, lag)
        yield GaugeMetricFamily("batchery_workers", "Workers that are alive.", standing.workers)
        yield GaugeMetricFamily(
            "batchery_results_per_second",
            "Results that the workers record a second, while they have work.",
            standing.rate,
        )
        yield from worker_metrics(standing.snapshots)


def _few_models(queue: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """A queue in which no more than `MODELS` models have a name, however many its owners may think up."""
    sizes: dict[str, int] = {}
    for (model, _), count in queue.items():
        sizes[model] = sizes.get(model, 0) + count
    named = set(sorted(sizes, key=lambda model: (-sizes[model], model))[:MODELS])
    few: dict[tuple[str, str], int] = {}
    for (model, window), count in queue.items():
        labels = model if model in named else "other", window
        few[labels] = few.get(labels, 0) + count
    return few


@get("/metrics", guards=[require_key], media_type="text/plain")
async def get_metrics(request: AnyRequest) -> Response[Any]:
    """Metrics in Prometheus' text format."""
    metrics: Metrics = request.app.state.metrics
    return Response(await metrics.text(), media_type=TEXT, headers={"Cache-Control": "no-store"})
