"""Several upstreams under one worker: all full, each request at one that serves it, and none that is ill in the way."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from batchery.engine import retry
from batchery.engine import worker as worker_module
from batchery.engine.feeder import OPEN_BYTES
from batchery.engine.pool import Destination, Pool, list_models
from batchery.engine.work import LeasedShard, Result, Work
from batchery.upstreams.base import Answer, Fault
from batchery.upstreams.http import HttpUpstream
from batchery.upstreams.simulator import Behaviour, RunningSimulator, running_simulator
from batchery.wire.objects import Model
from tests.engine.rig import Rig
from tests.engine.test_dispatcher import GOOD, Results, shard, works
from tests.requests import chat_line

NO_MODEL = Answer(404, b'{"error":{"code":"model_not_found","message":"no such model"}}')
WRONG_KEY = Answer(401, b'{"error":{"code":"invalid_api_key","message":"wrong key"}}')
AWAY = Fault("unreachable", "No connection.")


class Server:
    """An upstream that says at once what it is told to say, or holds a request while it is told nothing.

    Args:
        says: what it answers.
        models: what it says that it serves.
    """

    def __init__(self, says: Answer | Fault | None = GOOD, models: Sequence[str] = ()) -> None:
        self.says = says
        self.served = models
        self.sent: list[str] = []
        self.told = asyncio.Event()

    async def send(self, url: str, body: bytes | memoryview) -> Answer | Fault:
        self.sent.append(bytes(body).decode())
        await asyncio.sleep(0)
        while self.says is None:
            await self.told.wait()
        return self.says

    async def models(self) -> list[Model]:
        return [Model(id=id, created=0, owned_by="o") for id in self.served]

    async def close(self) -> None:
        pass

    def say(self, says: Answer | Fault) -> None:
        """From now on, also of what it holds."""
        self.says = says
        self.told.set()


class Bench:
    """A pool between such servers and a recorder that only takes down what it is given."""

    def __init__(self, servers: Sequence[Server], limit: int, names: Sequence[str]) -> None:
        self.servers = servers
        self.results = Results()
        self.dropped: list[Work] = []
        destinations = [
            Destination(upstream=server, name=name, max_in_flight=limit)
            for server, name in zip(servers, names, strict=True)
        ]
        self.pool = Pool(destinations, self.results, lambda: None, self.dropped.append)

    @property
    def sent(self) -> list[int]:
        """How many requests each server was sent."""
        return [len(server.sent) for server in self.servers]

    @property
    def taken(self) -> list[Result]:
        return self.results.taken

    async def until_taken(self, count: int) -> None:
        """Wait until so many have ended."""
        await until(lambda: len(self.taken) >= count)
        assert len(self.taken) == count


@asynccontextmanager
async def bench(*servers: Server, limit: int = 4, names: Sequence[str] | None = None) -> AsyncIterator[Bench]:
    made = Bench(servers, limit, names or [f"http://{place}" for place in range(len(servers))])
    await made.pool.survey()
    yield made
    await made.pool.close(0.0)


async def until(condition: Callable[[], bool], timeout: float = 10) -> None:
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def many(count: int, *, of: LeasedShard | None = None, prefix: int = 0) -> list[Work]:
    found = works(of or shard(), *(f"r{i}" for i in range(count)))
    for work in found:
        work.prefix = prefix
    return found


async def test_all_are_full() -> None:
    async with bench(Server(None), Server(None), Server(None)) as it:
        it.pool.offer(many(30))
        await until(lambda: it.sent == [4, 4, 4])
        assert (it.pool.limit, it.pool.ready) == (12, 18)
        assert [lane.dispatcher.in_flight for lane in it.pool.lanes] == [4, 4, 4]
        assert [lane.dispatcher.ready for lane in it.pool.lanes] == [6, 6, 6]
        it.servers[1].say(GOOD)  # the others' queues are no concern of it: it goes on with what they cannot send
        await until(lambda: it.sent[1] == 4 + 18)
        assert it.sent == [4, 22, 4]
        for server in it.servers:
            server.say(GOOD)
        await it.until_taken(30)
    assert {result.work.custom_id for result in it.taken} == {f"r{i}" for i in range(30)}


async def test_what_begins_alike_goes_to_the_same_one() -> None:
    names = [f"http://{place}" for place in range(3)]
    homes = [await homes_of(names) for _ in range(2)]
    assert homes[0] == homes[1]
    assert min(Counter(homes[0].values()).values()) >= 8, homes  # 20 each is even
    # Another worker, which was told of them in another order, sends them to the same ones; and without one of them only
    # what that one had goes elsewhere.
    assert await homes_of([names[2], names[0], names[1]]) == homes[0]
    without = await homes_of(names[:2])
    assert {prefix: name for prefix, name in homes[0].items() if name != names[2]}.items() <= without.items()


async def homes_of(names: Sequence[str]) -> dict[int, str]:
    """To which server the requests of each of 60 beginnings go."""
    servers = [Server() for _ in names]
    async with bench(*servers, names=names) as it:
        found: dict[int, str] = {}
        for prefix in range(1, 61):
            before, count = it.sent, len(it.taken)
            it.pool.offer(many(2, prefix=prefix))
            await it.until_taken(count + 2)
            (place,) = (place for place, sent in enumerate(it.sent) if sent > before[place])
            found[prefix] = names[place]
    return found


async def test_a_beginning_that_all_have_leaves_no_slot_idle() -> None:
    async with bench(Server(None), Server(None), limit=8) as it:
        it.pool.offer(many(64, prefix=7))
        await until(lambda: it.sent == [8, 8])
        queued = sorted(lane.dispatcher.ready for lane in it.pool.lanes)
        assert sum(queued) == 48
        assert queued[1] < 2.5 * queued[0]  # more where it belongs, but not all
        assert queued[1] > queued[0]


async def test_each_model_goes_where_it_is_served() -> None:
    first, second = shard(), shard()
    first.model, second.model = "a", "b"
    async with bench(Server(models=["a"]), Server(models=["b", "c"]), Server(models=["a"])) as it:
        it.pool.offer(many(40, of=first) + many(30, of=second))
        await it.until_taken(70)
        assert it.sent[1] == 30
        assert it.sent[0] + it.sent[2] == 40
        assert min(it.sent) > 10
        # One that nobody lists may be known to any by another name.
        unlisted = shard()
        unlisted.model = "alias"
        it.pool.offer(many(30, of=unlisted))
        await it.until_taken(100)
        assert it.sent[1] > 30
    assert [model.id for model in await list_models(it.servers)] == ["a", "b", "c"]


async def test_a_server_that_says_nothing_just_now_serves_what_it_did() -> None:
    a, b = shard(), shard()
    a.model, b.model = "a", "b"
    async with bench(Server(models=["a"]), Server(models=["b"])) as it:
        it.servers[1].served = ()
        await it.pool.survey()
        it.pool.offer(many(10, of=a) + many(10, of=b))
        await it.until_taken(20)
        assert it.sent == [10, 10]
        it.servers[1].served = ["a", "b"]
        await it.pool.survey()
        it.pool.offer(many(30, of=a))
        await it.until_taken(50)
        assert it.sent[1] > 15


async def test_only_the_models_are_full_whose_servers_are() -> None:
    a, b = shard(), shard()
    a.model, b.model = "a", "b"
    async with bench(Server(None, models=["a"]), Server(None, models=["b"])) as it:
        it.pool.offer(many(60, of=a))
        assert it.pool.full({"a", "b"}) == {"a"}
        assert not it.pool.is_fed
        assert it.pool.is_hungry
        it.pool.offer(many(60, of=b))
        assert it.pool.full({"a", "b"}) == {"a", "b"}
        assert it.pool.is_fed
        assert not it.pool.is_hungry


async def test_what_one_refuses_for_good_another_answers() -> None:
    async with bench(Server(WRONG_KEY), Server(GOOD)) as it:
        it.pool.offer(many(200))
        await it.until_taken(200)
        assert all(result.kind == "output" for result in it.taken)
        assert it.sent[1] == 200
        assert it.sent[0] <= 30  # 20 in a row say that there is no use, and those in flight then
        it.servers[0].says = GOOD
        assert it.pool.lanes[0].dispatcher.tripped == 1


@pytest.mark.parametrize("says", [NO_MODEL, Answer(400, NO_MODEL.body)])
async def test_what_all_refuse_is_failed_once_all_were_asked(says: Answer) -> None:
    async with bench(Server(says), Server(says), Server(says)) as it:
        it.pool.offer(many(1))
        await it.until_taken(1)
        assert it.sent == [1, 1, 1]
        assert it.taken[0].work.tries.attempts == 3
        it.pool.offer(many(200))
        await it.until_taken(201)
        assert all(result.kind == "error" for result in it.taken)
        assert max(it.sent) <= 40
        assert sum(lane.dispatcher.unsent for lane in it.pool.lanes) >= 100


async def test_one_that_is_away_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BASE", 0.01)
    monkeypatch.setattr(retry, "UNREACHABLE_CEILING", 0.02)
    async with bench(Server(AWAY), Server(GOOD), limit=16) as it:
        for _ in range(10):
            count = len(it.taken)
            it.pool.offer(many(100))
            await it.until_taken(count + 100)
        assert all(result.kind == "output" for result in it.taken)
        assert it.pool.lanes[0].dispatcher.down
        assert it.sent[0] < 150  # what was sent before it was known, and what finds out whether it is back
        assert it.sent[1] == 1_000
        it.servers[0].say(GOOD)
        sent = it.sent[0]

        def back() -> bool:
            if it.pool.ready < 16:
                it.pool.offer(many(50))
            return not it.pool.lanes[0].dispatcher.down

        await until(back)
        assert it.sent[0] > sent


async def test_one_that_always_fails_has_its_requests_tried_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BASE", 0.01)
    monkeypatch.setattr(retry, "CEILING", 0.02)
    async with bench(Server(Answer(500, b"broken")), Server(GOOD)) as it:
        it.pool.offer(many(100))
        await it.until_taken(100)
        assert all(result.kind == "output" for result in it.taken)
        assert max(result.work.tries.attempts for result in it.taken) == 2


async def test_what_stops_is_taken_from_all() -> None:
    stopped, other = shard(), shard()
    async with bench(Server(None), Server(None)) as it:
        it.pool.offer(many(20, of=stopped) + many(10, of=other))
        await until(lambda: it.sent == [4, 4])
        it.pool.stop_shards({stopped})
        it.pool.abort({stopped})
        await until(lambda: len(it.dropped) == 20)
        for server in it.servers:
            server.say(GOOD)
        await it.until_taken(10)
        assert {result.work.shard for result in it.taken} == {other}


async def test_a_defect_in_any_is_told() -> None:
    class Defective(Server):
        async def send(self, url: str, body: bytes | memoryview) -> Answer | Fault:
            raise ZeroDivisionError

    async with bench(Server(), Defective()) as it:
        it.pool.offer(many(4))
        with pytest.raises(ZeroDivisionError):
            async with asyncio.timeout(5):
                await it.pool.failed()


# With a worker, a database and servers that are reached over HTTP.


@asynccontextmanager
async def simulators(*behaviours: Behaviour) -> AsyncIterator[tuple[list[RunningSimulator], list[HttpUpstream]]]:
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(running_simulator(behaviour)) for behaviour in behaviours]
        upstreams = [HttpUpstream(simulator.url, timeout=30) for simulator in found]
        for upstream in upstreams:
            stack.push_async_callback(upstream.close)
        yield found, upstreams


def destinations(upstreams: Sequence[HttpUpstream], limit: int | None = None) -> list[Destination]:
    return [Destination(upstream=upstream, name=upstream.url, max_in_flight=limit) for upstream in upstreams]


def lines(count: int, model: str, mark: str = "r") -> list[bytes]:
    return [chat_line(f"{mark}{i}", f"{mark} prompt {i}", model=model) for i in range(count)]


async def test_replicas_share_a_batch_and_one_dies_in_the_middle_of_it(rig: Rig) -> None:
    behaviour = Behaviour(latency=0.02, concurrency=16)
    async with simulators(behaviour, behaviour) as (servers, upstreams), AsyncExitStack() as third:
        dies = await third.enter_async_context(running_simulator(behaviour))
        async with rig.working(destinations([*upstreams, HttpUpstream(dies.url)], 16)):
            id = await rig.create(await rig.upload(lines(3_000, "m")))
            await until(lambda: min(server.stats().received for server in (*servers, dies)) > 100)
            await third.aclose()
            row = await rig.ended(id)
        assert (row.status, row.completed, row.failed) == ("completed", 3_000, 0)
        assert min(server.stats().answered_ok_distinct for server in servers) > 800
    assert len({line["custom_id"] for line in await rig.lines(row.output_file)}) == 3_000


@pytest.mark.parametrize("mixed", [False, True])
async def test_a_model_whose_server_stands_still_holds_no_other_up(rig: Rig, mixed: bool) -> None:
    """What is read ahead is for each model's servers, however much more of another model was there first."""
    stands = Behaviour(latency=600, concurrency=0, models=("still",))
    goes = Behaviour(latency=0.005, concurrency=16, models=("quick",))
    async with simulators(stands, goes) as (servers, upstreams):
        async with rig.working(destinations(upstreams, 8), stop_grace=0.0) as worker:
            # Of the one that stands still there is more than may be held in memory.
            still = [chat_line(f"s{i}", f"{i} " + 16_000 * "s", model="still") for i in range(2_500)]
            quick = lines(600, "quick", "q")
            assert sum(map(len, still)) > OPEN_BYTES
            if mixed:
                ids = [await rig.create(await rig.upload(still + quick))]
            else:
                ids = [await rig.create(await rig.upload(still[i : i + 100])) for i in range(0, 2_500, 100)]
                await until(lambda: servers[0].stats().received >= 8)
                ids.append(await rig.create(await rig.upload(quick)))
            worker.wake()
            await until(lambda: servers[1].stats().answered_ok_distinct == 600, 20)
            row = await rig.until(ids[-1], lambda row: row.completed == 600)
            assert row.status == ("in_progress" if mixed else row.status)
        assert servers[0].stats().received == 8


async def test_the_prefix_caches_find_as_much_as_in_the_best_order(rig: Rig) -> None:
    count, kinds = 3_000, 50
    draw = random.Random(5)
    beginnings = ["".join(draw.choices("abcdefgh ", k=2_000)) for _ in range(kinds)]
    shuffled = [chat_line(str(i), f"{beginnings[i % kinds]} and question {i}") for i in range(count)]
    draw.shuffle(shuffled)
    behaviour = Behaviour(prefix_cache=256, latency=0.01, concurrency=0)
    async with simulators(behaviour, behaviour) as (servers, upstreams):
        async with rig.working(destinations(upstreams, 16)):
            row = await rig.ended(await rig.create(await rig.upload(shuffled)), timeout=60)
        stats = [server.stats() for server in servers]
    assert row.completed == count
    found = sum(one.cached_tokens for one in stats)
    async with simulators(behaviour) as (servers, upstreams):
        async with rig.working(destinations(upstreams, 16)):
            await rig.ended(
                await rig.create(await rig.upload(sorted(shuffled, key=lambda line: line[60:]))), timeout=60
            )
        alone = servers[0].stats().cached_tokens
    assert found >= 0.95 * alone
    assert min(one.received for one in stats) > 0.3 * count


async def test_what_a_server_comes_to_serve_is_noticed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "SURVEY", 0.05)
    first, second = Server(models=["a"]), Server(models=["b"])
    pair = [Destination(upstream=one, name=name, max_in_flight=4) for one, name in ((first, "x"), (second, "y"))]
    async with rig.working(pair):
        row = await rig.ended(await rig.create(await rig.upload(lines(200, "a"))))
        assert (row.completed, second.sent) == (200, [])
        second.served = ["a", "b"]
        deadline = time.monotonic() + 10
        while not second.sent:
            assert time.monotonic() < deadline
            await rig.ended(await rig.create(await rig.upload(lines(50, "a"))))
