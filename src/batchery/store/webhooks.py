"""Queries over `webhooks`: the outbox of events that tell a batch's end.

A row is written in the transaction that ends its batch, so no crash lies between the two. Workers share the rows: a
claim moves `next_at` past the attempt, and when the claimer dies the row is simply due again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import cast
from urllib.parse import urlsplit

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store import batches
from batchery.store.ids import new_id
from batchery.store.rows import all_typed
from batchery.store.schema import batches as batches_table
from batchery.store.schema import webhooks
from batchery.wire import ids
from batchery.wire.objects import RequestCounts
from batchery.wire.webhooks import EndStatus, Event, EventData, encode_event, event_id, event_type

KEPT = 7 * 86_400
"""Seconds that an event is kept after its batch's end, once it was delivered or given up."""

SWEEP_ROWS = 1000


class WebhookRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `webhooks`.

    Attributes:
        owner: the batch's, once it was claimed; empty where the batch is gone.
    """

    id: str
    batch_id: str
    type: str
    url: str
    host: str
    secret: str
    body: bytes
    created_at: int
    attempts: int
    next_at: float | None
    delivered_at: int | None
    error: str | None
    owner: str = ""


async def tell(connection: AsyncConnection, batch: str, now: int) -> None:
    """Put the event into the outbox that tells a batch's end, if its end is to be told.

    To be called in the transaction that gives the batch its terminal status, after that.

    Args:
        batch: its bare id.
        now: Unix seconds at which it ended.

    Raises:
        KeyError: it has not ended.
    """
    row = await batches.get(connection, batch)
    if row is None or row.deleted_at is not None or row.webhook_url is None or row.webhook_secret is None:
        return
    id = new_id()
    event = Event(
        id=event_id(id),
        created_at=now,
        type=event_type(row.status),
        data=EventData(
            id=ids.show("batch", row.id),
            status=cast(EndStatus, row.status),  # as `type` has just made sure
            endpoint=row.endpoint,
            output_file_id=ids.show("file", row.output_file),
            error_file_id=None if row.error_file is None else ids.show("file", row.error_file),
            request_counts=RequestCounts(total=row.total, completed=row.completed, failed=row.failed),
            usage=batches.usage(row),
            metadata=batches.decode_metadata(row.metadata),
        ),
    )
    await connection.execute(
        sa.insert(webhooks).values(
            id=id,
            batch_id=row.id,
            type=event.type,
            url=row.webhook_url,
            host=(urlsplit(row.webhook_url).hostname or "").removesuffix("."),
            secret=row.webhook_secret,
            body=encode_event(event),
            created_at=now,
            next_at=float(now),
        )
    )


_due = sa.select(webhooks.c.id).where(webhooks.c.next_at <= sa.bindparam("now")).limit(1)


async def is_due(connection: AsyncConnection, now: float) -> bool:
    """Whether an event waits to be sent. Reads one entry of an index."""
    found = await connection.execute(_due, {"now": now})
    return found.first() is not None


_owner = sa.func.coalesce(batches_table.c.owner, "")
_with_owner = sa.select(webhooks.c.id, webhooks.c.host, _owner.label("owner")).select_from(
    webhooks.outerjoin(batches_table, webhooks.c.batch_id == batches_table.c.id)
)


async def claim(
    connection: AsyncConnection,
    now: float,
    until: float,
    *,
    limit: int,
    per_host: int,
    per_owner: int,
    busy: Sequence[WebhookRow],
) -> list[WebhookRow]:
    """Take events to send, the longest due first, and count this attempt.

    Args:
        now: Unix seconds.
        until: when they are due again, unless something is said about them before.
        limit: at most so many.
        per_host: at most so many for one host, with those that are being sent.
        per_owner: at most so many of one owner, likewise, since anybody may think up hosts.
        busy: what is being sent.
    """
    hosts, owners = Counter(row.host for row in busy), Counter(row.owner for row in busy)
    query = _with_owner.where(
        webhooks.c.next_at <= now,
        webhooks.c.host.not_in([host for host, count in hosts.items() if count >= per_host]),
        _owner.not_in([owner for owner, count in owners.items() if count >= per_owner]),
    )
    found = await connection.execute(
        query.order_by(webhooks.c.next_at).limit(limit).with_for_update(skip_locked=True, of=webhooks)
    )
    chosen: dict[str, str] = {}
    for id, host, owner in found:
        if hosts[host] < per_host and owners[owner] < per_owner:
            hosts[host] += 1
            owners[owner] += 1
            chosen[id] = owner
    if not chosen:
        return []
    claimed = await connection.execute(
        sa.update(webhooks)
        .where(webhooks.c.id.in_(list(chosen)))
        .values(attempts=webhooks.c.attempts + 1, next_at=until)
        .returning(webhooks)
    )
    rows = {row.id: msgspec.structs.replace(row, owner=chosen[row.id]) for row in all_typed(WebhookRow, claimed)}
    return [rows[id] for id in chosen]


async def delivered(connection: AsyncConnection, id: str, now: int) -> None:
    """An event was accepted. That stays true even if somebody else has claimed it since."""
    await connection.execute(
        sa.update(webhooks).where(webhooks.c.id == id).values(delivered_at=now, next_at=None, error=None)
    )


async def failed(connection: AsyncConnection, row: WebhookRow, error: str, next_at: float | None) -> bool:
    """An attempt has failed.

    Args:
        row: as it was claimed.
        error: why.
        next_at: when to try again; None to give up.

    Returns:
        Whether the claim still held; if not, somebody else is at it, and nothing has changed.
    """
    done = await connection.execute(
        sa.update(webhooks)
        .where(webhooks.c.id == row.id, webhooks.c.attempts == row.attempts, webhooks.c.delivered_at.is_(None))
        .values(error=error, next_at=next_at)
    )
    return done.rowcount == 1


async def sweep(connection: AsyncConnection, now: float) -> int:
    """Drop events that were delivered or given up, some days after their batch's end.

    Returns:
        How many; there may be more when it is `SWEEP_ROWS`.
    """
    old = (
        sa.select(webhooks.c.id)
        .where(webhooks.c.created_at < now - KEPT, webhooks.c.next_at.is_(None))
        .order_by(webhooks.c.created_at)
        .limit(SWEEP_ROWS)
    )
    done = await connection.execute(sa.delete(webhooks).where(webhooks.c.id.in_(old.scalar_subquery())))
    return done.rowcount
