"""The planner: every request once, models apart, shards of a sensible size, and many batches at a time."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.engine import planner as planner_module
from batchery.engine.planner import MAX_SHARDS, SHARD_REQUESTS, Planner, cut, shard_size
from batchery.engine.reader import Reader
from batchery.store import batches, shards
from batchery.store.errors import StoreError
from batchery.wire.file_index import FileIndex
from tests.engine.rig import Rig
from tests.requests import chat_line


def index_of(models: list[str]) -> FileIndex:
    """An index of a file whose requests ask for these models."""
    by_model: dict[str, array[int]] = defaultdict(lambda: array("I"))
    for request, model in enumerate(models):
        by_model[model].append(request)
    return FileIndex(
        starts=array("Q", range(len(models))),
        lengths=array("I", [1]) * len(models),
        numbers=None,
        models=tuple(by_model),
        by_model=tuple(by_model.values()),
        urls=("/v1/chat/completions",),
    )


def unpacked(requests: bytes) -> list[int]:
    return list(array("I", requests))


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 700)), max_size=12))
def test_every_request_is_in_one_shard_of_its_model(runs: list[tuple[str, int]]) -> None:
    models = [model for model, count in runs for _ in range(count)]
    plan = [(model, unpacked(requests)) for model, requests in cut(index_of(models))]
    seen = [request for _, requests in plan for request in requests]
    assert sorted(seen) == list(range(len(models)))
    for model, requests in plan:
        assert 1 <= len(requests) <= shard_size(len(models))
        assert requests == sorted(requests)
        assert {models[request] for request in requests} == {model}
    for model in set(models):
        mine = [requests for of, requests in plan if of == model]
        assert [request for requests in mine for request in requests] == [
            request for request, of in enumerate(models) if of == model
        ]


def test_models_alternate_even_in_a_file_sorted_by_model() -> None:
    plan = cut(index_of(["a"] * 600 + ["b"] * 300 + ["c"]))
    assert [model for model, _ in plan] == ["a", "b", "c", "a", "b", "a"]


def test_an_empty_file_has_an_empty_plan() -> None:
    assert cut(index_of([])) == []


@pytest.mark.parametrize(
    ("requests", "size"),
    [
        (1, SHARD_REQUESTS),
        (50_000, SHARD_REQUESTS),
        (SHARD_REQUESTS * MAX_SHARDS, SHARD_REQUESTS),
        (SHARD_REQUESTS * MAX_SHARDS + 1, SHARD_REQUESTS + 1),
        (10_000_000, 4883),
    ],
)
def test_shard_size(requests: int, size: int) -> None:
    assert shard_size(requests) == size
    assert -(-requests // size) <= MAX_SHARDS


def test_a_million_requests_are_planned_at_once() -> None:
    models = ["a", "b"] * 500_000
    index = index_of(models)
    started = time.perf_counter()
    plan = cut(index)
    assert time.perf_counter() - started < 1.0
    assert len(plan) <= MAX_SHARDS + 2
    assert sum(len(requests) for _, requests in plan) == 4_000_000


def planner(rig: Rig, worker: str = "w") -> Planner:
    return Planner(rig.database, Reader(rig.database, rig.blobs), worker, 10.0)


async def is_planned(rig: Rig, id: str) -> None:
    """The batch runs, and every request is in one shard of its plan."""
    row = await rig.batch(id)
    assert (row.status, row.lease_owner, row.run_done) == ("in_progress", None, 0)
    async with rig.database.read() as connection:
        plan = await shards.of_batch(connection, id)
    assert sorted(request for shard in plan for request in unpacked(shard.requests)) == list(range(row.total))


async def test_what_waits_is_planned_together(rig: Rig) -> None:
    file = await rig.upload(chat_line(f"r{i}", "p") for i in range(300))
    ids = [await rig.create(file), await rig.create(await rig.upload([chat_line("r", "p")])), await rig.create(file)]
    one = planner(rig)
    assert [row.id for row in await one.plan_some()] == ids
    for id in ids:
        await is_planned(rig, id)
    assert await one.plan_some() == []


async def test_no_more_are_planned_together_than_a_short_transaction_takes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await rig.upload(chat_line(f"r{i}", "p") for i in range(10))
    ids = [await rig.create(file) for _ in range(3)]
    monkeypatch.setattr(planner_module, "AT_ONCE_REQUESTS", 20)
    one = planner(rig)
    assert [row.id for row in await one.plan_some()] == ids[:2]
    monkeypatch.setattr(planner_module, "AT_ONCE_REQUESTS", 5)
    assert [row.id for row in await one.plan_some()] == ids[2:]


async def test_a_batch_that_changes_while_it_is_planned_gets_no_plan(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    file = await rig.upload([chat_line("r", "p")])
    cancelled, other, leased = [await rig.create(file) for _ in range(3)]
    get_many = batches.get_many

    async def change_first(connection: Any, ids: Any, *, lock: bool = False) -> Any:
        changes: list[dict[str, Any]] = [
            {"id": cancelled, "status": "cancelling", "lease_until": None},
            {"id": leased, "status": "validating", "lease_until": time.time() + 10.0},
        ]
        await batches.change_many(connection, changes)
        return await get_many(connection, ids, lock=lock)

    monkeypatch.setattr(batches, "get_many", change_first)
    assert [row.id for row in await planner(rig).plan_some()] == [other]
    await is_planned(rig, other)
    async with rig.database.read() as connection:
        assert await shards.of_batch(connection, cancelled) == []
        assert await shards.of_batch(connection, leased) == []


async def test_planners_at_the_same_batches_plan_each_once(rig: Rig) -> None:
    file = await rig.upload(chat_line(f"r{i}", "p") for i in range(10))
    ids = [await rig.create(file) for _ in range(20)]
    planned = await asyncio.gather(*(planner(rig, worker).plan_some() for worker in "abc"))
    assert sorted(row.id for rows in planned for row in rows) == sorted(ids)
    for id in ids:
        await is_planned(rig, id)


async def test_a_batch_whose_index_is_away_lets_others_go_first(rig: Rig) -> None:
    lost, kept = await rig.upload([chat_line("a", "p")]), await rig.upload([chat_line("b", "p")])
    bad, good = await rig.create(lost), await rig.create(kept)
    key = (await rig.file(lost)).index_key
    assert key is not None
    await rig.blobs.delete([key])
    one = planner(rig)
    with pytest.raises(StoreError):
        await one.plan_some()
    assert [row.id for row in await one.plan_some()] == [good]
    assert (await rig.batch(bad)).status == "validating"
