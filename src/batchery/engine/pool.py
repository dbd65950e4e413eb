"""The pool: shares the requests of one worker out among its upstreams, each of which has a dispatcher of its own.

Upstreams may be replicas of one another or serve different models; which models one serves is asked of it now and then.
A request goes to one that serves its model. Of several, those whose prompts begin alike go to the same one (rendezvous
hashing by the upstreams' names, so that several workers agree), which has that beginning in its prefix cache; but not
beyond what that one can take, since no slot may be idle for the sake of a cache (consistent hashing with bounded
loads, Mirrokni, Thorup and Zadimoghaddam 2016). An upstream that is away is sent no more than finds out whether it is
back; what was queued for it goes to the others, and so does what it alone refuses. With one upstream none of this
costs anything.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from math import inf

import msgspec

from batchery.engine.dispatcher import Dispatcher
from batchery.engine.limit import FixedLimit
from batchery.engine.limiter import AdaptiveLimit
from batchery.engine.quota import Quota
from batchery.engine.recorder import Recorder
from batchery.engine.work import LeasedShard, Work
from batchery.engine.yielding import Yielding
from batchery.store.workers import UpstreamSnapshot
from batchery.upstreams.base import TellsLoad, Upstream
from batchery.wire.objects import Model

EXCESS = 1.25
"""How many more requests than its fair part one upstream may have queued because their prompts begin alike."""

AHEAD = 4
"""Requests that are read ahead for each that may be in flight; more are read when half of them are sent."""

MAX_KEYS = 10_000
"""Beginnings and models for which it is remembered where they go."""

MAX_TOLD, MAX_NAME = 500, 256
"""Models of one upstream that other workers are told of, and the characters of a name; the first in order of names. The
rest counts there as listed by nobody."""


class Destination(msgspec.Struct, frozen=True, kw_only=True):
    """An upstream, and how a worker uses it.

    Attributes:
        upstream: the inference server.
        name: what it is called in metrics and logs; workers that use the same upstreams call them the same.
        max_in_flight: requests there at once; None to find out how many are best.
        requests_per_minute, tokens_per_minute: what may be sent in any minute; None for no limit.
        yield_share: of what it works on that is given up at most while others wait there, 0 to 1.
    """

    upstream: Upstream
    name: str = ""
    max_in_flight: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    yield_share: float = 0.0


class Lane:
    """One upstream of a pool.

    Attributes:
        name: of the upstream.
        max_in_flight: as set; None where it is found.
        upstream: itself.
        dispatcher: what sends there.
        yielding: what makes room there for others; None for nothing.
        served: the models that it last said that it serves; None where it has never said.
        told: what other workers are told of that, as `UpstreamSnapshot.served`.
    """

    def __init__(self, destination: Destination, dispatcher: Dispatcher) -> None:
        self.name = destination.name
        self.max_in_flight = destination.max_in_flight
        self.upstream = destination.upstream
        self.dispatcher = dispatcher
        self.served: frozenset[str] | None = None
        self.told: list[str] | None = None
        self.yielding: Yielding | None = None
        if destination.yield_share and isinstance(destination.upstream, TellsLoad):
            self.yielding = Yielding(destination.upstream, dispatcher, destination.yield_share)

    @property
    def load(self) -> float:
        """Requests queued and in flight, relative to what may be in flight."""
        dispatcher = self.dispatcher
        return (dispatcher.ready + dispatcher.in_flight) / dispatcher.limit

    def lists(self, models: list[Model] | None) -> None:
        """It was asked what it serves; None: it was not there. One that does not say just now serves what it did."""
        if models:
            self.served = frozenset(model.id for model in models)
            # What others get is part of their queries, and not every database takes every character.
            self.told = sorted(id for id in self.served if len(id) <= MAX_NAME and id.isprintable())[:MAX_TOLD]
        elif models is not None and self.told is None:
            self.told = []

    def snapshot(self) -> UpstreamSnapshot:
        """What a worker says of it."""
        dispatcher = self.dispatcher
        load = None if self.yielding is None else self.yielding.load
        return UpstreamSnapshot(
            name=self.name,
            limit=dispatcher.uncapped,
            allowed=dispatcher.limit,
            in_flight=dispatcher.in_flight,
            attempts={str(outcome): count for outcome, count in dispatcher.attempts.items()},
            unsent=dispatcher.unsent,
            tripped=dispatcher.tripped,
            down=dispatcher.down,
            waiting=None if load is None else load.waiting,
            running=None if load is None else load.running,
            cache=None if load is None else load.cache,
            served=self.told,
        )


class Pool:
    """The upstreams of one worker.

    Args:
        destinations: at least one.
        recorder: takes the results.
        wanted: called when requests run low and more should be offered.
        dropped: called with a request that was given up unrecorded, because its batch has ended.
        leaves: called with a request that has failed, as `Dispatcher` does.

    Attributes:
        lanes: one for each.
    """

    def __init__(
        self,
        destinations: Sequence[Destination],
        recorder: Recorder,
        wanted: Callable[[], None],
        dropped: Callable[[Work], None],
        leaves: Callable[[Work, bool], bool] = lambda *_: False,
    ) -> None:
        others = self if len(destinations) > 1 else None
        self.lanes = [
            Lane(
                one,
                Dispatcher(
                    one.upstream,
                    recorder,
                    AdaptiveLimit() if one.max_in_flight is None else FixedLimit(one.max_in_flight),
                    Quota(one.requests_per_minute, one.tokens_per_minute),
                    wanted,
                    dropped,
                    others,
                    leaves,
                ),
            )
            for one in destinations
        ]
        self._first = self.lanes[0].dispatcher
        self._is_single = len(self.lanes) == 1
        self._lane_of = {lane.dispatcher: lane for lane in self.lanes}
        self._bits = {lane: 1 << place for place, lane in enumerate(self.lanes)}
        self._candidates: dict[str, list[Lane]] = {}
        self._orders: dict[tuple[str, int], list[Lane]] = {}

    # What it is doing.

    @property
    def is_single(self) -> bool:
        """Whether there is one upstream only, so that there is nothing to choose."""
        return self._is_single

    @property
    def limit(self) -> int:
        """Requests that may be in flight now, at all upstreams together."""
        return self._first.limit if self._is_single else sum(lane.dispatcher.limit for lane in self.lanes)

    @property
    def ready(self) -> int:
        """Requests read and not yet sent."""
        return sum(lane.dispatcher.ready for lane in self.lanes)

    @property
    def waiting(self) -> int:
        """Requests waiting for another try."""
        return sum(lane.dispatcher.waiting for lane in self.lanes)

    @property
    def waiting_of(self) -> Counter[str]:
        """By batch, how many requests wait for another try."""
        if self._is_single:
            return self._first.waiting_of
        return sum((lane.dispatcher.waiting_of for lane in self.lanes), Counter[str]())

    @property
    def waiting_bytes(self) -> int:
        """What these take."""
        return sum(lane.dispatcher.waiting_bytes for lane in self.lanes)

    @property
    def is_fed(self) -> bool:
        """Whether each upstream has enough to go on with for a while."""
        if self._is_single:
            return _is_fed(self._first)
        return all(_is_fed(lane.dispatcher) for lane in self.lanes)

    @property
    def is_hungry(self) -> bool:
        """Whether an upstream is about to run out of requests."""
        if self._is_single:
            return self._first.fresh < self._first.limit
        return any(lane.dispatcher.fresh < lane.dispatcher.limit for lane in self.lanes)

    @property
    def has_free_slots(self) -> bool:
        """Whether an upstream could be sent more at once than is there for it."""
        return any(_has_free_slots(lane.dispatcher) for lane in self.lanes)

    def full(self, models: Collection[str], *, ahead: bool = True) -> frozenset[str]:
        """Those models of which nothing more is to be read for now: all upstreams that serve them have enough.

        Args:
            ahead: whether that is enough for a while, or only for now.
        """
        if self._is_single:
            return frozenset()
        if ahead:
            wanted = {lane for lane in self.lanes if not _is_fed(lane.dispatcher)}
        else:
            wanted = {lane for lane in self.lanes if _has_free_slots(lane.dispatcher)}
        return frozenset(model for model in models if wanted.isdisjoint(self._serving(model)))

    def snapshots(self) -> list[UpstreamSnapshot]:
        """What a worker says of its upstreams."""
        return [lane.snapshot() for lane in self.lanes]

    async def failed(self) -> None:
        """Return when a slot has come to an end by itself, which only a defect can cause.

        Raises:
            Exception: what ended it.
        """
        waiting = [asyncio.create_task(lane.dispatcher.failed()) for lane in self.lanes]
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()
        finally:
            for one in waiting:
                one.cancel()

    # Requests in, and taken back.

    def offer(self, works: list[Work]) -> None:
        """More requests to send, in this order."""
        if self._is_single:
            self._first.offer(works)
            return
        parts: dict[Lane, list[Work]] = {}
        planned: Counter[Lane] = Counter()
        for work in works:
            lane = self._lane_for(work, planned)
            planned[lane] += 1
            parts.setdefault(lane, []).append(work)
        for lane, part in parts.items():
            lane.dispatcher.offer(part)

    def withdraw(self, shards: set[LeasedShard], *, unsent: bool = False) -> list[Work]:
        """Take back what is ready to be sent of these shards, and drop it; as `Dispatcher.withdraw`."""
        return [work for lane in self.lanes for work in lane.dispatcher.withdraw(shards, unsent=unsent)]

    def stop_shards(self, stopping: set[LeasedShard]) -> list[Work]:
        """Send nothing more of these shards; what is in flight goes on until `abort`. Returns what is not."""
        return [work for lane in self.lanes for work in lane.dispatcher.stop_shards(stopping)]

    def abort(self, stopping: set[LeasedShard]) -> None:
        """Break off what is in flight of these shards."""
        for lane in self.lanes:
            lane.dispatcher.abort(stopping)

    async def close(self, grace: float) -> None:
        """Send nothing more; let what is in flight end, for at most `grace` seconds, and break off the rest."""
        await asyncio.gather(*(lane.dispatcher.close(grace) for lane in self.lanes))

    # Requests that go over from one upstream to another, as their dispatchers ask.

    def move(self, here: Dispatcher, work: Work) -> bool:
        """Let another upstream have a request that this one gives, or would give, an answer that is final.

        Returns:
            Whether one takes it; each is asked once for a request.
        """
        work.passed |= self._bits[self._lane_of[here]]
        kind, now = (work.shard.model, work.url), asyncio.get_running_loop().time()
        open_to = [
            lane
            for lane in self._serving(work.shard.model)
            if not work.passed & self._bits[lane] and not lane.dispatcher.refuses(kind, now)
        ]
        if not open_to:
            return False
        min(open_to, key=_eagerness).dispatcher.offer([work])
        return True

    def again(self, here: Dispatcher, work: Work) -> None:
        """Queue a request whose next try has come: rather not where it has just failed."""
        lanes = [lane for lane in self._serving(work.shard.model) if not work.passed & self._bits[lane]]
        others = [lane for lane in lanes if lane.dispatcher is not here and not lane.dispatcher.down]
        chosen = min(others, key=_eagerness).dispatcher if others else here
        chosen.offer_again(work)

    def spare(self, here: Dispatcher) -> Work | None:
        """A request for an upstream that has nothing to do, from one that has more queued than it can send now."""
        lane = self._lane_of[here]
        for other in self.lanes:
            if other is not lane and other.dispatcher.is_blocked and (work := other.dispatcher.last_ready) is not None:
                if work.passed & self._bits[lane] or lane not in self._serving(work.shard.model):
                    continue
                return other.dispatcher.give_up_last()
        return None

    def rescue(self, here: Dispatcher) -> None:
        """An upstream is down: let others that are not have what is queued for it."""
        well = [lane for lane in self.lanes if not lane.dispatcher.down]
        if well:
            for work, tried in here.give_up_all():
                lanes = [lane for lane in self._serving(work.shard.model) if lane in well]
                chosen = min(lanes, key=_eagerness).dispatcher if lanes else here
                if tried:
                    chosen.offer_again(work)
                else:
                    chosen.offer([work])

    # Where a request goes.

    async def survey(self) -> bool:
        """Ask each upstream what it serves; whether one says something new."""
        before = [(lane.served, lane.told) for lane in self.lanes]
        found = await asyncio.gather(*(lane.upstream.models() for lane in self.lanes))
        for lane, models in zip(self.lanes, found, strict=True):
            lane.lists(models)
        self._candidates.clear()
        self._orders.clear()
        return before != [(lane.served, lane.told) for lane in self.lanes]

    @property
    def listed(self) -> frozenset[str]:
        """The models that the upstreams list."""
        return frozenset(model for lane in self.lanes for model in lane.served or ())

    @property
    def takes_any(self) -> bool:
        """Whether an upstream is there that has no list."""
        return any(lane.served is None and lane.told is not None for lane in self.lanes)

    @property
    def is_surveyed(self) -> bool:
        """Whether each upstream has been there to be asked."""
        return all(lane.told is not None for lane in self.lanes)

    def _serving(self, model: str) -> list[Lane]:
        """The upstreams for a model: those that say that they serve it; else those that say nothing; else all, as one
        of them may know it by another name."""
        found = self._candidates.get(model)
        if found is None:
            found = [lane for lane in self.lanes if lane.served is not None and model in lane.served]
            found = found or [lane for lane in self.lanes if lane.served is None] or self.lanes
            if len(self._candidates) >= MAX_KEYS:
                self._candidates.clear()
            self._candidates[model] = found
        return found

    def _lane_for(self, work: Work, planned: Counter[Lane]) -> Lane:
        """Where a request is to go, when so many more than are queued are already planned."""
        serving = self._serving(work.shard.model)
        if len(serving) == 1:
            return serving[0]
        now = asyncio.get_running_loop().time()
        for lane in serving:
            if lane.dispatcher.wants_probe(now) and not planned[lane]:
                return lane
        well = [lane for lane in serving if not lane.dispatcher.down] or serving
        loads = {lane: lane.load + planned[lane] / lane.dispatcher.limit for lane in well}
        if work.prefix:
            most = EXCESS * sum(loads.values()) / len(loads)
            for lane in self._order(work.shard.model, work.prefix, serving):
                if loads.get(lane, inf) <= most or loads.get(lane, inf) < 1:
                    return lane
        return min(loads, key=loads.__getitem__)

    def _order(self, model: str, prefix: int, serving: list[Lane]) -> list[Lane]:
        """The upstreams for a beginning, the one that should have it first."""
        order = self._orders.get((model, prefix))
        if order is None:
            if len(self._orders) >= MAX_KEYS:
                self._orders.clear()
            key = f"{prefix} ".encode()
            order = sorted(serving, key=lambda lane: blake2b(key + lane.name.encode(), digest_size=8).digest())
            self._orders[model, prefix] = order
        return order


async def list_models(upstreams: Sequence[Upstream]) -> list[Model]:
    """The models that some upstreams serve, each once."""
    told = await asyncio.gather(*(upstream.models() for upstream in upstreams))
    found: dict[str, Model] = {}
    for models in told:
        for model in models or ():
            found.setdefault(model.id, model)
    return list(found.values())


def _is_fed(dispatcher: Dispatcher) -> bool:
    # Retries that are due do not count, or those of a batch that only fails would keep everything else from being read.
    return dispatcher.fresh >= AHEAD * dispatcher.limit // 2


def _has_free_slots(dispatcher: Dispatcher) -> bool:
    return dispatcher.ready < dispatcher.limit - dispatcher.in_flight


def _eagerness(lane: Lane) -> tuple[bool, float]:
    """What to choose the least of: those that are down last, then by load."""
    return lane.dispatcher.down, lane.load
