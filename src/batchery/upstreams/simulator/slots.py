"""The slots in which requests are worked on, and the queue before them, first come, first served.

It knows nothing of HTTP or time: it only says when a request's turn has come. It must never start one out of order, nor
let a request that has gone keep its slot.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Slots(Generic[T]):
    """A limited number of slots.

    Args:
        limit: requests that may hold a slot at once; 0: any number. It may be set anew: who holds a slot keeps it.
        start: called with each request as it gets its slot; it may call `leave` at once.
    """

    def __init__(self, limit: int, start: Callable[[T], None]) -> None:
        self.limit = limit
        self._start = start
        self._queue: OrderedDict[T, None] = OrderedDict()
        self._admitting = False
        self.in_flight = 0
        self.peak = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def full(self) -> bool:
        """Whether a request that entered now would have to wait."""
        return bool(self._queue) or 0 < self.limit <= self.in_flight

    def enter(self, request: T) -> None:
        """Start a request, or let it wait for its turn."""
        if self.full:
            self._queue[request] = None
        else:
            self._occupy(request)

    def leave(self) -> None:
        """Give a slot back, and start who waits for it."""
        self.in_flight -= 1
        self.admit()

    def admit(self) -> None:
        """Start who waits, as far as there are slots."""
        if self._admitting or not self._queue:
            return
        # A started request may leave at once; the loop below then goes on, instead of one call inside another for each.
        self._admitting = True
        try:
            while self._queue and not 0 < self.limit <= self.in_flight:
                self._occupy(self._queue.popitem(last=False)[0])
        finally:
            self._admitting = False

    def withdraw(self, request: T) -> bool:
        """Take a request out of the queue; False where it does not wait there."""
        if request not in self._queue:
            return False
        del self._queue[request]
        return True

    def _occupy(self, request: T) -> None:
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        self._start(request)
