"""Queries over `shards`: the pieces of a batch's plan, and the leases under which workers hold them."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.rows import all_typed
from batchery.store.schema import batches, shards


class ShardRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `shards`."""

    id: int
    batch_id: str
    model: str
    deadline: int
    requests: bytes
    done: bytes | None
    twins: bytes | None = None
    lease_owner: str | None
    lease_until: float | None
    epoch: int

    def left(self) -> list[tuple[int, int]]:
        """What is not recorded yet: (place in the shard, request) for each, in the order in which they go out."""
        requests = array("I", self.requests)
        if self.done is None:
            return list(enumerate(requests))
        done = self.done
        return [(place, request) for place, request in enumerate(requests) if not done[place >> 3] >> (place & 7) & 1]


class Plan(msgspec.Struct, frozen=True):
    """A batch's plan.

    Attributes:
        batch: its id.
        deadline: its `expires_at`.
        pieces: for each shard the model and the packed requests.
        twins: for each shard too, or none for any.
    """

    batch: str
    deadline: int
    pieces: Sequence[tuple[str, bytes]]
    twins: Sequence[bytes | None] = ()


async def insert(connection: AsyncConnection, plans: Sequence[Plan]) -> None:
    """Add the plans of some batches."""
    rows = [
        {
            "batch_id": plan.batch,
            "model": model,
            "deadline": plan.deadline,
            "requests": requests,
            "twins": same,
            "epoch": 0,
        }
        for plan in plans
        for (model, requests), same in zip(plan.pieces, plan.twins or [None] * len(plan.pieces), strict=True)
    ]
    if rows:
        await connection.execute(sa.insert(shards), rows)


async def claim(
    connection: AsyncConnection,
    worker: str,
    wanted: Mapping[str, int],
    now: float,
    until: float,
    *,
    holding: Sequence[int] = (),
    without: Collection[str] = (),
) -> list[ShardRow]:
    """Lease free shards of running batches, each batch's in plan order.

    Args:
        worker: who takes them.
        wanted: how many of each batch, at most; of few batches, since each adds to the query.
        now: Unix seconds; leases that ended before are free.
        until: when the leases lapse unless renewed.
        holding: the ids of shards that the worker has; it does not take them twice when their leases have lapsed.
        without: models of which none is wanted.

    Returns:
        The shards, in the order of `wanted` and of their plans.
    """
    if not wanted:
        return []
    parameters: dict[str, Any] = {"now": now}
    for place, (batch, count) in enumerate(wanted.items()):
        parameters |= {f"batch_{place}": batch, f"count_{place}": count}
    if without:
        parameters["without"] = list(without)
    ids = list((await connection.execute(_free(len(wanted), bool(without), False), parameters)).scalars())
    if not set(holding).isdisjoint(ids):  # its own leases have lapsed, so these must not take the places of others
        parameters["holding"] = holding
        ids = list((await connection.execute(_free(len(wanted), bool(without), True), parameters)).scalars())
    if not ids:
        return []
    taken = await connection.execute(_TAKE, {"ids": ids, "worker": worker, "until": until})
    turn = {batch: place for place, batch in enumerate(wanted)}
    return sorted(all_typed(ShardRow, taken), key=lambda shard: (turn[shard.batch_id], shard.id))


@lru_cache(64)
def _free(count: int, without: bool, holding: bool) -> sa.CompoundSelect[Any]:
    """Free shards of so many batches. Its text does not depend on how many are held, unless it has to: a text that is
    new costs more than what it finds.
    """
    now: sa.BindParameter[float] = sa.bindparam("now", type_=sa.Float)
    each = [
        sa.select(shards.c.id)
        .select_from(shards.join(batches, shards.c.batch_id == batches.c.id))
        .where(
            shards.c.batch_id == sa.bindparam(f"batch_{place}"),
            batches.c.status == "in_progress",
            shards.c.deadline > now,
            shards.c.lease_until.is_(None) | (shards.c.lease_until < now),
            *((shards.c.id.not_in(sa.bindparam("holding", expanding=True)),) if holding else ()),
            *((shards.c.model.not_in(sa.bindparam("without", expanding=True)),) if without else ()),
        )
        .order_by(shards.c.id)
        .limit(sa.bindparam(f"count_{place}"))
        .with_for_update(skip_locked=True, of=shards)
        .subquery()
        for place in range(count)
    ]
    return sa.union_all(*(sa.select(one.c.id) for one in each))


# Made once, since they are part of each commit.
_TAKE = (
    sa.update(shards)
    .where(shards.c.id.in_(sa.bindparam("ids", expanding=True)))
    .values(lease_owner=sa.bindparam("worker"), lease_until=sa.bindparam("until"), epoch=shards.c.epoch + 1)
    .returning(shards)
)
_HELD = (
    sa.select(shards.c.id, shards.c.epoch, shards.c.done)
    .where(shards.c.id.in_(sa.bindparam("ids", expanding=True)), shards.c.lease_owner == sa.bindparam("worker"))
    .order_by(shards.c.id)
    .with_for_update()
)
_DONE = sa.update(shards).where(shards.c.id == sa.bindparam("shard")).values(done=sa.bindparam("bits"))
_DROP = sa.delete(shards).where(shards.c.id.in_(sa.bindparam("ids", expanding=True)))


class Held(msgspec.Struct, frozen=True):
    """What the table says of a shard that a worker holds.

    Attributes:
        epoch: of the lease.
        done: one bit for each recorded request; None before the first.
    """

    epoch: int
    done: bytes | None


async def held(connection: AsyncConnection, worker: str, ids: Sequence[int]) -> dict[int, Held]:
    """Of these shards, those that the worker still holds; locked until the transaction ends."""
    found = await connection.execute(_HELD, {"ids": ids, "worker": worker})
    return {id: Held(epoch, done) for id, epoch, done in found}


async def record(connection: AsyncConnection, done: Sequence[Mapping[str, Any]], finished: Sequence[int]) -> None:
    """Note what of each shard is recorded, and drop the shards of which nothing is left.

    Args:
        done: `shard` (its id) and `bits` for those with something left.
        finished: the ids of those without.
    """
    if done:
        await connection.execute(_DONE, list(done))
    if finished:
        await connection.execute(_DROP, {"ids": finished})


async def renew(connection: AsyncConnection, worker: str, ids: Sequence[int], until: float) -> None:
    """Extend a worker's leases of these shards.

    Of these only: one that it was given in a commit whose answer was lost is unknown to it, and has to lapse.
    """
    await connection.execute(
        sa.update(shards).where(shards.c.id.in_(ids), shards.c.lease_owner == worker).values(lease_until=until)
    )


async def release(connection: AsyncConnection, workers: Sequence[str]) -> None:
    """Give back whatever these workers hold."""
    await connection.execute(
        sa.update(shards).where(shards.c.lease_owner.in_(workers)).values(lease_owner=None, lease_until=None)
    )


async def release_some(connection: AsyncConnection, worker: str, ids: Sequence[int]) -> None:
    """Give back some of the shards that a worker holds."""
    await connection.execute(
        sa.update(shards)
        .where(shards.c.id.in_(ids), shards.c.lease_owner == worker)
        .values(lease_owner=None, lease_until=None)
    )


async def fence(connection: AsyncConnection, batch: str) -> None:
    """Take every shard of a batch from whoever holds it, so that nothing more of it can be recorded."""
    await connection.execute(
        sa.update(shards)
        .where(shards.c.batch_id == batch)
        .values(lease_owner=None, lease_until=None, epoch=shards.c.epoch + 1)
    )


async def of_batch(connection: AsyncConnection, batch: str) -> list[ShardRow]:
    """What is left of a batch's plan, in plan order."""
    found = await connection.execute(sa.select(shards).where(shards.c.batch_id == batch).order_by(shards.c.id))
    return all_typed(ShardRow, found)


async def drop(connection: AsyncConnection, batch: str) -> None:
    """Drop what is left of a batch's plan."""
    await connection.execute(sa.delete(shards).where(shards.c.batch_id == batch))


_DROP_OF = sa.delete(shards).where(shards.c.batch_id.in_(sa.bindparam("ids", expanding=True)))


async def drop_of(connection: AsyncConnection, ids: Sequence[str]) -> None:
    """Drop what is left of the plans of several batches."""
    await connection.execute(_DROP_OF, {"ids": ids})
