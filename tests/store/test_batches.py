"""The queries over `batches`, on both databases."""

from __future__ import annotations

import asyncio

from batchery.store import batch_sums, batches, shards
from batchery.store.batch_sums import Demand
from batchery.store.database import Database
from batchery.store.ids import new_id
from batchery.wire.objects import BatchError
from tests.store.examples import NOW, add_batch, claim_any

STATUSES = ("validating", "in_progress", "finalizing", "cancelling", "completed", "failed", "expired", "cancelled")


async def test_a_batch_comes_back_as_it_went_in(database: Database) -> None:
    errors = [BatchError(code="invalid_url", message="é", param="url", line=1)]
    async with database.write() as connection:
        id = await add_batch(
            connection,
            metadata=batches.encode_metadata({"a": "ä\u2028", "": ""}),
            errors=batches.encode_errors(errors),
            model="模型",
            total=2**40,
        )
        row = await batches.get(connection, id, lock=True)
        assert await batches.get(connection, new_id()) is None
    assert row is not None
    assert batches.decode_metadata(row.metadata) == {"a": "ä\u2028", "": ""}
    assert row.errors is not None
    assert batches.decode_errors(row.errors) == errors
    assert (row.model, row.total, row.has_log, row.lease_owner) == ("模型", 2**40, False, None)
    counts = (row.completed, row.failed, row.output_lines, row.output_bytes, row.error_lines, row.error_bytes)
    assert counts == (0,) * 6


async def test_several_batches_by_id(database: Database) -> None:
    async with database.write() as connection:
        ids = [await add_batch(connection) for _ in range(3)]
        for lock in (True, False):
            found = await batches.get_many(connection, [*ids[:2], new_id()], lock=lock)
            assert list(found) == sorted(ids[:2])
        assert await batches.get_many(connection, []) == {}


async def test_pages_newest_first(database: Database) -> None:
    async with database.write() as connection:
        ids = [await add_batch(connection, created_at=NOW) for _ in range(5)]
        await add_batch(connection, owner="somebody")
    async with database.read() as connection:
        seen, after = [], None
        while page := await batches.page(connection, "local", limit=2, after=after):
            seen += [row.id for row in page]
            after = page[-1].seq
    assert seen == ids[::-1]


async def test_a_change_is_made_only_to_the_status_it_was_decided_on(database: Database) -> None:
    async with database.write() as connection:
        id = await add_batch(connection, status="validating")
        assert not await batches.change(connection, id, expect="in_progress", changes={"status": "failed"})
        assert not await batches.change(connection, new_id(), expect="validating", changes={"status": "failed"})
        assert await batches.change(connection, id, expect="validating", changes={"status": "in_progress"})
        assert not await batches.change(connection, id, expect="validating", changes={"status": "cancelling"})
        assert await batches.statuses(connection, [id, new_id()]) == {id: "in_progress"}


async def test_of_two_changes_at_once_one_is_made(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(4)]
    await databases[0].migrate()
    async with databases[0].write() as connection:
        id = await add_batch(connection)

    async def change(database: Database, status: str) -> bool:
        async with database.write() as connection:
            return await batches.change(connection, id, expect="in_progress", changes={"status": status})

    statuses = ("cancelling", "finalizing", "failed", "expired")
    made = await asyncio.gather(*(change(*each) for each in zip(databases, statuses, strict=True)))
    assert sorted(made) == [False, False, False, True]
    for database in databases:
        await database.close()


async def test_many_changes_at_once(database: Database) -> None:
    async with database.write() as connection:
        ids = [await add_batch(connection) for _ in range(3)]
        await batches.change_many(connection, [])
        await batches.change_many(
            connection, [{"id": id, "completed": i, "error_file": None} for i, id in enumerate(ids[:2], 5)]
        )
        rows = await batches.get_many(connection, ids)
    assert [rows[id].completed for id in ids] == [5, 6, 0]


async def test_overdue(database: Database) -> None:
    async with database.write() as connection:
        due = {
            await add_batch(connection, status=status, expires_at=NOW + late): (status, late)
            for status in STATUSES
            for late in (-1, 0, 1)
        }
        found = await batches.overdue(connection, float(NOW))
    assert sorted(due[row.id] for row in found) == [
        ("in_progress", -1),
        ("in_progress", 0),
        ("validating", -1),
        ("validating", 0),
    ]


# Claims.


async def test_a_claim_takes_the_earliest_deadline_first(database: Database) -> None:
    async with database.write() as connection:
        late = await add_batch(connection, status="validating", expires_at=NOW + 9)
        early = await add_batch(connection, status="validating", expires_at=NOW + 5)
        also = await add_batch(connection, status="validating", expires_at=NOW + 9)
        for status in STATUSES[1:]:
            await add_batch(connection, status=status, expires_at=NOW)
        taken = [await batches.claim(connection, "w", ("validating",), NOW, NOW + 10.5) for _ in range(4)]
    assert [row.id for row in taken if row] == [early, late, also]
    assert taken[0] is not None
    assert (taken[0].lease_owner, taken[0].lease_until) == ("w", NOW + 10.5)


async def test_a_claim_lapses_and_is_renewed_only_for_what_is_named(database: Database) -> None:
    async with database.write() as connection:
        ids = [await add_batch(connection, status="validating") for _ in range(2)]
        for _ in ids:
            assert await batches.claim(connection, "w", ("validating",), NOW, NOW + 10)
        await batches.renew(connection, "w", [ids[0]], NOW + 20)
        await batches.renew(connection, "other", [ids[1]], NOW + 20)
        await batches.renew(connection, "w", [], NOW + 20)
        assert await batches.claim(connection, "v", ("validating",), NOW + 10, NOW + 30) is None
        lapsed = await batches.claim(connection, "v", ("validating",), NOW + 11, NOW + 30)
        assert lapsed is not None
        assert (lapsed.id, lapsed.lease_owner) == (ids[1], "v")
        await batches.release(connection, ["w", "nobody"])
        released = await batches.claim(connection, "v", ("validating",), NOW + 11, NOW + 30)
        assert released is not None
        assert released.id == ids[0]


async def test_a_batch_in_flight_is_not_claimed_for_its_end(database: Database) -> None:
    async with database.write() as connection:
        id = await add_batch(connection)
        await shards.insert(connection, [shards.Plan(id, NOW + 100, [("m", b"\0\0\0\0")])])
        assert await claim_any(connection, "w", 1, NOW, NOW + 10)
        assert await batches.change(connection, id, expect="in_progress", changes={"status": "cancelling"})
        assert await batches.claim(connection, "w", ("finalizing", "cancelling"), NOW + 1, NOW + 9) is None
        assert await batches.claim(connection, "w", ("finalizing", "cancelling"), NOW + 10, NOW + 19) is None
        # The worker that had the shard has died.
        assert await batches.claim(connection, "v", ("finalizing", "cancelling"), NOW + 11, NOW + 19) is not None


async def test_a_batch_is_claimed_by_one_of_many(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(4)]
    await databases[0].migrate()
    async with databases[0].write() as connection:
        ids = {await add_batch(connection, status="validating") for _ in range(6)}

    async def claim_all(database: Database, worker: str) -> list[str]:
        taken = []
        idle = 0
        while idle < 3:  # skipping what another has locked just now, a claim may come back empty
            async with database.write() as connection:
                row = await batches.claim(connection, worker, ("validating",), NOW, NOW + 10)
            idle = idle + 1 if row is None else 0
            if row is not None:
                assert row.lease_owner == worker
                taken.append(row.id)
        return taken

    taken = await asyncio.gather(*(claim_all(database, f"w{i}") for i, database in enumerate(databases)))
    everything = [id for some in taken for id in some]
    assert len(everything) == len(ids)
    assert set(everything) == ids
    for database in databases:
        await database.close()


# What there is to do.


async def test_demand_of_nothing(database: Database) -> None:
    async with database.write() as connection:
        for status in STATUSES[4:]:
            await add_batch(connection, status=status, expires_at=NOW - 1)
        assert await batch_sums.demand(connection, NOW) == Demand(False, False, False, False)


async def test_demand_of_each_status(database: Database) -> None:
    expected = {
        "validating": Demand(to_plan=True, to_finish=False, running=False, overdue=False),
        "in_progress": Demand(to_plan=False, to_finish=False, running=True, overdue=False),
        "finalizing": Demand(to_plan=False, to_finish=True, running=False, overdue=False),
        "cancelling": Demand(to_plan=False, to_finish=True, running=False, overdue=False),
    }
    for status, demand in expected.items():
        async with database.write() as connection:
            id = await add_batch(connection, status=status)
            assert await batch_sums.demand(connection, NOW) == demand
            await batches.change(connection, id, expect=status, changes={"status": "failed"})


async def test_demand_passes_over_what_somebody_does(database: Database) -> None:
    async with database.write() as connection:
        await add_batch(connection, status="validating", lease_owner="w", lease_until=NOW + 1.0)
        await add_batch(connection, status="finalizing", lease_owner="w", lease_until=NOW + 1.0)
        assert await batch_sums.demand(connection, NOW) == Demand(False, False, False, False)
        lapsed = await batch_sums.demand(connection, NOW + 2)
        assert (lapsed.to_plan, lapsed.to_finish) == (True, True)
        await add_batch(connection, status="validating")
        one = await batch_sums.demand(connection, NOW)
        assert (one.to_plan, one.to_finish) == (True, False)


async def test_demand_of_an_ended_window(database: Database) -> None:
    async with database.write() as connection:
        await add_batch(connection, status="finalizing", expires_at=NOW - 1)
        await add_batch(connection, status="cancelling", expires_at=NOW - 1)
        assert not (await batch_sums.demand(connection, NOW)).overdue
        await add_batch(connection, expires_at=NOW + 5)
        assert not (await batch_sums.demand(connection, NOW)).overdue
        assert (await batch_sums.demand(connection, NOW + 5)).overdue


async def test_ended_batches_with_a_log_to_drop(database: Database) -> None:
    async with database.write() as connection:
        for status in STATUSES:
            await add_batch(connection, status=status, has_log=True)
            await add_batch(connection, status=status, has_log=False)
        found = await batches.ended_with_log(connection)
        rows = await batches.get_many(connection, found)
    assert sorted(row.status for row in rows.values()) == ["cancelled", "completed", "expired", "failed"]
    assert all(row.has_log for row in rows.values())


# Watching.


async def test_progress_is_of_batches_that_are_there(database: Database) -> None:
    async with database.write() as connection:
        ids = [await add_batch(connection, completed=i, error_file=new_id()) for i in range(3)]
        deleted = await add_batch(connection, deleted_at=NOW)
        assert await batches.progress(connection, []) == {}
        found = await batches.progress(connection, [*ids[1:], deleted, new_id()])
        rows = await batches.get_many(connection, ids)
    assert found == {id: batches.progress_of(rows[id]) for id in ids[1:]}
    assert [found[id].completed for id in ids[1:]] == [1, 2]
