"""`estimated_completion_at` in every answer that shows a batch, held against when it was really done."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from batchery.engine.forecast import Progress
from batchery.server import forecast
from batchery.store import batches, estimates, workers
from batchery.store.database import sqlite_url
from batchery.store.errors import StoreUnavailable
from batchery.store.ids import new_id
from batchery.upstreams.simulator import Behaviour, LogNormal
from tests.requests import chat_file
from tests.server.rig import Rig
from tests.whole import TERMINAL, Whole, whole

GOOD = 0.15
"""Of a run, by which the estimate may be off after its first tenth."""


@pytest.mark.parametrize("latency", [0.05, LogNormal(0.05, 0.6)])
async def test_it_is_good_after_the_first_tenth(tmp_path: Path, latency: Any) -> None:
    behaviour = Behaviour(latency=latency, concurrency=16)
    async with whole(sqlite_url(tmp_path / "db"), tmp_path, behaviour) as server, server.working(max_in_flight=16):
        began = time.time()
        batch = await server.batch(chat_file(1_600))
        second = await server.batch(chat_file(500))
        looks = [await followed(server, batch["id"]), await followed(server, second["id"])]
    for of_one in looks:
        end = of_one[-1][0]
        # On a busy machine a look takes long and then will do for so long, also one from before the first result.
        first = began + (end - began) / 10 + forecast.FRESH
        good = [(when, told) for when, told in of_one[:-1] if when > first]
        assert len(good) > 10
        assert all(told is not None for _, told in good)
        # Whole seconds are told. That every look is good is proved in made-up time, in `tests/engine`; here the machine
        # may stand still for a moment of so short a run.
        errors = sorted(abs(told - end) for _, told in good if told is not None)
        assert errors[len(errors) // 2] <= GOOD * (end - began) + 1, errors


async def followed(server: Whole, id: str) -> list[tuple[float, int | None]]:
    """Each look at a batch until it has ended: when, and what was told."""
    looks: list[tuple[float, int | None]] = []
    while True:
        found = await server.get(id)
        looks.append((time.time(), found["estimated_completion_at"]))
        if found["status"] in TERMINAL:
            assert found["estimated_completion_at"] is None
            return looks
        await asyncio.sleep(0.1)


async def test_events_tell_it(tmp_path: Path) -> None:
    behaviour = Behaviour(latency=0.02, concurrency=4)
    async with whole(sqlite_url(tmp_path / "db"), tmp_path, behaviour) as server, server.working(max_in_flight=4):
        batch = await server.batch(chat_file(400))
        assert batch["estimated_completion_at"] is None  # nothing has ever run here
        answer = await server.rig.ask("GET", f"/v1/batches/{batch['id']}/events")
        events = [dict(line.split(": ", 1) for line in text.splitlines() if ": " in line) for text in
                  answer.body.decode().split("\n\n")]  # fmt: skip
        told = [
            json.loads(event["data"])["estimated_completion_at"] for event in events if event.get("event") == "counts"
        ]
        ended = json.loads(events[-2]["data"])
        assert ended["status"] == "completed"
        assert ended["estimated_completion_at"] is None
        assert any(one is not None and one <= ended["completed_at"] + 2 for one in told)


async def test_a_new_batch_is_told_by_what_ran_before(rig: Rig) -> None:
    now = int(time.time())
    await add(rig, status="completed", completed=1_000, in_progress_at=now - 100, finalizing_at=now)
    id = await add(rig, status="validating", total=600)
    found = (await rig.ask("GET", f"/v1/batches/batch_{id}")).json
    assert now + 59 <= found["estimated_completion_at"] <= now + 65


async def test_a_list_tells_each(rig: Rig) -> None:
    now = int(time.time())
    await add(rig, status="completed", completed=1_000, in_progress_at=now - 100, finalizing_at=now)
    # Ten times as much is left as is done would make ten seconds of one in which this machine stands still.
    first = await add(rig, status="in_progress", total=2_000, completed=1_000, run_started_at=time.time() - 100)
    second = await add(rig, status="in_progress", total=1_000, expires_at=now + 90_000, run_started_at=now - 1.0)
    cancelling = await add(rig, status="cancelling", total=1_000)
    listed = {one["id"]: one["estimated_completion_at"] for one in (await rig.ask("GET", "/v1/batches")).json["data"]}
    assert listed[f"batch_{cancelling}"] is None
    assert now + 99 <= listed[f"batch_{first}"] <= now + 105
    assert now + 199 <= listed[f"batch_{second}"] <= now + 207


async def test_what_is_done_is_not_called_failed_for_want_of_an_estimate(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(_: Any) -> Any:
        raise StoreUnavailable("the database has just gone away")

    file = await rig.upload(chat_file(2))
    monkeypatch.setattr(estimates, "running", fails)
    made = await rig.create(file["id"])
    assert (made.status, made.json["estimated_completion_at"]) == (200, None)
    assert (await rig.ask("POST", f"/v1/batches/{made.json['id']}/cancel")).status == 200


async def test_models_that_no_upstream_shares_have_paces_of_their_own(rig: Rig) -> None:
    """A hundred a second of one, two of another; and of a third nothing has come yet but what its worker did before."""
    now = time.time()
    served: dict[str, tuple[float, list[list[str]]]] = {
        "a": (70.0, [["quick"], ["slow", "alias"]]),
        "b": (5.0, [["third"]]),
    }
    async with rig.context.database.write() as connection:
        for letter, (rate, lists) in served.items():
            row = workers.WorkerRow(id=letter * 32, host="h", pid=2**22, version="1", started_at=now, heartbeat_at=now)
            await workers.insert(connection, row)
            upstreams = [workers.UpstreamSnapshot(served=each) for each in lists]
            await workers.beat(connection, row.id, now, rate, workers.Snapshot(upstreams=upstreams))
    started = {"status": "in_progress", "run_started_at": now - 100}
    quick = await add(rig, model="quick", total=20_000, completed=10_000, **started)
    await add(rig, model="quick", status="completed", total=9_000, completed=9_000, run_started_at=now - 1_000)
    slow = await add(rig, model="slow", total=300, completed=100, **started)
    await add(rig, model="alias", status="completed", total=100, completed=100, run_started_at=now - 90)
    third = await add(rig, model="third", status="in_progress", total=1_000, run_started_at=now)
    listed = {one["id"]: one["estimated_completion_at"] for one in (await rig.ask("GET", "/v1/batches")).json["data"]}
    assert 99 <= listed[f"batch_{quick}"] - now <= 106
    assert 99 <= listed[f"batch_{slow}"] - now <= 106
    assert 199 <= listed[f"batch_{third}"] - now <= 202
    mixed = await add(rig, status="validating", total=1_000)  # asks for several models, so all are as one
    found = (await rig.ask("GET", f"/v1/batches/batch_{mixed}")).json
    assert found["estimated_completion_at"] is None or found["estimated_completion_at"] - now < 300


async def test_many_who_ask_cost_one_look(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    ask = estimates.running

    async def counted(connection: Any) -> Any:
        nonlocal looks
        looks += 1
        return await ask(connection)

    monkeypatch.setattr(forecast, "FRESH", 600)
    monkeypatch.setattr(forecast, "NEW", 600)
    monkeypatch.setattr(estimates, "running", counted)
    id = await add(rig, status="in_progress", total=10, completed=5, run_started_at=time.time() - 5)
    await asyncio.gather(*(rig.ask("GET", f"/v1/batches/batch_{id}") for _ in range(50)))
    assert looks == 1


async def test_what_the_table_says(rig: Rig) -> None:
    start = time.time() - 50
    now = int(time.time())
    id = await add(
        rig, status="in_progress", total=10, completed=4, failed=3, invalid=1, run_done=1, run_started_at=start
    )
    waits = await add(rig, status="validating", total=10, invalid=2, expires_at=now + 90_000)
    ended = await add(rig, status="completed", total=9, completed=9, run_started_at=start + 1)
    await add(rig, status="completed", total=9, completed=9, run_started_at=start - 1)
    async with rig.context.database.read() as connection:
        running = [Progress(*fields) for fields in await estimates.running(connection)]
        assert await estimates.done_since(connection, start) == 9
        assert await estimates.done_since(connection, start, {"m"}) == 0
        assert await estimates.done_of(connection, [ended]) == {ended: 9}
    deadline = now + 86_400
    assert [one.id for one in running] == [id, waits]
    assert running[0] == Progress(
        id=id, owner="local", weight=1, deadline=running[0].deadline, left=3, done=6, since=start
    )
    assert (running[1].left, running[1].done, running[1].since) == (8, 0, None)
    assert abs(running[0].deadline - deadline) <= 2


async def add(rig: Rig, **values: Any) -> str:
    """A batch as it may stand in the table; its bare id."""
    id, now = new_id(), int(time.time())
    columns: dict[str, Any] = {
        "id": id,
        "owner": "local",
        "endpoint": "/v1/chat/completions",
        "input_file": new_id(),
        "window": "24h",
        "output_file": new_id(),
        "created_at": now,
        "expires_at": now + 86_400,
        "total": 1_000,
        "metadata": batches.encode_metadata({}),
    }
    async with rig.context.database.write() as connection:
        await batches.insert(connection, **columns | values)
    return id
