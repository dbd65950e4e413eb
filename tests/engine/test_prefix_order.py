"""The order on send: what the upstream's prefix cache finds, beside what the best order would let it find."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from batchery.engine.planner import Planner
from batchery.engine.reader import Reader
from batchery.upstreams.http import HttpUpstream
from batchery.upstreams.simulator import Behaviour, running_simulator
from batchery.upstreams.simulator.prefix_cache import PrefixCache
from batchery.upstreams.simulator.requests import Endpoint, read_request
from tests.engine.rig import Rig
from tests.requests import chat_line

PREFIXES = 50
CACHE = 256  # blocks: seven or eight of the prefixes

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def shuffled(count: int, seed: int) -> list[bytes]:
    """Requests that share 50 prefixes of 2 KB, in no order."""
    draw = random.Random(5)
    prefixes = ["".join(draw.choices("abcdefgh ", k=2_000)) for _ in range(PREFIXES)]
    draw = random.Random(seed)
    lines = [chat_line(str(i), f"{prefixes[i % PREFIXES]} and question {seed}.{i}") for i in range(count)]
    draw.shuffle(lines)
    return lines


def cached(lines: list[bytes]) -> int:
    """The tokens that a server's cache finds if the requests come in this order."""
    cache = PrefixCache(CACHE)
    bodies = [json.dumps(json.loads(line)["body"]).encode() for line in lines]
    return sum(cache.use("m", read_request(body, Endpoint.CHAT)[1]) for body in bodies)


def best(lines: list[bytes]) -> int:
    """The same for the best order."""
    return cached(sorted(lines, key=lambda line: json.loads(line)["body"]["messages"][0]["content"]))


async def test_shuffled_requests_reach_the_cache_as_if_sorted(rig: Rig) -> None:
    lines = shuffled(2_000, 1)
    async with running_simulator(Behaviour(prefix_cache=CACHE, latency=0.002, concurrency=0)) as simulator:
        async with rig.working(HttpUpstream(simulator.url), max_in_flight=32):
            row = await rig.ended(await rig.create(await rig.upload(lines)))
        stats = simulator.stats()
    assert (row.status, row.completed, stats.received) == ("completed", 2_000, 2_000)
    assert cached(lines) < 0.3 * best(lines)  # so that the order is what matters
    assert stats.cached_tokens >= 0.95 * best(lines)


async def test_small_batches_go_out_together(rig: Rig) -> None:
    """Of many batches with the same prefixes each alone would change the prefix with nearly every request."""
    await rig.database.migrate()
    files = [shuffled(100, seed) for seed in range(12)]
    ids = [await rig.create(await rig.upload(lines)) for lines in files]
    together = [line for lines in files for line in lines]
    planner = Planner(rig.database, Reader(rig.database, rig.blobs), "planner", 10.0)
    while await planner.plan_one() is not None:
        pass
    apart = sum(best(lines) for lines in files)
    async with running_simulator(Behaviour(prefix_cache=CACHE, latency=0.02, concurrency=0)) as simulator:
        async with rig.working(HttpUpstream(simulator.url), max_in_flight=256):
            rows = await asyncio.gather(*map(rig.ended, ids))
        stats = simulator.stats()
    assert [row.completed for row in rows] == [100] * 12
    assert stats.received == 1_200
    assert stats.cached_tokens > 1.2 * apart
    assert stats.cached_tokens <= best(together)


async def test_results_and_a_second_run_are_those_of_the_file(rig: Rig) -> None:
    """What went out in another order is answered under the right name, and a worker that comes later goes on."""
    lines = shuffled(600, 3)
    async with running_simulator(Behaviour(prefix_cache=CACHE, latency=0.01)) as simulator:
        upstream = HttpUpstream(simulator.url)
        await rig.database.migrate()
        id = await rig.create(await rig.upload(lines))
        async with rig.working(upstream, max_in_flight=8):
            await rig.until(id, lambda row: row.completed >= 100)
        assert (await rig.batch(id)).completed < 600
        async with rig.working(HttpUpstream(simulator.url), max_in_flight=64):
            row = await rig.ended(id)
        assert simulator.stats().received == simulator.stats().answered_ok_distinct == 600
    found: dict[str, Any] = {}
    for line in await rig.lines(row.output_file):
        assert line["custom_id"] not in found
        found[line["custom_id"]] = line
    assert set(found) == {str(i) for i in range(600)}
