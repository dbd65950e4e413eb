"""Queries over `batches`: the batch, its status and stamps, its counts, and who plans or finalises it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store import small_indexes
from batchery.store.rows import all_typed, typed
from batchery.store.schema import ENDED, LIVE, LIVE_SQL, batches, results, shards
from batchery.wire.objects import BatchError, BatchUsage, Deduplicated, InputTokensDetails, OutputTokensDetails


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
    api_key: str | None
    deleted_at: int | None
    skip_invalid: bool
    invalid: int
    result_index: str | None
    webhook_url: str | None
    webhook_secret: str | None
    run_started_at: float | None
    run_done: int
    deduplicate: bool
    deduplicated: int
    deduplicated_input_tokens: int
    deduplicated_output_tokens: int


encode_metadata = msgspec.msgpack.Encoder().encode
decode_metadata = msgspec.msgpack.Decoder(dict[str, str]).decode
encode_errors = msgspec.msgpack.Encoder().encode
decode_errors = msgspec.msgpack.Decoder(list[BatchError]).decode


def usage(row: BatchRow) -> BatchUsage | None:
    """The tokens of a batch so far; None while there are none."""
    if row.input_tokens == 0 and row.output_tokens == 0:
        return None
    return BatchUsage(
        input_tokens=row.input_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=row.cached_tokens),
        output_tokens=row.output_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=row.reasoning_tokens),
        total_tokens=row.input_tokens + row.output_tokens,
    )


def deduplicated(row: BatchRow) -> Deduplicated | None:
    """What a batch has saved by sending duplicates once; None where that was not asked for."""
    if not row.deduplicate:
        return None
    return Deduplicated(
        requests=row.deduplicated,
        input_tokens=row.deduplicated_input_tokens,
        output_tokens=row.deduplicated_output_tokens,
        total_tokens=row.deduplicated_input_tokens + row.deduplicated_output_tokens,
    )


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


_insert = sa.insert(batches).returning(batches)
_get = _select.where(batches.c.id == sa.bindparam("of_id"))
_get_locked = _get.with_for_update()
_get_many = _select.where(batches.c.id.in_(sa.bindparam("ids", expanding=True))).order_by(batches.c.id)
_get_many_locked = _get_many.with_for_update()


async def insert(connection: AsyncConnection, **values: Any) -> BatchRow:
    """Add a batch; counters that are not given begin at 0."""
    added = await connection.execute(_insert, dict.fromkeys(_COUNTERS, 0) | values)
    return all_typed(BatchRow, added)[0]


async def get(connection: AsyncConnection, id: str, *, lock: bool = False) -> BatchRow | None:
    """The batch with this id, whoever owns it.

    Args:
        lock: hold the row until the end of the transaction (on SQLite a write transaction holds everything anyway).
    """
    found = await connection.execute(_get_locked if lock else _get, {"of_id": id})
    return typed(BatchRow, found.one_or_none())


async def get_many(connection: AsyncConnection, ids: Sequence[str], *, lock: bool = False) -> dict[str, BatchRow]:
    """Several batches by id; locked in the order of their ids, so that two callers cannot wait for each other."""
    found = await connection.execute(_get_many_locked if lock else _get_many, {"ids": ids})
    return {row.id: row for row in all_typed(BatchRow, found)}


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Which batches are listed; by default all.

    Attributes:
        statuses: only those with one of these.
        windows: only those with one of these completion windows; None for any.
        created_after, created_before: only those created then or later, and then or earlier; Unix seconds.
    """

    statuses: tuple[str, ...] = LIVE + ENDED
    windows: tuple[str, ...] | None = None
    created_after: int | None = None
    created_before: int | None = None


_EVERYTHING = Wanted()


async def page(
    connection: AsyncConnection, owner: str, *, limit: int, after: int | None = None, wanted: Wanted = _EVERYTHING
) -> list[BatchRow]:
    """An owner's batches, but for deleted ones, newest first.

    Args:
        limit: at most so many rows.
        after: the `seq` of the last row of the page before.
        wanted: only these.
    """
    parameters: dict[str, Any] = {"of_owner": owner, "most": limit}
    if after is not None:
        parameters["after"] = after
    if wanted == _EVERYTHING:
        return all_typed(BatchRow, await connection.execute(_page[after is not None], parameters))
    # A status at a time, one index gives the newest first, whatever else is asked for.
    parameters |= {f"status_{place}": status for place, status in enumerate(wanted.statuses)}
    filters = {
        "windows": wanted.windows,
        "created_after": wanted.created_after,
        "created_before": wanted.created_before,
    }
    given = {name: value for name, value in filters.items() if value is not None}
    newest = _newest(len(wanted.statuses), after is not None, frozenset(given))
    seqs = (await connection.execute(newest, parameters | given)).scalars()
    return all_typed(BatchRow, await connection.execute(_by_seq, {"seqs": sorted(seqs, reverse=True)[:limit]}))


_not_deleted = (batches.c.owner == sa.bindparam("of_owner"), batches.c.deleted_at.is_(None))
_before = batches.c.seq < sa.bindparam("after")
_page = {
    goes_on: _select.where(*_not_deleted, *((_before,) if goes_on else ()))
    .order_by(batches.c.seq.desc())
    .limit(sa.bindparam("most"))
    for goes_on in (False, True)
}
_by_seq = _select.where(batches.c.seq.in_(sa.bindparam("seqs", expanding=True))).order_by(batches.c.seq.desc())
_FILTERS = {
    "windows": batches.c.window.in_(sa.bindparam("windows", expanding=True)),
    "created_after": batches.c.created_at >= sa.bindparam("created_after"),
    "created_before": batches.c.created_at <= sa.bindparam("created_before"),
}


@lru_cache(64)
def _newest(statuses: int, goes_on: bool, filters: frozenset[str]) -> sa.CompoundSelect[Any]:
    """The `seq` of the newest batches of so many statuses."""
    where = (*_not_deleted, *((_before,) if goes_on else ()), *(_FILTERS[name] for name in sorted(filters)))
    each = [
        sa.select(batches.c.seq)
        .where(batches.c.status == sa.bindparam(f"status_{place}"), *where)
        .order_by(batches.c.seq.desc())
        .limit(sa.bindparam("most"))
        .subquery()
        for place in range(statuses)
    ]
    return sa.union_all(*(sa.select(one.c.seq) for one in each))


async def live_first_page(
    connection: AsyncConnection, owner: str, *, limit: int, after: BatchRow | None = None, wanted: Wanted = _EVERYTHING
) -> list[BatchRow]:
    """As `page`, but those that have not ended come before those that have.

    Args:
        after: the last row of the page before.
    """
    rows: list[BatchRow] = []
    for among in (LIVE, ENDED):
        if after is not None and among is LIVE and after.status in ENDED:
            continue
        some = tuple(status for status in wanted.statuses if status in among)
        if some and len(rows) < limit:
            rows += await page(
                connection,
                owner,
                limit=limit - len(rows),
                after=after.seq if after is not None and after.status in among else None,
                wanted=msgspec.structs.replace(wanted, statuses=some),
            )
    return rows


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What changes of a batch while it runs; fields as in `BatchRow`."""

    status: str
    expires_at: int
    error_file: str | None
    total: int
    completed: int
    failed: int
    output_lines: int
    error_lines: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    deduplicated: int
    deduplicated_input_tokens: int
    deduplicated_output_tokens: int


_progress = sa.select(batches.c.id, *(batches.c[name] for name in Progress.__struct_fields__))


def progress_of(row: BatchRow) -> Progress:
    """What of a row changes while the batch runs."""
    return Progress(**{name: getattr(row, name) for name in Progress.__struct_fields__})


async def progress(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, Progress]:
    """How far these batches are; deleted ones are not among the answers."""
    found = await connection.execute(_progress.where(batches.c.id.in_(ids), batches.c.deleted_at.is_(None)))
    return {id: Progress(**dict(zip(Progress.__struct_fields__, values, strict=True))) for id, *values in found}


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
    await connection.execute(
        _change(frozenset(changes[0])),
        [{"of_id" if name == "id" else f"new_{name}": value for name, value in change.items()} for change in changes],
    )


@cache  # of the few sets of columns that are changed together
def _change(names: frozenset[str]) -> sa.Update:
    columns: dict[str, Any] = {name: sa.bindparam(f"new_{name}") for name in sorted(names) if name != "id"}
    return sa.update(batches).where(batches.c.id == sa.bindparam("of_id")).values(**columns)


async def live_of_file(connection: AsyncConnection, file: str) -> bool:
    """Whether a live batch reads or writes this file."""
    found = await connection.execute(
        sa.select(batches.c.id)
        .where(
            batches.c.status.in_(LIVE_SQL),
            (batches.c.input_file == file) | (batches.c.output_file == file) | (batches.c.error_file == file),
        )
        .limit(1)
    )
    return found.first() is not None


_statuses = sa.select(batches.c.id, batches.c.status).where(batches.c.id.in_(sa.bindparam("ids", expanding=True)))


async def statuses(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, str]:
    """The status of each of these batches."""
    return {row.id: row.status for row in await connection.execute(_statuses, {"ids": ids})}


_leased = (
    sa.select(batches.c.id, batches.c.status)
    .where(batches.c.id.in_(sa.bindparam("ids", expanding=True)), batches.c.lease_owner == sa.bindparam("worker"))
    .order_by(batches.c.id)
    .with_for_update()
)


async def leased(connection: AsyncConnection, worker: str, ids: Sequence[str]) -> dict[str, str]:
    """Of these batches, those that a worker has taken to plan or finalise, with their statuses; locked as by
    `get_many`."""
    return {row.id: row.status for row in await connection.execute(_leased, {"ids": ids, "worker": worker})}


async def overdue(connection: AsyncConnection, now: float) -> list[BatchRow]:
    """Batches whose window has ended while they were still being planned or worked on."""
    found = await connection.execute(
        _select.where(batches.c.status.in_(("validating", "in_progress")), batches.c.expires_at <= now)
    )
    return all_typed(BatchRow, found)


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
    found = await connection.execute(_claimable(status, now).limit(1).with_for_update(skip_locked=True))
    id: str | None = found.scalar()
    if id is None:
        return None
    await connection.execute(sa.update(batches).where(batches.c.id == id).values(lease_owner=worker, lease_until=until))
    return await get(connection, id)


def _claimable(status: Sequence[str], now: float) -> sa.Select[Any]:
    free = batches.c.lease_until.is_(None) | (batches.c.lease_until < now)
    in_flight = sa.exists().where(shards.c.batch_id == batches.c.id, shards.c.lease_until >= now)
    return (
        sa.select(batches.c.id)
        .where(batches.c.status.in_(status), free, ~in_flight)
        .order_by(batches.c.expires_at, batches.c.seq)
    )


async def is_claimable(connection: AsyncConnection, status: Sequence[str], now: float) -> bool:
    """Whether `claim` would find a batch."""
    return (await connection.execute(_claimable(status, now).limit(1))).first() is not None


async def ready(connection: AsyncConnection, now: float, limit: int) -> list[BatchRow]:
    """Batches that have run to their end and that nobody is finishing, the earliest deadline first.

    Args:
        now: Unix seconds.
        limit: at most so many.
    """
    found = await connection.execute(_free["finalizing"], {"now": now, "most": limit})
    return all_typed(BatchRow, found)


async def waiting(connection: AsyncConnection, now: float, limit: int) -> list[BatchRow]:
    """Batches that wait for their plans and that nobody is planning, the earliest deadline first.

    Args:
        now: Unix seconds.
        limit: at most so many.
    """
    found = await connection.execute(_free["validating"], {"now": now, "most": limit})
    return all_typed(BatchRow, found)


def _free_of(status: str) -> sa.Select[Any]:
    return (
        _select.where(
            batches.c.status.in_(LIVE_SQL),
            batches.c.status == status,
            batches.c.lease_until.is_(None) | (batches.c.lease_until < sa.bindparam("now")),
        )
        .order_by(batches.c.expires_at, batches.c.seq)
        .limit(sa.bindparam("most"))
    )


_free = {status: _free_of(status) for status in ("validating", "finalizing")}


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


async def delete_ended(connection: AsyncConnection, limit: int) -> dict[str, str | None]:
    """Drop up to `limit` batches that were deleted by their owners, have ended, and have no log and no plan any more.

    Returns:
        For each its id, and the blob of its result index.
    """
    found = await connection.execute(
        sa.select(batches.c.id, batches.c.seq)
        .where(
            batches.c.deleted_at.is_not(None),
            batches.c.status.not_in(LIVE),
            ~batches.c.has_log,
            ~sa.exists().where(results.c.batch_id == batches.c.id),
            ~sa.exists().where(shards.c.batch_id == batches.c.id),
        )
        .order_by(batches.c.seq)
        .limit(limit)
        .with_for_update(skip_locked=True, of=batches)
    )
    seqs = {row.id: row.seq for row in found}
    if not seqs:
        return {}
    await small_indexes.drop(connection, list(seqs.values()))
    dropped = await connection.execute(
        sa.delete(batches).where(batches.c.id.in_(list(seqs))).returning(batches.c.id, batches.c.result_index)
    )
    return {row.id: small_indexes.blob_of(row.result_index) for row in dropped}
