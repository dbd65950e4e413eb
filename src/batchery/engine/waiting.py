"""Requests that wait for another try: which, of what batches, and when they are due."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import Counter
from collections.abc import Callable

from batchery.engine.work import LeasedShard, Work


class Tally:
    """What requests that are held for another try come to.

    Attributes:
        of: by batch, how many there are.
        bytes: what they take.
    """

    def __init__(self) -> None:
        self.of: Counter[str] = Counter()
        self.bytes = 0

    def add(self, work: Work) -> None:
        """One more."""
        self.of[work.shard.batch_id] += 1
        self.bytes += work.size

    def remove(self, work: Work) -> None:
        """One less."""
        batch = work.shard.batch_id
        self.of[batch] -= 1
        if not self.of[batch]:
            del self.of[batch]
        self.bytes -= work.size


class Waiting:
    """Holds requests until they are due.

    Args:
        due: called with some, in the order in which they were due.
        tally: counts them for as long as they are here.
    """

    def __init__(self, due: Callable[[list[Work]], None], tally: Tally) -> None:
        self._due = due
        self._tally = tally
        # By the event loop's clock: the computer's own may be set back, and nothing is to wait for that.
        self._heap: list[tuple[float, int, Work]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, work: Work, when: float) -> None:
        """Hold a request.

        Args:
            work: the request.
            when: it is due, Unix seconds.
        """
        due = asyncio.get_running_loop().time() + when - time.time()
        heapq.heappush(self._heap, (due, next(self._order), work))
        self._tally.add(work)
        self._set_timer()

    def drop(self, shards: set[LeasedShard]) -> list[Work]:
        """Let go of those of some shards, and give them back."""
        dropped = [work for _, _, work in self._heap if work.shard in shards]
        if dropped:
            self._heap = [entry for entry in self._heap if entry[2].shard not in shards]
            heapq.heapify(self._heap)
            for work in dropped:
                self._tally.remove(work)
            self._set_timer()
        return dropped

    def close(self) -> None:
        """Wake for nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        self.close()
        if self._heap:
            self._timer = asyncio.get_running_loop().call_at(self._heap[0][0], self._wake)

    def _wake(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        found = []
        while self._heap and self._heap[0][0] <= now:
            work = heapq.heappop(self._heap)[2]
            self._tally.remove(work)
            found.append(work)
        self._set_timer()
        if found:
            self._due(found)
