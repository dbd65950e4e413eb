"""The agenda: which batches run, and what the scheduler needs to know of each. One query, however many there are."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.schema import LIVE_SQL, api_keys, batches


class Running(msgspec.Struct, frozen=True):
    """A batch that runs.

    Attributes:
        id: its bare id.
        owner: whose it is.
        weight: of its owner's share, from the key that it was created with.
        deadline: when its window ends, Unix seconds.
        left: requests without a recorded result.
        model: that all of its requests ask for; None where they ask for several.
    """

    id: str
    owner: str
    weight: float
    deadline: int
    left: int
    model: str | None = None


_running = (
    sa.select(
        batches.c.id,
        batches.c.owner,
        sa.func.coalesce(api_keys.c.weight, 1),
        batches.c.expires_at,
        batches.c.total - batches.c.completed - batches.c.failed,
        batches.c.model,
    )
    .select_from(batches.outerjoin(api_keys, batches.c.api_key == api_keys.c.id))
    .where(batches.c.status.in_(LIVE_SQL), batches.c.status == "in_progress")
    .order_by(batches.c.expires_at, batches.c.seq)
)


async def running(connection: AsyncConnection) -> list[Running]:
    """Every batch that runs, in order of deadline and creation."""
    found = await connection.execute(_running)
    return [
        Running(id, owner, float(weight), deadline, left, model) for id, owner, weight, deadline, left, model in found
    ]
