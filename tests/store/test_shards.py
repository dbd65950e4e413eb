"""The queries over `shards`: leases, epochs and what is left, on both databases."""

from __future__ import annotations

import asyncio
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.store import batches, shards
from batchery.store.database import Database
from batchery.store.shards import ShardRow
from tests.store.examples import NOW, add_batch, claim_any


def packed(*requests: int) -> bytes:
    return array("I", requests).tobytes()


async def add_plan(database: Database, pieces: int, *, status: str = "in_progress", deadline: int = NOW + 100) -> str:
    async with database.write() as connection:
        id = await add_batch(connection, status=status, expires_at=deadline)
        await shards.insert(connection, [shards.Plan(id, deadline, [("m", packed(i)) for i in range(pieces)])])
    return id


async def test_a_plan_comes_back_in_its_order(database: Database) -> None:
    async with database.write() as connection:
        id = await add_batch(connection)
        await shards.insert(connection, [shards.Plan(id, NOW + 5, [("b", packed(3, 1)), ("a", packed(2**32 - 1))])])
        rows = await shards.of_batch(connection, id)
        assert await shards.of_batch(connection, "0" * 32) == []
    assert [(row.model, row.left(), row.epoch, row.deadline) for row in rows] == [
        ("b", [(0, 3), (1, 1)], 0, NOW + 5),
        ("a", [(0, 2**32 - 1)], 0, NOW + 5),
    ]


async def test_a_large_plan(database: Database) -> None:
    id = await add_plan(database, 5000)
    async with database.read() as connection:
        assert len(await shards.of_batch(connection, id)) == 5000


async def test_the_earliest_deadline_is_claimed_first(database: Database) -> None:
    late = await add_plan(database, 2, deadline=NOW + 50)
    early = await add_plan(database, 2, deadline=NOW + 20)
    async with database.write() as connection:
        rows = await claim_any(connection, "w", 3, NOW, NOW + 10.5)
        rest = await claim_any(connection, "w", 3, NOW, NOW + 10.5)
    assert [(row.batch_id, row.left()[0][1]) for row in rows] == [(early, 0), (early, 1), (late, 0)]
    assert [(row.lease_owner, row.lease_until, row.epoch) for row in rows] == [("w", NOW + 10.5, 1)] * 3
    assert [(row.batch_id, row.left()[0][1]) for row in rest] == [(late, 1)]


@pytest.mark.parametrize("status", ["validating", "finalizing", "cancelling", "completed", "failed", "cancelled"])
async def test_only_running_batches_are_claimed(database: Database, status: str) -> None:
    await add_plan(database, 2, status=status)
    async with database.write() as connection:
        assert await claim_any(connection, "w", 5, NOW, NOW + 10) == []


async def test_nothing_is_claimed_after_the_window(database: Database) -> None:
    await add_plan(database, 1, deadline=NOW)
    async with database.write() as connection:
        assert await claim_any(connection, "w", 5, NOW, NOW + 10) == []
        assert len(await claim_any(connection, "w", 5, NOW - 0.5, NOW + 10)) == 1


async def test_a_lapsed_lease_is_taken_with_a_higher_epoch(database: Database) -> None:
    await add_plan(database, 1)
    async with database.write() as connection:
        (first,) = await claim_any(connection, "w", 5, NOW, NOW + 10)
        assert await claim_any(connection, "v", 5, NOW + 10, NOW + 20) == []
        (second,) = await claim_any(connection, "v", 5, NOW + 10.5, NOW + 20)
        assert (first.epoch, second.epoch) == (1, 2)
        assert await shards.held(connection, "w", [first.id]) == {}
        assert (await shards.held(connection, "v", [first.id]))[first.id].epoch == 2
        await shards.renew(connection, "w", [first.id], NOW + 1000)  # the former holder cannot prolong it
        assert len(await claim_any(connection, "w", 5, NOW + 21, NOW + 30)) == 1


async def test_a_worker_does_not_take_what_it_holds_twice(database: Database) -> None:
    """After it has stood still for longer than its leases last, it finds its own shards free."""
    await add_plan(database, 2)
    async with database.write() as connection:
        (first,) = await claim_any(connection, "w", 1, NOW, NOW + 10)
        (other,) = await claim_any(connection, "w", 1, NOW + 50, NOW + 60, holding=[first.id])
        assert other.id != first.id
        await shards.renew(connection, "w", [first.id], NOW + 60)
        assert set(await shards.held(connection, "w", [first.id, other.id])) == {first.id, other.id}


async def test_only_what_is_named_is_renewed(database: Database) -> None:
    """A shard leased in a commit whose answer was lost is unknown to its holder: it has to lapse."""
    await add_plan(database, 2)
    async with database.write() as connection:
        known, lost = await claim_any(connection, "w", 2, NOW, NOW + 10)
        await shards.renew(connection, "w", [known.id], NOW + 20)
        (again,) = await claim_any(connection, "w", 5, NOW + 15, NOW + 25, holding=[known.id])
    assert (again.id, again.epoch) == (lost.id, 2)


async def test_no_shard_is_leased_twice(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(4)]
    await databases[0].migrate()
    await add_plan(databases[0], 30)
    await add_plan(databases[0], 10, deadline=NOW + 10)

    async def claim_all(database: Database, worker: str) -> list[ShardRow]:
        taken: list[ShardRow] = []
        idle = 0
        while idle < 3:
            async with database.write() as connection:
                rows = await claim_any(connection, worker, 3, NOW, NOW + 10)
            idle = 0 if rows else idle + 1
            taken += rows
        return taken

    taken = await asyncio.gather(*(claim_all(database, f"w{i}") for i, database in enumerate(databases)))
    rows = [row for some in taken for row in some]
    assert len(rows) == len({row.id for row in rows}) == 40
    assert {row.epoch for row in rows} == {1}
    for database in databases:
        await database.close()


async def test_what_is_recorded_is_not_left(database: Database) -> None:
    async with database.write() as connection:
        id = await add_batch(connection)
        await shards.insert(
            connection, [shards.Plan(id, NOW + 100, [("m", packed(*range(10))), ("m", packed(7)), ("m", packed(8))])]
        )
        first, second, third = await claim_any(connection, "w", 3, NOW, NOW + 10)
        await shards.record(connection, [], [])
        await shards.record(
            connection, [{"shard": first.id, "bits": bytes([0b10000001, 0b10])}, {"shard": third.id, "bits": b"\0"}], []
        )
        await shards.record(connection, [], [second.id])
        held = await shards.held(connection, "w", [first.id, second.id, third.id])
        left = await shards.of_batch(connection, id)
    assert held == {first.id: shards.Held(1, bytes([0b10000001, 0b10])), third.id: shards.Held(1, b"\0")}
    assert [row.left() for row in left] == [[(i, i) for i in (1, 2, 3, 4, 5, 6, 8)], [(0, 8)]]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.data())
def test_left_is_the_plan_without_what_is_done(requests: list[int], data: st.DataObject) -> None:
    done = data.draw(st.none() | st.sets(st.integers(0, max(0, len(requests) - 1))))
    bits = None
    if done is not None:
        bits = sum(1 << place for place in done).to_bytes((len(requests) + 7) // 8 or 1, "little")
    row = ShardRow(
        id=1,
        batch_id="b",
        model="m",
        deadline=0,
        requests=packed(*requests),
        done=bits,
        lease_owner=None,
        lease_until=None,
        epoch=0,
    )
    assert row.left() == [(i, request) for i, request in enumerate(requests) if i not in (done or ())]


async def test_giving_back(database: Database) -> None:
    await add_plan(database, 4)
    async with database.write() as connection:
        mine = await claim_any(connection, "w", 3, NOW, NOW + 10)
        (others,) = await claim_any(connection, "v", 1, NOW, NOW + 10)
        await shards.release_some(connection, "w", [mine[0].id, others.id])
        assert set(await shards.held(connection, "w", [row.id for row in mine])) == {mine[1].id, mine[2].id}
        assert set(await shards.held(connection, "v", [others.id])) == {others.id}
        await shards.release(connection, ["w", "nobody"])
        assert await shards.held(connection, "w", [row.id for row in mine]) == {}
        again = await claim_any(connection, "x", 9, NOW, NOW + 10)
    assert [(row.id, row.epoch) for row in again] == [(row.id, 2) for row in mine]


async def test_a_fenced_batch_is_taken_from_everybody(database: Database) -> None:
    fenced, other = await add_plan(database, 2), await add_plan(database, 1)
    async with database.write() as connection:
        rows = await claim_any(connection, "w", 9, NOW, NOW + 10)
        await shards.fence(connection, fenced)
        held = await shards.held(connection, "w", [row.id for row in rows])
        assert [row.epoch for row in await shards.of_batch(connection, fenced)] == [2, 2]
        assert [row.batch_id for row in rows if row.id in held] == [other]
        await batches.change(connection, fenced, expect="in_progress", changes={"status": "finalizing"})
        assert await claim_any(connection, "w", 9, NOW, NOW + 10) == []


async def test_dropping_a_plan(database: Database) -> None:
    gone, kept = await add_plan(database, 2), await add_plan(database, 1)
    async with database.write() as connection:
        await shards.drop(connection, gone)
        assert await shards.of_batch(connection, gone) == []
        assert len(await shards.of_batch(connection, kept)) == 1
