"""Queries over `workers`: which processes run requests, and which of them have died."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.schema import workers


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `workers`."""

    id: str
    host: str
    pid: int
    version: str
    started_at: float
    heartbeat_at: float


async def insert(connection: AsyncConnection, worker: WorkerRow) -> None:
    """A worker has started."""
    await connection.execute(sa.insert(workers).values(**msgspec.structs.asdict(worker)))


async def beat(connection: AsyncConnection, id: str, now: float) -> None:
    """A worker lives."""
    await connection.execute(sa.update(workers).where(workers.c.id == id).values(heartbeat_at=now))


async def all_workers(connection: AsyncConnection) -> list[WorkerRow]:
    """Every worker that has not been removed, living or not."""
    return [WorkerRow(**row._mapping) for row in await connection.execute(sa.select(workers))]


async def remove(connection: AsyncConnection, ids: list[str]) -> None:
    """Workers have ended."""
    await connection.execute(sa.delete(workers).where(workers.c.id.in_(ids)))
