"""Sums over `batches`: what is under way, of a key, of a status, of a window, and whether anything is to be done."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.schema import LIVE_SQL, batches, shards


class Held(msgspec.Struct, frozen=True):
    """What an API key has under way.

    Attributes:
        live: batches that have not ended.
        queued: their requests that have no result yet.
        first_due: when the window of the first of them ends, in Unix seconds; None without any.
    """

    live: int
    queued: int
    first_due: int | None


async def held_by_key(connection: AsyncConnection, key: str) -> Held:
    """What an API key (its bare id) has under way."""
    found = await connection.execute(
        sa.select(
            sa.func.count(),
            sa.func.coalesce(sa.func.sum(batches.c.total - batches.c.completed - batches.c.failed), 0),
            sa.func.min(batches.c.expires_at),
        ).where(batches.c.status.in_(LIVE_SQL), batches.c.api_key == key)
    )
    live, queued, first_due = found.one()
    return Held(live, int(queued), first_due)


class Sums(msgspec.Struct, frozen=True):
    """What batches of one status have between them.

    Attributes:
        batches: how many there are.
        completed, failed: their requests with a result.
        input_tokens, output_tokens: what these took and gave.
    """

    batches: int
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int


async def sums_by_status(connection: AsyncConnection) -> dict[str, Sums]:
    """Adds up all batches but deleted ones. Reads the whole table: 50 000 batches take some 40 ms."""
    summed = (batches.c.completed, batches.c.failed, batches.c.input_tokens, batches.c.output_tokens)
    found = await connection.execute(
        sa.select(batches.c.status, sa.func.count(), *(sa.func.sum(column) for column in summed))
        .where(batches.c.deleted_at.is_(None))
        .group_by(batches.c.status)
    )
    return {status: Sums(*map(int, sums)) for status, *sums in found}


class LiveRequests(msgspec.Struct, frozen=True):
    """Requests of batches that have not ended.

    Attributes:
        queued: without a result yet, whether in flight or not.
        completed: with one in the output file.
        failed: with one in the error file.
    """

    queued: int
    completed: int
    failed: int


async def live_requests(connection: AsyncConnection) -> dict[str, LiveRequests]:
    """The requests of all live batches, by completion window."""
    completed, failed = sa.func.sum(batches.c.completed), sa.func.sum(batches.c.failed)
    found = await connection.execute(
        sa.select(batches.c.window, sa.func.sum(batches.c.total) - completed - failed, completed, failed)
        .where(batches.c.status.in_(LIVE_SQL))
        .group_by(batches.c.window)
    )
    return {window: LiveRequests(int(queued), int(done), int(lost)) for window, queued, done, lost in found}


SEVERAL = "several"
"""In place of a model: of batches that ask for several, what is not known of each."""


async def queue(connection: AsyncConnection) -> dict[tuple[str, str], int]:
    """The requests of live batches that have no result yet, by model and completion window.

    What is left of a batch that asks for several models is divided among them as the requests of its open shards are.
    """
    columns = batches.c
    left = columns.total - columns.completed - columns.failed
    live = columns.status.in_(LIVE_SQL)
    found = await connection.execute(
        sa.select(columns.model, columns.window, sa.func.sum(left))
        .where(live, columns.model.is_not(None))
        .group_by(columns.model, columns.window)
    )
    queued = {(model, window): int(count) for model, window, count in found if count}
    mixed = await connection.execute(
        sa.select(columns.id, columns.window, left, shards.c.model, sa.func.sum(sa.func.length(shards.c.requests)))
        .select_from(batches.outerjoin(shards, shards.c.batch_id == columns.id))
        .where(live, columns.model.is_(None))
        .group_by(columns.id, columns.window, left, shards.c.model)
    )
    parts: dict[tuple[str, str, int], dict[str, int]] = {}
    for id, window, count, model, size in mixed:
        parts.setdefault((id, window, int(count)), {})[SEVERAL if model is None else model] = int(size or 0)
    for (_, window, count), sizes in parts.items():
        whole = sum(sizes.values())
        for model, size in sizes.items():
            share = round(count * size / whole) if whole else count
            if share > 0:
                queued[model, window] = queued.get((model, window), 0) + share
    return queued


class Due(msgspec.Struct, frozen=True):
    """How the live batches of one window stand to their deadlines.

    Attributes:
        nearest: seconds until the first of them, less than 0 once it has passed.
        lag: how many seconds later than its deadline the most endangered batch would be done; less than 0 for so many
            to spare. None where it is not known how fast work gets done.
    """

    nearest: float
    lag: float | None


async def due(connection: AsyncConnection, now: float, rate: float) -> dict[str, Due]:
    """How live batches stand to their deadlines, by completion window.

    A batch is done when everything is that is due no later, since the earliest deadline goes first.

    Args:
        now: Unix seconds.
        rate: results that the workers record a second, all together; 0 where that is not known.
    """
    columns = batches.c
    left = columns.total - columns.completed - columns.failed
    ahead = sa.func.sum(left).over(order_by=columns.expires_at)  # with all that is due at the same second
    each = (
        sa.select(columns.window, columns.expires_at, ahead.label("ahead"))
        .where(columns.status.in_(LIVE_SQL), columns.status.in_(("validating", "in_progress")))
        .subquery()
    )
    seconds = sa.cast(each.c.ahead, sa.Float) / (rate or 1.0)
    found = await connection.execute(
        sa.select(each.c.window, sa.func.min(each.c.expires_at), sa.func.max(seconds - each.c.expires_at)).group_by(
            each.c.window
        )
    )
    return {
        window: Due(float(nearest) - now, float(latest) + now if rate > 0 else None)
        for window, nearest, latest in found
    }


class Demand(msgspec.Struct, frozen=True):
    """What there is to do on live batches.

    Attributes:
        to_plan: whether a batch waits to be planned.
        to_finish: whether one waits to be finalised, unless its requests are still in flight.
        running: whether one runs.
        overdue: whether one's window has ended without anybody having noticed.
    """

    to_plan: bool
    to_finish: bool
    running: bool
    overdue: bool


_is_free = batches.c.lease_until.is_(None) | (batches.c.lease_until < sa.bindparam("now"))
_demand = (
    sa.select(batches.c.status, sa.func.max(sa.case((_is_free, 1), else_=0)), sa.func.min(batches.c.expires_at))
    .where(batches.c.status.in_(LIVE_SQL))
    .group_by(batches.c.status)
)


async def demand(connection: AsyncConnection, now: float) -> Demand:
    """Look at all live batches, in one query."""
    found = await connection.execute(_demand, {"now": now})
    rows = {status: (bool(is_free), expires_at) for status, is_free, expires_at in found}
    nothing = (False, float("inf"))
    return Demand(
        to_plan=rows.get("validating", nothing)[0],
        to_finish=rows.get("finalizing", nothing)[0] or rows.get("cancelling", nothing)[0],
        running="in_progress" in rows,
        overdue=min(rows.get("validating", nothing)[1], rows.get("in_progress", nothing)[1]) <= now,
    )
