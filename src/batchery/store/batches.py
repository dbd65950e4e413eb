"""Queries over `batches`: the batch, its status and stamps, its counts, and who plans or finalises it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.rows import typed
from batchery.store.schema import batches, shards
from batchery.wire.objects import BatchError

LIVE = ("validating", "in_progress", "finalizing", "cancelling")


class BatchRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `batches`."""

    seq: int
    id: str
    owner: str
    endpoint: str
    model: str | None
    errors: bytes | None
    input_file: str
    window: str
    status: str
    ending: str | None
    output_file: str
    error_file: str | None
    output_expires_after: int | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    total: int
    completed: int
    failed: int
    output_lines: int
    output_bytes: int
    error_lines: int
    error_bytes: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    metadata: bytes
    lease_owner: str | None
    lease_until: float | None
    has_log: bool


encode_metadata = msgspec.msgpack.Encoder().encode
decode_metadata = msgspec.msgpack.Decoder(dict[str, str]).decode
encode_errors = msgspec.msgpack.Encoder().encode
decode_errors = msgspec.msgpack.Decoder(list[BatchError]).decode

_select = sa.select(batches)

_COUNTERS = (
    "completed",
    "failed",
    "output_lines",
    "output_bytes",
    "error_lines",
    "error_bytes",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "reasoning_tokens",
)


async def insert(connection: AsyncConnection, **values: Any) -> None:
    """Add a batch; counters that are not given begin at 0."""
    await connection.execute(sa.insert(batches).values(**dict.fromkeys(_COUNTERS, 0) | values))


async def get(connection: AsyncConnection, id: str, *, lock: bool = False) -> BatchRow | None:
    """The batch with this id, whoever owns it.

    Args:
        lock: hold the row until the end of the transaction (on SQLite a write transaction holds everything anyway).
    """
    query = _select.where(batches.c.id == id)
    if lock:
        query = query.with_for_update()
    return typed(BatchRow, (await connection.execute(query)).one_or_none())


async def get_many(connection: AsyncConnection, ids: Sequence[str], *, lock: bool = False) -> dict[str, BatchRow]:
    """Several batches by id; locked in the order of their ids, so that two callers cannot wait for each other."""
    query = _select.where(batches.c.id.in_(ids)).order_by(batches.c.id)
    if lock:
        query = query.with_for_update()
    return {row.id: BatchRow(**row._mapping) for row in await connection.execute(query)}


async def page(connection: AsyncConnection, owner: str, *, limit: int, after: int | None = None) -> list[BatchRow]:
    """An owner's batches, newest first.

    Args:
        limit: at most so many rows.
        after: the `seq` of the last row of the page before.
    """
    query = _select.where(batches.c.owner == owner)
    if after is not None:
        query = query.where(batches.c.seq < after)
    query = query.order_by(batches.c.seq.desc()).limit(limit)
    return [BatchRow(**row._mapping) for row in await connection.execute(query)]


async def change(connection: AsyncConnection, id: str, *, expect: str, changes: Mapping[str, Any]) -> bool:
    """Change a batch if it still has the status that the change was decided on.

    Returns:
        Whether it had.
    """
    done = await connection.execute(
        sa.update(batches).where(batches.c.id == id, batches.c.status == expect).values(**changes)
    )
    return done.rowcount == 1


async def change_many(connection: AsyncConnection, changes: Sequence[Mapping[str, Any]]) -> None:
    """Change several batches that the caller has locked.

    Args:
        changes: for each, `id` and the same set of columns.
    """
    if not changes:
        return
    columns: dict[str, Any] = {name: sa.bindparam(f"new_{name}") for name in changes[0] if name != "id"}
    await connection.execute(
        sa.update(batches).where(batches.c.id == sa.bindparam("of_id")).values(**columns),
        [{"of_id" if name == "id" else f"new_{name}": value for name, value in change.items()} for change in changes],
    )


async def live_of_file(connection: AsyncConnection, file: str) -> bool:
    """Whether a live batch reads or writes this file."""
    found = await connection.execute(
        sa.select(batches.c.id)
        .where(
            batches.c.status.in_(LIVE),
            (batches.c.input_file == file) | (batches.c.output_file == file) | (batches.c.error_file == file),
        )
        .limit(1)
    )
    return found.first() is not None


async def statuses(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, str]:
    """The status of each of these batches."""
    found = await connection.execute(sa.select(batches.c.id, batches.c.status).where(batches.c.id.in_(ids)))
    return {row.id: row.status for row in found}


async def overdue(connection: AsyncConnection, now: float) -> list[BatchRow]:
    """Batches whose window has ended while they were still being planned or worked on."""
    found = await connection.execute(
        _select.where(batches.c.status.in_(("validating", "in_progress")), batches.c.expires_at <= now)
    )
    return [BatchRow(**row._mapping) for row in found]


async def claim(
    connection: AsyncConnection, worker: str, status: Sequence[str], now: float, until: float
) -> BatchRow | None:
    """Take one batch in one of these statuses to plan or finalise, if no live worker has it.

    A batch whose requests are still in flight somewhere, so that a shard of it is leased, is not ready to be
    finalised and is passed over.

    Args:
        worker: who takes it.
        status: the statuses looked for; the earliest deadline comes first.
        now: Unix seconds.
        until: when the lease lapses unless renewed.
    """
    free = batches.c.lease_until.is_(None) | (batches.c.lease_until < now)
    in_flight = sa.exists().where(shards.c.batch_id == batches.c.id, shards.c.lease_until >= now)
    found = await connection.execute(
        sa.select(batches.c.id)
        .where(batches.c.status.in_(status), free, ~in_flight)
        .order_by(batches.c.expires_at, batches.c.seq)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    id = found.scalar()
    if id is None:
        return None
    await connection.execute(sa.update(batches).where(batches.c.id == id).values(lease_owner=worker, lease_until=until))
    return await get(connection, id)


async def renew(connection: AsyncConnection, worker: str, ids: Sequence[str], until: float) -> None:
    """Set when the leases lapse under which a worker plans or finalises these batches."""
    await connection.execute(
        sa.update(batches).where(batches.c.id.in_(ids), batches.c.lease_owner == worker).values(lease_until=until)
    )


async def release(connection: AsyncConnection, workers: Sequence[str]) -> None:
    """Give back the batches that these workers planned or finalised."""
    await connection.execute(
        sa.update(batches).where(batches.c.lease_owner.in_(workers)).values(lease_owner=None, lease_until=None)
    )


async def ended_with_log(connection: AsyncConnection) -> list[str]:
    """Ended batches whose result log or plan has not been dropped yet."""
    found = await connection.execute(
        sa.select(batches.c.id).where(batches.c.has_log, batches.c.status.not_in(LIVE)).order_by(batches.c.seq)
    )
    return list(found.scalars())


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


async def demand(connection: AsyncConnection, now: float) -> Demand:
    """Look at all live batches, in one query."""
    free = sa.case((batches.c.lease_until.is_(None) | (batches.c.lease_until < now), 1), else_=0)
    found = await connection.execute(
        sa.select(batches.c.status, sa.func.max(free), sa.func.min(batches.c.expires_at))
        .where(batches.c.status.in_(LIVE))
        .group_by(batches.c.status)
    )
    rows = {status: (bool(is_free), expires_at) for status, is_free, expires_at in found}
    nothing = (False, float("inf"))
    return Demand(
        to_plan=rows.get("validating", nothing)[0],
        to_finish=rows.get("finalizing", nothing)[0] or rows.get("cancelling", nothing)[0],
        running="in_progress" in rows,
        overdue=min(rows.get("validating", nothing)[1], rows.get("in_progress", nothing)[1]) <= now,
    )
