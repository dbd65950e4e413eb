"""Rows for tests of the queries, with every column that has no default filled in."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store import agenda, batches, files, shards
from batchery.store.ids import new_id
from batchery.store.results import Segment
from batchery.store.schema import results
from batchery.store.shards import ShardRow
from batchery.wire.results import Kind

NOW = 1_700_000_000


async def add_batch(connection: AsyncConnection, **values: Any) -> str:
    """Insert a batch; its id."""
    row: dict[str, Any] = {
        "id": new_id(),
        "owner": "local",
        "endpoint": "/v1/chat/completions",
        "input_file": new_id(),
        "window": "24h",
        "status": "in_progress",
        "output_file": new_id(),
        "created_at": NOW,
        "expires_at": NOW + 86_400,
        "total": 10,
        "metadata": batches.encode_metadata({}),
    }
    row |= values
    await batches.insert(connection, **row)
    return str(row["id"])


async def add_file(connection: AsyncConnection, **values: Any) -> str:
    """Insert an upload; its id."""
    row: dict[str, Any] = {
        "id": new_id(),
        "owner": "local",
        "purpose": "batch",
        "filename": "input.jsonl",
        "status": "processed",
        "bytes": 100,
        "created_at": NOW,
        "lines": 3,
        "requests": 2,
    }
    row |= values
    await files.insert(connection, **row)
    return str(row["id"])


async def claim_any(
    connection: AsyncConnection, worker: str, limit: int, now: float, until: float, *, holding: Sequence[int] = ()
) -> list[ShardRow]:
    """Lease up to `limit` shards of whatever runs, as one owner's: the earliest deadline first."""
    taken: list[ShardRow] = []
    for batch in await agenda.running(connection):
        if len(taken) < limit:
            wanted = {batch.id: limit - len(taken)}
            taken += await shards.claim(connection, worker, wanted, now, until, holding=holding)
    return taken


def segment(batch: str, kind: Kind, position: int, lines: list[bytes]) -> Segment:
    """A segment with these lines; line i of the file answers request i."""
    ends = array("I")
    for line in lines:
        ends.append(len(line) + (ends[-1] if ends else 0))
    return Segment(
        batch_id=batch,
        kind=kind,
        position=position,
        requests=array("I", range(position, position + len(lines))),
        ends=ends,
        attempts=array("I", [1] * len(lines)),
        body=b"".join(lines),
    )


async def recorded_requests(connection: AsyncConnection, batch: str) -> array[int]:
    """Every request of a batch that has a result, in no order."""
    found = await connection.execute(sa.select(results.c.requests).where(results.c.batch_id == batch))
    requests = array("I")
    for packed in found.scalars():
        requests.frombytes(packed)
    return requests
