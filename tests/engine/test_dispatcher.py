"""The dispatcher: slots stay full, and none is lost whenever a request is broken off."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from batchery.engine import retry
from batchery.engine.dispatcher import Dispatcher
from batchery.engine.limit import FixedLimit
from batchery.engine.quota import Quota
from batchery.engine.recorder import Recorder
from batchery.engine.work import LeasedShard, Result, Work
from batchery.store.database import Database
from batchery.store.shards import ShardRow
from batchery.upstreams.base import Answer, Fault
from batchery.wire.objects import Model

GOOD = Answer(200, b"{}")


class Upstream:
    """Holds every request until it is told what becomes of it.

    Args:
        deaf: whether a request that is cancelled answers all the same, as one does whose answer has just come.
    """

    def __init__(self, *, deaf: bool = False) -> None:
        self.deaf = deaf
        self.waiting: dict[bytes, asyncio.Future[Answer | Fault]] = {}
        self.sent: list[bytes] = []

    async def send(self, url: str, body: bytes | memoryview) -> Answer | Fault:
        name = bytes(body)
        self.sent.append(name)
        self.waiting[name] = asyncio.get_running_loop().create_future()
        try:
            return await self.waiting[name]
        except asyncio.CancelledError:
            if self.deaf:
                return GOOD
            raise
        finally:
            del self.waiting[name]

    async def models(self) -> list[Model]:
        return []

    async def close(self) -> None:
        pass


class Results(Recorder):
    """A recorder that only takes down what it is given."""

    def __init__(self) -> None:
        super().__init__(Database("sqlite+aiosqlite:////nowhere/a.db"), "w", 10.0, lambda _: None, lambda *_: None)
        self.taken: list[Result] = []
        self.hurried_at: list[int] = []

    def hurry(self) -> None:
        self.hurried_at.append(len(self.taken))

    def add(self, result: Result) -> None:
        self.taken.append(result)


class Bench:
    """A dispatcher between a fake upstream and a fake recorder."""

    def __init__(self, upstream: Upstream, limit: FixedLimit) -> None:
        self.upstream = upstream
        self.results = Results()
        self.wanted = 0
        self.dropped: list[Work] = []
        self.dispatcher = Dispatcher(upstream, self.results, limit, Quota(), self._want, self.dropped.append)

    def _want(self) -> None:
        self.wanted += 1

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@asynccontextmanager
async def bench(limit: int | FixedLimit = 2, *, deaf: bool = False) -> AsyncIterator[Bench]:
    made = Bench(Upstream(deaf=deaf), FixedLimit(limit) if isinstance(limit, int) else limit)
    yield made
    await made.dispatcher.close(0.0)


def shard(deadline: float = 1000.0) -> LeasedShard:
    row = ShardRow(
        id=1,
        batch_id="b" * 32,
        model="m",
        deadline=int(time.time() + deadline),
        requests=array("I", range(100)).tobytes(),
        done=None,
        lease_owner="w",
        lease_until=0.0,
        epoch=1,
    )
    return LeasedShard(row)


def works(of: LeasedShard, *names: str) -> list[Work]:
    return [
        Work(of, i, i, custom_id=name, url="/v1/embeddings", body=name.encode(), size=len(name))
        for i, name in enumerate(names)
    ]


async def test_requests_go_out_in_order_as_slots_come_free() -> None:
    async with bench(limit=2) as it:
        one = shard()
        it.dispatcher.offer(works(one, "a", "b", "c", "d"))
        await it.until(lambda: it.upstream.sent == [b"a", b"b"])
        assert (it.dispatcher.ready, it.dispatcher.in_flight) == (2, 2)
        it.upstream.waiting[b"b"].set_result(GOOD)  # a slow one idles no other slot
        await it.until(lambda: it.upstream.sent == [b"a", b"b", b"c"])
        assert [result.work.custom_id for result in it.results.taken] == ["b"]
        assert it.wanted > 0


async def test_a_request_that_waits_for_another_try_holds_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BASE", 0.01)
    async with bench(limit=1) as it:
        it.dispatcher.offer(works(shard(), "a", "b"))
        await it.until(lambda: b"a" in it.upstream.waiting)
        it.upstream.waiting[b"a"].set_result(Answer(503, b"", retry_after=0.05))
        await it.until(lambda: b"b" in it.upstream.waiting)
        assert it.dispatcher.waiting == 1
        it.upstream.waiting[b"b"].set_result(GOOD)
        await it.until(lambda: b"a" in it.upstream.waiting)
        it.upstream.waiting[b"a"].set_result(GOOD)
        await it.until(lambda: len(it.results.taken) == 2)
        assert [result.work.tries.attempts for result in it.results.taken] == [1, 2]


async def test_a_request_does_not_wait_longer_because_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BASE", 0.0)
    clock = time.time
    async with bench(limit=1) as it:
        it.dispatcher.offer(works(shard(), "a"))
        await it.until(lambda: b"a" in it.upstream.waiting)
        it.upstream.waiting[b"a"].set_result(Answer(503, b"", retry_after=0.05))
        await it.until(lambda: it.dispatcher.waiting == 1)
        monkeypatch.setattr(time, "time", lambda: clock() - 3_600)
        await it.until(lambda: it.upstream.sent == [b"a", b"a"])


async def test_all_slots_go_to_retries_once_the_limit_grows_and_nothing_else_is_left() -> None:
    """As at the end of a batch, when an upstream that was down comes back: the first answers make room for the rest."""
    limit = FixedLimit(1)
    async with bench(limit) as it:
        for work in works(shard(), "a", "b", "c", "d"):
            it.dispatcher.offer_again(work)
        await it.until(lambda: it.upstream.sent == [b"a"])
        limit.limit = 3
        it.upstream.waiting[b"a"].set_result(GOOD)
        await it.until(lambda: it.upstream.sent == [b"a", b"b", b"c", b"d"])


async def test_what_is_stopped_is_given_up_wherever_it_is() -> None:
    async with bench(limit=1) as it:
        stopped, other = shard(), shard()
        it.dispatcher.offer(works(stopped, "flying", "waiting", "ready") + works(other, "other"))
        await it.until(lambda: b"flying" in it.upstream.waiting)
        it.upstream.waiting[b"flying"].set_result(Answer(429, b"", retry_after=60.0))
        await it.until(lambda: b"waiting" in it.upstream.waiting)
        stopped.stopping = True
        it.dispatcher.stop_shards({stopped})
        assert sorted(work.custom_id for work in it.dropped) == ["flying", "ready"]
        assert (it.dispatcher.waiting, it.dispatcher.ready) == (0, 1)
        it.upstream.waiting[b"waiting"].set_result(Fault("broken", ""))  # and is not tried again
        await it.until(lambda: len(it.dropped) == 3)
        await it.until(lambda: b"other" in it.upstream.waiting)
        assert it.results.taken == []


async def test_a_good_answer_in_the_grace_is_kept() -> None:
    async with bench() as it:
        stopped = shard()
        it.dispatcher.offer(works(stopped, "a"))
        await it.until(lambda: b"a" in it.upstream.waiting)
        stopped.stopping = True
        it.dispatcher.stop_shards({stopped})
        it.upstream.waiting[b"a"].set_result(GOOD)
        await it.until(lambda: len(it.results.taken) == 1)
        assert it.dropped == []


@pytest.mark.parametrize("deaf", [False, True])
async def test_no_slot_is_lost_by_breaking_off(deaf: bool) -> None:
    async with bench(limit=3, deaf=deaf) as it:
        for round in range(4):
            broken, other = shard(), shard()
            names = [f"{round}-{i}" for i in range(2)]
            it.dispatcher.offer(works(broken, *names) + works(other, f"{round}-other"))
            await it.until(lambda: len(it.upstream.waiting) == 3)
            broken.stopping = True
            it.dispatcher.stop_shards({broken})
            it.dispatcher.abort({broken})
            it.dispatcher.abort({broken})  # as often as somebody looks
            await it.until(lambda: len(it.upstream.waiting) == 1)
            it.upstream.waiting[f"{round}-other".encode()].set_result(GOOD)
            await it.until(lambda: it.dispatcher.in_flight == 0)
            it.upstream.deaf = deaf and round % 2 == 1
        assert len(it.dropped) + len(it.results.taken) == 12
        assert not any(slot.done() for slot in it.dispatcher._slots)


async def test_results_are_recorded_at_once_when_no_other_is_on_its_way() -> None:
    async with bench(limit=2) as it:
        it.dispatcher.offer(works(shard(), "a", "b", "c"))
        await it.until(lambda: len(it.upstream.waiting) == 2)
        it.upstream.waiting[b"a"].set_result(GOOD)
        await it.until(lambda: b"c" in it.upstream.waiting)
        it.upstream.waiting[b"b"].set_result(GOOD)
        await it.until(lambda: len(it.results.taken) == 2)
        assert it.results.hurried_at == []
        it.upstream.waiting[b"c"].set_result(GOOD)
        await it.until(lambda: it.results.hurried_at == [3])


async def test_closing_lets_what_is_in_flight_end_and_breaks_off_the_rest() -> None:
    async with bench(limit=2) as it:
        it.dispatcher.offer(works(shard(), "quick", "slow", "never"))
        await it.until(lambda: len(it.upstream.waiting) == 2)
        closing = asyncio.create_task(it.dispatcher.close(0.2))
        await asyncio.sleep(0)
        it.upstream.waiting[b"quick"].set_result(GOOD)
        async with asyncio.timeout(5):
            await closing
        assert it.upstream.sent == [b"quick", b"slow"]
        assert [result.work.custom_id for result in it.results.taken] == ["quick"]
        assert it.dispatcher.in_flight == 0


async def test_a_defect_in_a_slot_is_reported() -> None:
    class Broken(Upstream):
        async def send(self, url: str, body: bytes | memoryview) -> Answer | Fault:
            raise ZeroDivisionError

    it = Bench(Broken(), FixedLimit(2))
    it.dispatcher.offer(works(shard(), "a"))
    async with asyncio.timeout(5):
        with pytest.raises(ZeroDivisionError):
            await it.dispatcher.failed()
    await it.dispatcher.close(0.0)
