"""A worker's rate: what is recorded a second, while there is work."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.engine import worker
from batchery.engine.throughput import SHORTEST, SMOOTHING, Throughput
from batchery.store import workers
from batchery.upstreams.http import HttpUpstream
from batchery.upstreams.simulator import Behaviour, running_simulator
from tests.engine.rig import Rig
from tests.requests import chat_file


def test_steady_work_is_its_rate_and_idleness_leaves_it() -> None:
    throughput = Throughput(100.0)
    assert throughput.observe(0, has_work=False, now=102.0) == 0
    assert throughput.observe(0, has_work=True, now=104.0) == 0
    for beat in range(1, 10):
        assert throughput.observe(20 * beat, has_work=True, now=104.0 + 2 * beat) == 10
    assert throughput.observe(190, has_work=False, now=124.0) == 10  # it ran out of work in between
    for beat in range(100):
        assert throughput.observe(190, has_work=False, now=126.0 + 2 * beat) == 10


def test_a_change_is_followed_smoothly() -> None:
    throughput = Throughput(0.0)
    throughput.observe(10, has_work=True, now=1.0)
    rates = [throughput.observe(10 + 100 * beat, has_work=True, now=1.0 + beat) for beat in range(1, 601)]
    assert rates == sorted(rates)
    after = round(SMOOTHING) - 1
    assert rates[after] == pytest.approx(100 - 90 * math.exp(-1))
    assert rates[-1] == pytest.approx(100, abs=0.1)


def test_a_standstill_with_work_at_hand_is_seen() -> None:
    throughput = Throughput(0.0)
    throughput.observe(10, has_work=True, now=1.0)
    assert throughput.observe(10, has_work=True, now=1.0 + SMOOTHING) == pytest.approx(10 * math.exp(-1))


def test_a_short_batch_between_two_looks_counts() -> None:
    throughput = Throughput(0.0)
    assert throughput.observe(30, has_work=False, now=2.0) == 15
    assert throughput.observe(32, has_work=False, now=4.0) == 15  # at least 1 a second: nothing new
    assert throughput.observe(92, has_work=False, now=6.0) == 30


def test_a_second_look_too_soon_loses_nothing() -> None:
    throughput = Throughput(0.0)
    assert throughput.observe(10, has_work=True, now=0.0) == 0
    assert throughput.observe(10, has_work=True, now=1.0) == 10
    assert throughput.observe(10, has_work=True, now=1.01) == 10
    assert throughput.observe(10, has_work=False, now=1.02) == 10
    assert throughput.observe(12, has_work=True, now=2.0) == 10  # it was idle in between


@given(st.lists(st.tuples(st.integers(0, 10**6), st.booleans(), st.floats(0, 1e6))))
def test_it_stays_between_nothing_and_the_fastest(looks: list[tuple[int, bool, float]]) -> None:
    throughput = Throughput(0.0)
    now, recorded, taken_at, taken, fastest = 0.0, 0, 0.0, 0, 0.0
    for results, has_work, seconds in looks:
        recorded += results
        now += seconds
        rate = throughput.observe(recorded, has_work, now)
        if now - taken_at >= SHORTEST:
            fastest = max(fastest, (recorded - taken) / (now - taken_at))
            taken_at, taken = now, recorded
        assert 0 <= rate <= fastest * (1 + 1e-9)


async def test_a_worker_tells_its_rate_with_its_heartbeat(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "BEAT", 0.02)
    rig = Rig(database_url, tmp_path)
    async with running_simulator(Behaviour()) as simulator, rig.working(HttpUpstream(simulator.url)) as running:
        batch = await rig.create(await rig.upload(chat_file(50).splitlines(keepends=True)))
        running.wake()
        await rig.ended(batch)
        deadline = time.monotonic() + 10
        rate = 0.0
        while not rate:
            assert time.monotonic() < deadline
            async with rig.database.read() as connection:
                rate = await workers.total_rate(connection, 0)
        assert 0 < rate < 1e6
