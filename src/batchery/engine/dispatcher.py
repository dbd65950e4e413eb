"""The dispatcher: keeps the upstream's slots full.

Each slot is one task that takes a request, sends it, and decides by `retry` what its outcome means: a result for the
recorder, or another try later. Nothing waits for anything else: a slow request holds its own slot only, and a request
that waits for its next try holds none. How many slots work at a time is the limiter's to say and may change with every
answer; fewer never break off what is in flight.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from batchery.engine import retry
from batchery.engine.breaker import Breaker, Kind, is_permanent, refuses_model
from batchery.engine.health import AWAY, Health
from batchery.engine.limit import Limit
from batchery.engine.outcomes import failure, success, unsent_failure
from batchery.engine.quota import Quota
from batchery.engine.recorder import Recorder
from batchery.engine.waiting import Tally, Waiting
from batchery.engine.work import LeasedShard, Result, Work
from batchery.upstreams.base import Answer, Fault, Upstream

RETRY_SHARE = 0.5
"""The share of the slots that retries may take while there are requests that were never sent."""

UNSENT = 64
"""Requests in a row that are failed without being sent before others get the event loop."""


class Others(Protocol):
    """The other upstreams of a worker, which may have a request that this one cannot send or answer."""

    def move(self, here: Dispatcher, work: Work) -> bool: ...
    def again(self, here: Dispatcher, work: Work) -> None: ...
    def spare(self, here: Dispatcher) -> Work | None: ...
    def rescue(self, here: Dispatcher) -> None: ...


class Dispatcher:
    """Sends requests to one upstream for one worker.

    Args:
        upstream: where to.
        recorder: takes the results.
        limiter: says how many may be in flight.
        quota: says when the next may be sent.
        wanted: called when requests run low and more should be offered.
        dropped: called with a request that was given up unrecorded, because its batch has ended.
        others: the worker's other upstreams; None where this is the only one.
        leaves: called with a request that has failed, and whether there is no such model; it says whether it has taken
            the request back, because it is for another worker.

    Attributes:
        attempts: how many ended in which way: an HTTP status, or the kind of a fault.
        unsent: requests that were failed without being sent.
    """

    def __init__(
        self,
        upstream: Upstream,
        recorder: Recorder,
        limiter: Limit,
        quota: Quota,
        wanted: Callable[[], None],
        dropped: Callable[[Work], None],
        others: Others | None = None,
        leaves: Callable[[Work, bool], bool] = lambda *_: False,
    ) -> None:
        self.attempts: Counter[int | str] = Counter()
        self.unsent = 0
        self._upstream = upstream
        self._recorder = recorder
        self._limiter = limiter
        self._quota = quota
        self._health = Health()
        self._breaker = Breaker()
        self._cap: int | None = None
        self._wanted = wanted
        self._dropped = dropped
        self._others = others
        self._leaves = leaves
        self._ready: deque[Work] = deque()
        self._again: deque[Work] = deque()  # retries that are due
        self._retrying = 0
        self._idle: list[asyncio.Future[None]] = []
        self._tally = Tally()  # of what waits for another try, due or not
        self._waiting = Waiting(self._due, self._tally)
        self._hold: asyncio.TimerHandle | None = None
        self._in_flight: dict[asyncio.Task[None], Work] = {}
        self._slots: set[asyncio.Task[None]] = set()
        self._broken = asyncio.Event()
        self._defect: BaseException | None = None
        self._last_success = float("-inf")
        self._closing = False

    async def failed(self) -> None:
        """Return when a slot has come to an end by itself, which only a defect can cause.

        Raises:
            Exception: what ended it.
        """
        await self._broken.wait()
        assert self._defect is not None
        raise self._defect

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        limit, cap = self._limiter.limit, self._cap
        if self._health.down:
            limit = self._health.limit(limit)
        return limit if cap is None or cap > limit else cap

    @property
    def uncapped(self) -> int:
        """Requests that might be in flight if nobody else wanted the upstream, and it were well."""
        return self._limiter.limit

    def cap_at(self, cap: int | None) -> None:
        """Have no more than so many in flight from now on, at least 1, since others want the upstream; None: only the
        limit counts. What is in flight goes on."""
        self._cap = cap
        self._fill()

    @property
    def ready(self) -> int:
        """Requests that may be sent now."""
        return len(self._ready) + len(self._again)

    @property
    def fresh(self) -> int:
        """Those of them that were never sent here."""
        return len(self._ready)

    @property
    def waiting(self) -> int:
        """Requests waiting for another try."""
        return len(self._waiting)

    @property
    def waiting_of(self) -> Counter[str]:
        """By batch, how many wait for another try, or for a slot once that is due."""
        return self._tally.of

    @property
    def waiting_bytes(self) -> int:
        """What these take."""
        return self._tally.bytes

    @property
    def in_flight(self) -> int:
        """Requests sent and not yet answered."""
        return len(self._in_flight)

    @property
    def down(self) -> bool:
        """Whether the upstream is taken to be down."""
        return self._health.down

    @property
    def tripped(self) -> int:
        """How many kinds of requests are failed without being sent."""
        return self._breaker.tripped

    def offer(self, works: list[Work]) -> None:
        """More requests to send, in this order."""
        self._ready.extend(works)
        self._fill()

    def offer_again(self, work: Work) -> None:
        """A request to send that was sent before, here or elsewhere."""
        self._tally.add(work)
        self._again.append(work)
        self._fill()

    # For the other upstreams of the worker.

    def refuses(self, kind: Kind, now: float) -> bool:
        """Whether a request of this kind would be failed without being sent."""
        return self._breaker.watching and self._breaker.verdict(kind, now) is not None

    def wants_probe(self, now: float) -> bool:
        """Whether it is time to find out whether the upstream is back that was taken to be down."""
        return self._health.down and self.ready + len(self._in_flight) < self.limit and self._health.wait(now) <= 0

    @property
    def is_blocked(self) -> bool:
        """Whether nothing can be sent until an answer comes, or some time has passed."""
        return self._hold is not None or len(self._in_flight) >= self.limit

    @property
    def last_ready(self) -> Work | None:
        """The request that is to be sent last of those never sent."""
        return self._ready[-1] if self._ready else None

    def give_up_last(self) -> Work:
        """Leave that to another upstream."""
        return self._ready.pop()

    def give_up_all(self) -> list[tuple[Work, bool]]:
        """Leave all that is ready to others: each request, and whether it was sent before."""
        given = [*((work, False) for work in self._ready), *((work, True) for work in self._again)]
        for work in self._again:
            self._tally.remove(work)
        self._ready.clear()
        self._again.clear()
        return given

    def stop_shards(self, stopping: set[LeasedShard]) -> list[Work]:
        """Send nothing more of these shards; what is in flight goes on until `abort`. Returns what is not."""
        waiting = self._waiting.drop(stopping)
        for work in waiting:
            self._dropped(work)
        return self.withdraw(stopping) + waiting

    def withdraw(self, shards: set[LeasedShard], *, unsent: bool = False) -> list[Work]:
        """Take back what is ready to be sent of these shards, and drop it.

        Args:
            unsent: leave what was sent before and is due to be tried again.

        Returns:
            What was taken back.
        """
        taken: list[Work] = []
        for queue in (self._ready,) if unsent else (self._ready, self._again):
            works = list(queue)
            queue.clear()
            for work in works:
                if work.shard not in shards:
                    queue.append(work)
                    continue
                taken.append(work)
                if queue is self._again:
                    self._tally.remove(work)
        for work in taken:
            self._dropped(work)
        return taken

    def abort(self, stopping: set[LeasedShard]) -> None:
        """Break off what is in flight of these shards."""
        for task, work in list(self._in_flight.items()):
            if work.shard in stopping and not work.aborted:
                work.aborted = True
                task.cancel()

    async def close(self, grace: float) -> None:
        """Send nothing more; let what is in flight end, for at most `grace` seconds, and break off the rest."""
        self._closing = True
        self._wake(len(self._idle))
        if self._slots:
            await asyncio.wait(self._slots, timeout=grace)
        slots = list(self._slots)
        for slot in slots:
            slot.cancel()
        await asyncio.gather(*slots, return_exceptions=True)
        self._waiting.close()
        if self._hold is not None:
            self._hold.cancel()

    # Slots

    def _fill(self) -> None:
        """Let as many slots work as there is something to do for."""
        room = min(self.limit - len(self._in_flight), self.ready)
        if room <= 0 or self._closing:
            return
        woken = self._wake(room)
        while woken < room and len(self._slots) < self._limiter.limit:
            slot = asyncio.create_task(self._slot())
            self._slots.add(slot)
            slot.add_done_callback(self._slot_ended)
            woken += 1

    def _slot_ended(self, slot: asyncio.Task[None]) -> None:
        self._slots.discard(slot)
        if not slot.cancelled() and (error := slot.exception()) is not None:
            self._defect = error
            self._broken.set()

    def _wake(self, count: int) -> int:
        woken = 0
        while woken < count and self._idle:
            future = self._idle.pop()
            if not future.done():
                future.set_result(None)
                woken += 1
        return woken

    async def _slot(self) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        recorder, in_flight, quota = self._recorder, self._in_flight, self._quota
        clock, send = loop.time, self._upstream.send
        while not self._closing:
            if not recorder.has_room:
                await recorder.room()
                continue
            now = clock()
            limit = self.limit
            work = self._take(limit) if self._may_send(now, limit) else None
            if work is None:
                if not in_flight and not self.ready:
                    recorder.hurry()  # no other result is on its way
                future = loop.create_future()
                self._idle.append(future)
                await future
                continue
            if self._breaker.watching and (
                (reason := self._breaker.verdict(kind := (work.shard.model, work.url), now)) is not None
            ):
                if self._others is not None and self._others.move(self, work):
                    continue
                if self._leaves(work, self._breaker.refuses_model(kind)):
                    continue
                self._recorder.add(unsent_failure(work, reason))
                work.body = b""
                self.unsent += 1
                if self.unsent % UNSENT == 0:
                    await asyncio.sleep(0)
                continue
            tries = work.tries
            tries.attempts += 1
            again = tries.attempts > 1
            self._retrying += again
            if not again:
                work.since = now
            estimate = quota.sent(now, work.size) if quota.is_set else 0.0
            in_flight[task] = work
            try:
                outcome = await send(work.url, work.body)
            except asyncio.CancelledError:
                # A slot may be closed at the moment when its request is broken off; that cancellation must stand.
                if not work.aborted or task.uncancel() > 0:
                    raise
                self._dropped(work)
                continue
            finally:
                del in_flight[task]
                self._retrying -= again
            if work.aborted:
                # Its answer came at that very moment, and the cancellation had no effect.
                task.uncancel()
            self._settle(work, outcome, clock(), now, estimate)
            if (self._ready or self._again) and len(in_flight) + 1 < self.limit:
                self._fill()  # the limit has grown

    def _may_send(self, now: float, limit: int) -> bool:
        """Whether one more may be in flight; if it is only a matter of time, it is looked at again then."""
        if len(self._in_flight) >= limit:
            return False
        if not (self._quota.may_hold or self._health.down):
            return True
        wait = max(self._quota.wait(now), self._health.wait(now))
        if wait <= 0:
            return True
        if self._hold is None:
            self._hold = asyncio.get_running_loop().call_later(wait, self._held)
        return False

    def _held(self) -> None:
        self._hold = None
        self._fill()

    def _take(self, limit: int) -> Work | None:
        """The next request; None when there is none."""
        if self._again and (self._retrying < RETRY_SHARE * limit or not self._ready):
            work = self._again.popleft()
            self._tally.remove(work)
        elif self._ready:
            work = self._ready.popleft()
        else:
            self._wanted()
            return None if self._others is None else self._others.spare(self)
        if len(self._ready) < self.limit:
            self._wanted()
        return work

    # Outcomes

    def _settle(self, work: Work, outcome: Answer | Fault, now: float, began: float, estimate: float) -> None:
        """A request's attempt has ended: record it, or let it wait for the next."""
        result = self._learn(work, outcome, now, began, estimate)
        if result is not None:
            self._recorder.add(result)
            work.body = b""
            return
        if self._others is not None:
            if self._health.down:
                self._others.rescue(self)
            if is_permanent(outcome) and not work.shard.stopping and self._others.move(self, work):
                return
        if self._leaves(work, refuses_model(outcome, work.shard.model)):
            return
        tries = work.tries
        if retry.is_retryable(outcome):
            retry.note_failure(tries, outcome, others_succeeded=self._last_success > work.since)
            work.since = now
        again = retry.next_try(outcome, tries, now=time.time(), deadline=work.shard.deadline, draw=random.random)
        if again is None:
            self._recorder.add(failure(work, outcome))
            work.body = b""
        elif work.shard.stopping:
            self._dropped(work)
        else:
            self._waiting.add(work, again)

    def _due(self, works: list[Work]) -> None:
        """Queue requests whose next try has come."""
        if self._others is None:
            for work in works:
                self._tally.add(work)
            self._again.extend(works)
        else:
            for work in works:
                self._others.again(self, work)
        self._fill()

    def _learn(self, work: Work, outcome: Answer | Fault, now: float, began: float, estimate: float) -> Result | None:
        """Tell limiter, quota, health and breaker how an attempt ended; the result, if it was a good answer."""
        limiter, in_flight = self._limiter, len(self._in_flight) + 1
        if isinstance(outcome, Fault):
            self.attempts[outcome.kind] += 1
            self._breaker.failed((work.shard.model, work.url), outcome, now)
            if outcome.kind == "unreachable":
                self._health.failed(now)
            elif outcome.kind == "timeout":
                limiter.refused(now, began=began, in_flight=in_flight)
            return None
        status = outcome.status
        self.attempts[status] += 1
        if outcome.rate_limit is not None:
            self._quota.told(now, outcome.rate_limit)
        if 200 <= status < 300:
            self._last_success = now
            result = success(work, outcome)
            usage = result.usage
            if usage is None:
                limiter.answered(now, began=began, in_flight=in_flight, work=1.0)
            else:
                if estimate:
                    self._quota.answered(estimate, usage.input_tokens, usage.output_tokens)
                limiter.answered(
                    now, began=began, in_flight=in_flight, work=usage.output_tokens or usage.input_tokens or 1.0
                )
            self._health.succeeded(limiter.limit)
            if self._breaker.watching:
                self._breaker.succeeded((work.shard.model, work.url))
            return result
        self._breaker.failed((work.shard.model, work.url), outcome, now)
        if status in (429, 503):
            limiter.refused(now, began=began, in_flight=in_flight)
        elif status < 500:
            limiter.answered(now, began=began, in_flight=in_flight, work=1.0)
        if status in AWAY:
            self._health.failed(now)
        elif status != 429:
            self._health.succeeded(limiter.limit)
        return None
