"""A simulated upstream for limiters, as events in made-up time: what it can do may change under way.

There is always more to send, so the number in flight is the limit as far as the limiter has let it.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from batchery.engine.limit import Limit

Over = Literal["refuse", "queue", "slow"]
"""What happens to requests beyond the capacity: they get 429, wait for a slot, or all take longer the more there
are."""

Event = Literal["done", "arrived", "refused"]

ROUND_TRIP = 0.001


@dataclass
class Course:
    """What came of it.

    Attributes:
        answered: in each second.
        refused: likewise.
        limits: the limit at the end of each second.
    """

    answered: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)

    def rate(self, start: int, end: int) -> float:
        """Answers a second between two seconds."""
        return sum(self.answered[start:end]) / (end - start)

    @property
    def wasted(self) -> float:
        """The share of calls that were refused."""
        return sum(self.refused) / (sum(self.answered) + sum(self.refused))


def run(
    limiter: Limit,
    seconds: int,
    *,
    over: Over,
    capacity: Callable[[float], int],
    latency: Callable[[random.Random], float],
    seed: int = 1,
    transit: float = 0.0,
    refusal: float = ROUND_TRIP,
) -> Course:
    """Let a limiter work on an upstream.

    Args:
        limiter: whose limit is kept to.
        seconds: for how long.
        over: what happens to requests beyond the capacity.
        capacity: at a time; for `slow`, the number in flight at which answers take twice as long.
        latency: draws how long a request takes that is not hindered, in seconds.
        seed: of the draws.
        transit: seconds that an answer takes at most to arrive, when its slot is already free.
        refusal: seconds until a request is refused.
    """
    draw = random.Random(seed)
    course = Course([0] * seconds, [0] * seconds, [0] * seconds)
    order = itertools.count()
    events: list[tuple[float, int, Event, float]] = []
    waiting: deque[float] = deque()
    now, in_flight, busy = 0.0, 0, 0

    def work(began: float) -> None:
        nonlocal busy
        busy += 1
        takes = latency(draw) * (1 + busy / capacity(now) if over == "slow" else 1)
        heapq.heappush(events, (now + takes, next(order), "done", began))

    while True:
        while in_flight < limiter.limit:
            in_flight += 1
            if over == "slow" or busy < capacity(now):
                work(now)
            elif over == "queue":
                waiting.append(now)
            else:
                heapq.heappush(events, (now + refusal, next(order), "refused", now))
        now, _, event, began = heapq.heappop(events)
        if now >= seconds:
            return course
        course.limits[int(now)] = limiter.limit
        if event == "done":
            busy -= 1
            while waiting and busy < capacity(now):
                work(waiting.popleft())
            if transit:
                heapq.heappush(events, (now + draw.random() * transit, next(order), "arrived", began))
                continue
        if event == "refused":
            course.refused[int(now)] += 1
            limiter.refused(now, began=began, in_flight=in_flight)
        else:
            course.answered[int(now)] += 1
            limiter.answered(now, began=began, in_flight=in_flight, work=1.0)
        in_flight -= 1
