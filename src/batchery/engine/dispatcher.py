"""The dispatcher: keeps the upstream's slots full.

Each slot is one task that takes a request, sends it, and decides by `retry` what its outcome means: a result for the
recorder, or another try later. Nothing waits for anything else: a slow request holds its own slot only, and a request
that waits for its next try holds none.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Callable

from batchery.engine import retry
from batchery.engine.recorder import Recorder
from batchery.engine.work import LeasedShard, Result, Work
from batchery.upstreams.base import Answer, Fault, Upstream
from batchery.wire import ids
from batchery.wire.results import (
    Failure,
    InvalidBody,
    check_answer,
    error_body,
    failure_line,
    failure_of,
    success_line,
)

FAULT_CODES = {
    "timeout": "upstream_timeout",
    "unreachable": "upstream_unreachable",
    "broken": "upstream_unreachable",
}


class Dispatcher:
    """Sends requests for one worker.

    Args:
        upstream: where to.
        recorder: takes the results.
        limit: requests in flight at most.
        wanted: called when requests run low and more should be offered.
        dropped: called with a request that was given up unrecorded, because its batch has ended.
    """

    def __init__(
        self,
        upstream: Upstream,
        recorder: Recorder,
        limit: int,
        wanted: Callable[[], None],
        dropped: Callable[[Work], None],
    ) -> None:
        self.limit = limit
        self._upstream = upstream
        self._recorder = recorder
        self._wanted = wanted
        self._dropped = dropped
        self._ready: deque[Work] = deque()
        self._idle: list[asyncio.Future[None]] = []
        self._waiting: list[tuple[float, int, Work]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._in_flight: dict[asyncio.Task[None], Work] = {}
        self._slots: list[asyncio.Task[None]] = []
        self._last_success = float("-inf")
        self._closing = False

    def start(self) -> None:
        """Open the slots."""
        self._slots = [asyncio.create_task(self._slot()) for _ in range(self.limit)]

    async def failed(self) -> None:
        """Return when a slot has come to an end by itself, which only a defect can cause.

        Raises:
            Exception: what ended it.
        """
        done, _ = await asyncio.wait(self._slots, return_when=asyncio.FIRST_EXCEPTION)
        for slot in done:
            slot.result()

    @property
    def ready(self) -> int:
        """Requests read and not yet sent."""
        return len(self._ready)

    @property
    def waiting(self) -> int:
        """Requests waiting for another try."""
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """Requests sent and not yet answered."""
        return len(self._in_flight)

    def offer(self, works: list[Work]) -> None:
        """More requests to send, in this order."""
        self._ready.extend(works)
        self._wake(len(works))

    def stop_shards(self, stopping: set[LeasedShard]) -> None:
        """Send nothing more of these shards; what is in flight goes on until `abort`."""
        for work in [work for work in self._ready if work.shard in stopping]:
            self._ready.remove(work)
            self._dropped(work)
        kept = []
        for entry in self._waiting:
            if entry[2].shard in stopping:
                self._dropped(entry[2])
            else:
                kept.append(entry)
        heapq.heapify(kept)
        self._waiting = kept

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
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()

    def _wake(self, count: int) -> None:
        while count > 0 and self._idle:
            future = self._idle.pop()
            if not future.done():
                future.set_result(None)
                count -= 1

    async def _slot(self) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        ready, recorder = self._ready, self._recorder
        while not self._closing:
            if not recorder.has_room:
                await recorder.room()
                continue
            if not ready:
                future = loop.create_future()
                self._idle.append(future)
                self._wanted()
                await future
                continue
            work = ready.popleft()
            if len(ready) < self.limit:
                self._wanted()
            work.tries.attempts += 1
            if work.tries.attempts == 1:
                work.since = loop.time()
            self._in_flight[task] = work
            try:
                outcome = await self._upstream.send(work.url, work.body)
            except asyncio.CancelledError:
                # A slot may be closed at the moment when its request is broken off; that cancellation must stand.
                if not work.aborted or task.uncancel() > 0:
                    raise
                self._dropped(work)
                continue
            finally:
                del self._in_flight[task]
            if work.aborted:
                # Its answer came at that very moment, and the cancellation had no effect.
                task.uncancel()
            self._settle(work, outcome)

    def _settle(self, work: Work, outcome: Answer | Fault) -> None:
        """A request's attempt has ended: record it, or let it wait for the next."""
        if isinstance(outcome, Answer) and 200 <= outcome.status < 300:
            self._last_success = asyncio.get_running_loop().time()
            self._recorder.add(success(work, outcome))
            work.body = b""
            return
        tries = work.tries
        if retry.is_retryable(outcome):
            retry.note_failure(tries, outcome, others_succeeded=self._last_success > work.since)
            work.since = asyncio.get_running_loop().time()
        again = retry.next_try(outcome, tries, now=time.time(), deadline=work.shard.deadline, draw=random.random)
        if again is None:
            self._recorder.add(failure(work, outcome))
            work.body = b""
        elif work.shard.stopping:
            self._dropped(work)
        else:
            heapq.heappush(self._waiting, (again, next(self._order), work))
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            delay = max(0.0, self._waiting[0][0] - time.time())
            self._timer = asyncio.get_running_loop().call_later(delay, self._due)

    def _due(self) -> None:
        """Move requests whose next try has come to the front of the queue."""
        self._timer = None
        now = time.time()
        due = []
        while self._waiting and self._waiting[0][0] <= now:
            due.append(heapq.heappop(self._waiting)[2])
        self._ready.extendleft(reversed(due))
        self._wake(len(due))
        self._set_timer()


def success(work: Work, answer: Answer) -> Result:
    """The result of a 2xx answer: an output line, or, when it is not JSON, a final failure."""
    id = ids.request_id(work.shard.batch_id, work.request)
    request_id = answer.request_id or id
    try:
        body, usage = check_answer(answer.body)
    except InvalidBody as error:
        line = failure_line(
            id,
            work.custom_id,
            Failure("invalid_upstream_response", f"The upstream answered {answer.status}, but {error}."),
            status=answer.status,
            request_id=request_id,
            body=error_body(answer.body),
        )
        return Result(work, "error", line, None)
    return Result(work, "output", success_line(id, work.custom_id, answer.status, request_id, body), usage)


def failure(work: Work, outcome: Answer | Fault) -> Result:
    """The result of an outcome that is not tried again."""
    id = ids.request_id(work.shard.batch_id, work.request)
    if isinstance(outcome, Fault):
        cause = Failure(FAULT_CODES[outcome.kind], outcome.message)
        return Result(work, "error", failure_line(id, work.custom_id, cause), None)
    line = failure_line(
        id,
        work.custom_id,
        failure_of(outcome.status, outcome.body),
        status=outcome.status,
        request_id=outcome.request_id or id,
        body=error_body(outcome.body),
    )
    return Result(work, "error", line, None)
