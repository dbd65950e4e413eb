"""Queries over `workers`: which processes run requests, and which of them have died."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.rows import all_typed
from batchery.store.schema import workers


class Distribution(msgspec.Struct, frozen=True):
    """How some values are distributed, as Prometheus' histograms have it.

    Attributes:
        bounds: the upper ends of the buckets, in order; one more is without an end.
        counts: values in each bucket, not in those below it; one more than bounds.
        sum: of all values.
    """

    bounds: list[float] = []
    counts: list[int] = msgspec.field(default_factory=lambda: [0])
    sum: float = 0.0


class UpstreamSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of one of its upstreams. Counts are from the worker's start and never fall.

    Attributes:
        name: what it is called.
        limit: requests that may be in flight, as set or found.
        allowed: the same now, all things considered: fewer while it is down, or while others want it.
        in_flight: requests sent and not yet answered.
        attempts: by outcome, an HTTP status or the kind of a fault.
        unsent: requests that were failed without being sent.
        tripped: kinds of requests that are failed so.
        down: whether it is taken to be down.
        waiting, running: requests in its queue and those that it works on, whoever sent them, as it says itself; None
            where it does not.
        cache: the used share of its key-value cache, 0 to 1; likewise.
        served: the models that it lists, as far as they are told; empty where it has no list, None where it has not
            been there yet to be asked.
    """

    name: str = ""
    limit: int = 0
    allowed: int = 0
    in_flight: int = 0
    attempts: dict[str, int] = {}
    unsent: int = 0
    tripped: int = 0
    down: bool = False
    waiting: int | None = None
    running: int | None = None
    cache: float | None = None
    served: list[str] | None = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself with each heartbeat.

    Attributes:
        ready: requests read and not yet sent.
        waiting: requests that wait for another try.
        upstreams: each that it sends to.
        commit_seconds: how long commits of results took.
        commit_results: how many results each had.
    """

    ready: int = 0
    waiting: int = 0
    upstreams: list[UpstreamSnapshot] = []
    commit_seconds: Distribution = Distribution()
    commit_results: Distribution = Distribution()


encode_snapshot = msgspec.json.Encoder().encode
decode_snapshot = msgspec.json.Decoder(Snapshot).decode


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `workers`."""

    id: str
    host: str
    pid: int
    version: str
    started_at: float
    heartbeat_at: float
    rate: float = 0.0
    snapshot: bytes | None = None


async def insert(connection: AsyncConnection, worker: WorkerRow) -> None:
    """A worker has started."""
    await connection.execute(sa.insert(workers).values(**msgspec.structs.asdict(worker)))


async def beat(connection: AsyncConnection, id: str, now: float, rate: float, snapshot: Snapshot | None = None) -> bool:
    """A worker lives.

    Args:
        rate: results that it records a second, while there is work.
        snapshot: what else it says of itself.

    Returns:
        Whether it is known; others remove one that has been silent for long.
    """
    said = None if snapshot is None else encode_snapshot(snapshot)
    done = await connection.execute(
        sa.update(workers).where(workers.c.id == id).values(heartbeat_at=now, rate=rate, snapshot=said)
    )
    return done.rowcount == 1


async def total_rate(connection: AsyncConnection, since: float) -> float:
    """Results a second of all workers together that have shown themselves since a time (Unix seconds)."""
    found = await connection.execute(
        sa.select(sa.func.coalesce(sa.func.sum(workers.c.rate), 0)).where(workers.c.heartbeat_at >= since)
    )
    return float(found.scalar_one())


async def all_workers(connection: AsyncConnection) -> list[WorkerRow]:
    """Every worker that has not been removed, living or not."""
    return all_typed(WorkerRow, await connection.execute(sa.select(workers)))


async def told(connection: AsyncConnection, since: float) -> list[tuple[float, list[UpstreamSnapshot]]]:
    """What workers say that have shown themselves since a time (Unix seconds): each one's results a second, and its
    upstreams."""
    found = await connection.execute(
        sa.select(workers.c.rate, workers.c.snapshot).where(
            workers.c.heartbeat_at >= since, workers.c.snapshot.is_not(None)
        )
    )
    return [(rate, decode_snapshot(snapshot).upstreams) for rate, snapshot in found]


async def remove(connection: AsyncConnection, ids: list[str]) -> None:
    """Workers have ended."""
    await connection.execute(sa.delete(workers).where(workers.c.id.in_(ids)))
