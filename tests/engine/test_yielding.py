"""Batch work steps back while others wait at the same engine, as far as it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from batchery.engine import worker as worker_module
from batchery.engine.yielding import Level
from batchery.upstreams.base import Load
from batchery.upstreams.http import HttpUpstream
from batchery.upstreams.simulator import Behaviour, running_simulator
from tests.engine.rig import Rig
from tests.requests import chat_line


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@pytest.mark.parametrize(
    ("load", "share", "in_flight", "before", "after"),
    [
        (Load(0, 100), 1.0, 100, None, None),
        (Load(30, 70), 1.0, 100, None, 70),  # only ours: what waits is not sent
        (Load(10, 70), 1.0, 80, 70, 70),  # the first step has not yet had its effect
        (Load(100, 100), 1.0, 100, None, 50),  # half of what there is is ours, and so is half of what waits
        (Load(1000, 10), 1.0, 100, None, 1),
        (Load(1000, 60), 0.25, 100, None, 45),  # not below three quarters of what the engine works on
        (Load(300, None), 1.0, 100, None, 1),
        (Load(300, None), 0.25, 100, None, 75),
        (Load(2, 100), 1.0, 100, None, None),  # some have only just come
        (Load(2, 100), 1.0, 70, 70, 70),
        (Load(0, 100), 1.0, 50, 50, 51),
        (Load(0, 100), 1.0, 1, 1, 2),
        (Load(0, 100), 1.0, 99, 99, None),
        (Load(0, 100, 0.99), 1.0, 100, None, 90),
        (Load(0, 100, 0.5), 1.0, 100, None, None),
        (None, 1.0, 10, 10, None),
    ],
)
def test_levels(load: Load | None, share: float, in_flight: int, before: int | None, after: int | None) -> None:
    level = Level(share)
    level.cap = before
    assert level.look(load, limit=100, in_flight=in_flight) == after


@pytest.mark.parametrize(("slots", "others"), [(256, 0), (256, 100), (64, 63), (8, 2), (1000, 990)])
def test_a_level_settles_where_nobody_waits_and_nothing_is_idle(slots: int, others: int) -> None:
    """A server that works on so many, some of them others'; what is in flight follows the level within one look."""
    level, in_flight, seen = Level(1.0), 400, []
    for _ in range(60):
        everybody = in_flight + others
        load = Load(max(0, everybody - slots), min(slots, everybody))
        seen.append(load)
        in_flight = level.look(load, limit=400, in_flight=in_flight) or 400
    room = slots - others
    assert all(load.waiting <= max(2, 0.05 * slots) for load in seen[20:])
    assert sum(load.running or 0 for load in seen[20:]) >= 0.95 * 40 * min(slots, 400 + others)
    assert 1 <= in_flight <= room + max(1, 0.02 * slots)


def test_what_others_leave_is_soon_in_use() -> None:
    level = Level(1.0)
    for in_flight in (256, 200, 100, 10):
        level.look(Load(1000, 256), limit=256, in_flight=in_flight)
    assert level.cap is not None
    assert level.cap <= 10
    looks = 0
    while level.look(Load(0, 256), limit=256, in_flight=level.cap or 256) is not None:
        looks += 1
    assert looks <= 16


async def interactive_wait(rig: Rig, share: float) -> tuple[float, float]:
    """How long others waited for a slot on average, once there was time to step back, and answers to ours a second."""
    behaviour = Behaviour(latency=0.1, concurrency=16, interactive=((0.0, 60.0),))
    async with running_simulator(behaviour) as simulator:
        upstream = HttpUpstream(simulator.url)
        async with rig.working(upstream, max_in_flight=64, yield_share=share, stop_grace=0.1) as worker:
            await rig.create(await rig.upload(chat_line(f"r{i}", f"{share} prompt {i}") for i in range(2000)))
            worker.wake()
            await until(lambda: simulator.stats().answered > 150)
            simulator.reset()
            loop = asyncio.get_running_loop()
            began = loop.time()
            await until(lambda: simulator.stats().interactive > 60)
            stats = simulator.stats()
            rate = stats.answered / (loop.time() - began)
        await upstream.close()
    return stats.interactive_wait, rate


async def test_others_hardly_wait_for_batch_work_that_yields(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "LOOK", 0.05)
    stubborn, _ = await interactive_wait(rig, 0.0)
    yielding, rate = await interactive_wait(rig, 0.9)
    assert yielding < 0.5 * stubborn
    assert rate > 30  # of the 100 a second that others leave: it goes on
