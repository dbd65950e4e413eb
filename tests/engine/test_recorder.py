"""The recorder: every result once, whatever the database does, and log, counts and plan always in step."""

from __future__ import annotations

import asyncio
import json
import random
import time
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.engine import recorder as recorder_module
from batchery.engine.recorder import Recorder
from batchery.engine.work import LeasedShard, Result, Work
from batchery.store import batches, files, results, shards
from batchery.store.batches import BatchRow
from batchery.store.database import Database
from batchery.store.errors import StoreFull, StoreUnavailable
from batchery.wire.results import Kind, Usage
from tests.store.examples import NOW, add_batch, claim_any, recorded_requests

FAR = 1e12  # leases in these tests lapse only where they are told to


class FlakyDatabase(Database):
    """A database whose next writes fail: `refused` before they begin, or `ambiguous`, after they were committed."""

    refused = 0
    ambiguous = 0
    writes = 0

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        async with self._trouble(), super().write() as connection:
            yield connection

    async def write_at_once(self, body: Any) -> Any:
        if not self.is_sqlite:  # it is done by `write`
            return await super().write_at_once(body)
        async with self._trouble():
            return await super().write_at_once(body)

    @asynccontextmanager
    async def _trouble(self) -> AsyncIterator[None]:
        self.writes += 1
        if self.refused:
            self.refused -= 1
            raise StoreFull("no space left on device")
        yield
        if self.ambiguous:
            self.ambiguous -= 1
            raise StoreUnavailable("the connection was lost while it committed")


@pytest.fixture
async def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FlakyDatabase]:
    monkeypatch.setattr(recorder_module, "RETRY_PAUSE", 0.01)
    monkeypatch.setattr(recorder_module, "INTERVAL", 0.005)
    database = FlakyDatabase(database_url)
    await database.migrate()
    yield database
    await database.close()


class Desk:
    """A recorder at work, and what it said."""

    def __init__(self, database: Database, worker: str = "w", *, takes: bool = False) -> None:
        self.settled: list[Work] = []
        self.batches_done = 0
        self.taken: list[BatchRow] = []
        self.left = False
        self.recorder = Recorder(
            database, worker, 10.0, self.settled.extend, self._done, places=(lambda: 1) if takes else None
        )
        self.running = asyncio.create_task(self.recorder.run())

    def _done(self, taken: list[BatchRow], left: bool) -> None:
        self.taken += taken
        self.left |= left
        self.batches_done += 1

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 — a list has no event to wait for
                await asyncio.sleep(0.002)

    async def close(self) -> None:
        self.recorder.close()
        async with asyncio.timeout(10):
            await self.running


async def lease(
    database: Database, sizes: list[int], *, worker: str = "w", batch: str | None = None
) -> tuple[str, list[LeasedShard]]:
    """A running batch with shards of these sizes, leased; or the shards of one that is there, leased anew."""
    async with database.write() as connection:
        if batch is None:
            batch = await add_batch(connection, total=sum(sizes), expires_at=NOW + 1000, in_progress_at=NOW)
            first = 0
            pieces = []
            for size in sizes:
                pieces.append(("m", array("I", range(first, first + size)).tobytes()))
                first += size
            await shards.insert(connection, [shards.Plan(batch, NOW + 1000, pieces)])
        rows = await claim_any(connection, worker, 100, NOW, FAR)
    return batch, [LeasedShard(row) for row in rows]


def result(shard: LeasedShard, place: int, *, kind: Kind = "output", padding: int = 0, usage: bool = True) -> Result:
    request = place + (shard.unread[-1][1] - shard.unread[-1][0])
    work = Work(shard, place, request, custom_id=str(request), url="/v1/chat/completions", body=b"{}")
    work.tries.attempts = 2
    line = json.dumps({"request": request, "padding": "x" * padding}).encode() + b"\n"
    return Result(work, kind, line, Usage(1, 2, 3, 4) if usage else None)


async def log_of(database: Database, batch: str) -> tuple[BatchRow, dict[Kind, list[int]]]:
    """The batch, and the requests in its growing files; the log, the counts and the plan are checked to be in step."""
    found: dict[Kind, list[int]] = {"output": [], "error": []}
    sizes: dict[Kind, int] = {"output": 0, "error": 0}
    kinds: tuple[Kind, ...] = ("output", "error")
    async with database.read() as connection:
        row = await batches.get(connection, batch)
        assert row is not None
        for kind in kinds:
            position = 0
            while pieces := await results.read(connection, batch, kind, position):
                for piece in pieces:
                    assert piece.position == position, "the positions have a gap"
                    lines = piece.body.split(b"\n")[:-1]
                    assert len(lines) == len(piece.ends)
                    assert [len(line) + 1 for line in lines] == [
                        end - start for start, end in zip([0, *piece.ends], piece.ends, strict=False)
                    ]
                    found[kind] += [json.loads(line)["request"] for line in lines]
                    position += len(lines)
                    sizes[kind] += len(piece.body)
        recorded = list(await recorded_requests(connection, batch))
        left = [request for shard in await shards.of_batch(connection, batch) for _, request in shard.left()]
    everything = found["output"] + found["error"]
    assert len(everything) == len(set(everything)), "a result is recorded twice"
    assert sorted(recorded) == sorted(everything)
    assert sorted(everything + left) == list(range(row.total)), "log and plan do not add up"
    assert (row.completed, row.output_lines, row.output_bytes) == (
        len(found["output"]),
        len(found["output"]),
        sizes["output"],
    )
    assert (row.failed, row.error_lines, row.error_bytes) == (len(found["error"]), len(found["error"]), sizes["error"])
    return row, found


async def test_results_are_recorded_together_and_the_last_ends_the_run(database: FlakyDatabase) -> None:
    batch, (first, second) = await lease(database, [3, 2])
    desk = Desk(database)
    before = database.writes
    for place in range(3):
        desk.recorder.add(result(first, place))
    await desk.until(lambda: len(desk.settled) == 3)
    assert database.writes == before + 1
    row, found = await log_of(database, batch)
    assert (row.status, found["output"], desk.batches_done) == ("in_progress", [0, 1, 2], 0)
    desk.recorder.add(result(second, 1, kind="error"))
    desk.recorder.add(result(second, 0))
    await desk.until(lambda: len(desk.settled) == 5)
    row, found = await log_of(database, batch)
    assert (row.status, row.ending, row.finalizing_at is None) == ("finalizing", "completed", False)
    assert found == {"output": [0, 1, 2, 3], "error": [4]}
    assert desk.batches_done == 1
    assert (row.input_tokens, row.cached_tokens, row.output_tokens, row.reasoning_tokens) == (5, 10, 15, 20)
    await desk.close()


async def test_batches_that_end_their_run_are_taken_along(database: FlakyDatabase) -> None:
    large = [await lease(database, [3]) for _ in range(2)]
    small = [await lease(database, [1]) for _ in range(2)]
    other, (of_other,) = await lease(database, [2])
    desk = Desk(database, takes=True)
    before = time.time()
    for _, (shard,) in small:
        desk.recorder.add(result(shard, 0))
    desk.recorder.add(result(of_other, 0))
    for _, (shard,) in large:
        for place in range(3):
            desk.recorder.add(result(shard, place, padding=500_000))
    await desk.until(lambda: len(desk.settled) == 9)
    taken = {row.id: row for row in desk.taken}
    assert set(taken) >= {id for id, _ in small}
    assert len(taken) == 3, "there is a place for one large one, and no more"
    assert desk.left
    for id, _ in (*large, *small):
        row, _ = await log_of(database, id)
        assert row.status == "finalizing"
        if id not in taken:
            assert row.lease_owner is None
            continue
        assert row.lease_owner == "w"
        assert before + 9 <= (row.lease_until or 0) <= time.time() + 10
        assert msgspec.structs.replace(taken[id], lease_owner="w", lease_until=row.lease_until) == row
    row, _ = await log_of(database, other)
    assert (row.status, row.lease_owner) == ("in_progress", None)
    await desk.close()


async def test_nothing_is_taken_without_a_place(database: FlakyDatabase) -> None:
    id, (shard,) = await lease(database, [1])
    desk = Desk(database)
    desk.recorder.add(result(shard, 0))
    await desk.until(lambda: len(desk.settled) == 1)
    row, _ = await log_of(database, id)
    assert (row.status, row.lease_owner) == ("finalizing", None)
    assert (desk.taken, desk.left) == ([], True)
    await desk.close()


async def test_one_error_file_is_made_at_the_first_error(database: FlakyDatabase) -> None:
    batch, (shard,) = await lease(database, [4])
    desk = Desk(database)
    desk.recorder.add(result(shard, 0))
    await desk.until(lambda: len(desk.settled) == 1)
    row, _ = await log_of(database, batch)
    assert row.error_file is None
    for place in (1, 2, 3):
        desk.recorder.add(result(shard, place, kind="error", usage=False))
        await desk.until(lambda place=place: len(desk.settled) == place + 1)  # type: ignore[misc]
    row, _ = await log_of(database, batch)
    assert row.error_file is not None
    async with database.read() as connection:
        made = await files.page(connection, "local", limit=10, purpose="batch_error")
    assert [(file.id, file.lines, file.batch_id) for file in made] == [(row.error_file, 3, batch)]
    await desk.close()


@pytest.mark.parametrize("last", [False, True])
async def test_a_commit_that_only_seemed_to_fail_is_not_repeated(database: FlakyDatabase, last: bool) -> None:
    batch, (shard,) = await lease(database, [4])
    desk = Desk(database)
    database.ambiguous = 2
    places = range(4) if last else range(3)
    for place in places:
        desk.recorder.add(result(shard, place, kind=("output", "error")[place % 2]))
    await desk.until(lambda: len(desk.settled) == len(places))
    row, found = await log_of(database, batch)
    assert found == {"output": [0, 2], "error": [1, 3] if last else [1]}
    assert row.status == ("finalizing" if last else "in_progress")
    if not last:
        desk.recorder.add(result(shard, 3))
        await desk.until(lambda: len(desk.settled) == 4)
        row, _ = await log_of(database, batch)
    assert (row.status, row.input_tokens) == ("finalizing", 4)
    await desk.close()


async def test_only_what_is_new_of_a_group_is_recorded(database: FlakyDatabase) -> None:
    """The commit seemed to fail; before it is tried again, its shard has grown by nothing, another's has."""
    batch, (first, second) = await lease(database, [2, 2])
    desk = Desk(database)
    database.ambiguous = 1
    desk.recorder.add(result(first, 0))
    desk.recorder.add(result(second, 1))
    await desk.until(lambda: len(desk.settled) == 2)
    for shard, place in ((first, 1), (second, 0)):
        desk.recorder.add(result(shard, place))
    await desk.close()
    row, found = await log_of(database, batch)
    assert row.status == "finalizing"
    assert sorted(found["output"]) == [0, 1, 2, 3]


async def test_a_database_that_fails_for_a_while_loses_nothing(database: FlakyDatabase) -> None:
    batch, (shard,) = await lease(database, [20])
    desk = Desk(database)
    database.refused = 5
    for place in range(20):
        desk.recorder.add(result(shard, place))
        await asyncio.sleep(0.001)
    await desk.until(lambda: len(desk.settled) == 20)
    row, found = await log_of(database, batch)
    assert found["output"] == list(range(20))
    assert row.status == "finalizing"
    assert database.refused == 0
    await desk.close()


async def test_what_a_lost_lease_covered_is_left_to_the_new_holder(database: FlakyDatabase) -> None:
    batch, mine = await lease(database, [2, 2])
    async with database.write() as connection:
        await shards.release_some(connection, "w", [mine[0].id])
    _, (theirs,) = await lease(database, [], worker="v", batch=batch)
    desk, other = Desk(database), Desk(database, "v")
    for place in range(2):
        desk.recorder.add(result(mine[0], place))
        desk.recorder.add(result(mine[1], place))
    await desk.until(lambda: len(desk.settled) == 4)  # settled, though two of them were dropped
    row, found = await log_of(database, batch)
    assert (row.completed, found["output"]) == (2, [2, 3])
    for place in range(2):
        other.recorder.add(result(theirs, place, kind="error"))
    await other.until(lambda: len(other.settled) == 2)
    row, found = await log_of(database, batch)
    assert found == {"output": [2, 3], "error": [0, 1]}
    assert row.status == "finalizing"
    await desk.close()
    await other.close()


async def test_a_shard_leased_anew_by_its_own_worker_takes_no_old_results(database: FlakyDatabase) -> None:
    batch, (old,) = await lease(database, [2])
    async with database.write() as connection:
        await shards.release(connection, ["w"])
    _, (new,) = await lease(database, [], batch=batch)
    assert new.epoch == old.epoch + 1
    desk = Desk(database)
    desk.recorder.add(result(old, 0))
    desk.recorder.add(result(new, 0))
    desk.recorder.add(result(new, 1))
    await desk.close()
    _, found = await log_of(database, batch)
    assert found["output"] == [0, 1]


async def test_a_fenced_batch_takes_nothing_more(database: FlakyDatabase) -> None:
    batch, (shard,) = await lease(database, [2])
    desk = Desk(database)
    desk.recorder.add(result(shard, 0))
    await desk.until(lambda: len(desk.settled) == 1)
    async with database.write() as connection:
        await shards.fence(connection, batch)
    desk.recorder.add(result(shard, 1))
    await desk.until(lambda: len(desk.settled) == 2)
    row, found = await log_of(database, batch)
    assert (row.completed, found["output"], row.status) == (1, [0], "in_progress")
    await desk.close()


@pytest.mark.parametrize("status", ["cancelling", "finalizing"])
async def test_what_was_in_flight_is_recorded_while_a_batch_ends(database: FlakyDatabase, status: str) -> None:
    batch, (shard,) = await lease(database, [2])
    async with database.write() as connection:
        changes = {"status": status, "ending": "expired"}
        assert await batches.change(connection, batch, expect="in_progress", changes=changes)
    desk = Desk(database)
    for place in range(2):
        desk.recorder.add(result(shard, place))
    await desk.close()
    row, found = await log_of(database, batch)
    assert (row.status, row.ending, found["output"]) == (status, "expired", [0, 1])
    assert desk.batches_done == 0


async def test_two_workers_record_one_batch(database_url: str, database: FlakyDatabase) -> None:
    random.seed(3)
    async with database.write() as connection:
        batch = await add_batch(connection, total=400, expires_at=NOW + 1000)
        pieces = [("m", array("I", range(first, first + 20)).tobytes()) for first in range(0, 400, 20)]
        await shards.insert(connection, [shards.Plan(batch, NOW + 1000, pieces)])
        mine = [LeasedShard(row) for row in await claim_any(connection, "w", 10, NOW, FAR)]
        theirs = [LeasedShard(row) for row in await claim_any(connection, "v", 10, NOW, FAR)]
    other_database = FlakyDatabase(database_url)
    desks = Desk(database), Desk(other_database, "v")
    for desk, held in zip(desks, (mine, theirs), strict=True):
        everything = [(shard, place) for shard in held for place in range(20)]
        random.shuffle(everything)
        desk.everything = everything  # type: ignore[attr-defined]
    for i in range(200):
        for desk in desks:
            shard, place = desk.everything[i]  # type: ignore[attr-defined]
            desk.recorder.add(result(shard, place, kind=random.choice(("output", "error"))))
        if i % 10 == 0:
            await asyncio.sleep(0.004)
        if i in (50, 120):
            database.refused = other_database.ambiguous = 1
    for desk in desks:
        await desk.close()
    row, _ = await log_of(database, batch)
    assert row.status == "finalizing"
    async with database.read() as connection:
        assert len(await files.page(connection, "local", limit=10, purpose="batch_error")) == 1
        assert await shards.of_batch(connection, batch) == []
    await other_database.close()


async def test_no_room_until_results_are_recorded(database: FlakyDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "MAX_BYTES", 10_000)
    monkeypatch.setattr(recorder_module, "COMMIT_BYTES", 1_000)
    batch, (shard,) = await lease(database, [30])
    database.refused = 1_000_000
    desk = Desk(database)
    added = 0
    while desk.recorder.has_room:
        desk.recorder.add(result(shard, added, padding=500))
        added += 1
        assert added < 30
        await asyncio.sleep(0)
    assert 15 <= added <= 25
    room = asyncio.create_task(desk.recorder.room())
    failed_before = database.writes
    await desk.until(lambda: database.writes > failed_before + 3)
    assert not room.done()
    database.refused = 0
    async with asyncio.timeout(5):
        await room
    assert desk.recorder.has_room
    while added < 30:
        desk.recorder.add(result(shard, added, padding=500))
        added += 1
    await desk.close()
    _, found = await log_of(database, batch)
    assert found["output"] == list(range(30))


async def test_many_bytes_become_several_segments(database: FlakyDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "COMMIT_BYTES", 1_000)
    batch, (shard,) = await lease(database, [10])
    desk = Desk(database)
    for place in range(10):
        desk.recorder.add(result(shard, place, padding=400))
    await desk.close()
    await log_of(database, batch)
    async with database.read() as connection:
        lengths = [len(piece.body) for piece in await results.read(connection, batch, "output", 0, segments=100)]
    assert len(lengths) == 4
    assert max(lengths) < 1_500


async def test_what_need_not_wait_for_more_is_recorded_at_once(
    database: FlakyDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "INTERVAL", 60.0)
    batch, [shard] = await lease(database, [3])
    desk = Desk(database)
    desk.recorder.hurry()  # there is nothing
    desk.recorder.add(result(shard, 0))
    await desk.until(lambda: len(desk.settled) == 1)
    desk.recorder.add(result(shard, 1))
    desk.recorder.add(result(shard, 2))
    desk.recorder.hurry()
    await desk.until(lambda: len(desk.settled) == 3)
    await desk.close()
    _, found = await log_of(database, batch)
    assert sorted(found["output"]) == [0, 1, 2]


async def test_closing_records_what_is_left(database: FlakyDatabase) -> None:
    batch, (shard,) = await lease(database, [3])
    desk = Desk(database)
    desk.recorder.add(result(shard, 0))
    desk.recorder.add(result(shard, 1))
    await desk.close()
    assert len(desk.settled) == 2
    _, found = await log_of(database, batch)
    assert found["output"] == [0, 1]


async def test_closing_gives_up_on_a_database_that_stays_away(database: FlakyDatabase) -> None:
    batch, (shard,) = await lease(database, [1])
    desk = Desk(database)
    database.refused = 1_000_000
    desk.recorder.add(result(shard, 0))
    with pytest.raises(StoreFull):
        await desk.close()
    row, _ = await log_of(database, batch)
    assert row.completed == 0
