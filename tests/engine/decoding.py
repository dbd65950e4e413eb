"""A simulated model server for limiters, in made-up time: all requests that it works on get their next token together.

A step takes longer the more there are, so tokens a second grow with their number, but ever less; beyond the most that
it works on at a time, requests wait. So it is with vLLM and its kin.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable

from batchery.engine.limit import Limit


def decode(
    limiter: Limit,
    seconds: int,
    *,
    places: Callable[[float], int],
    step: float,
    each: float,
    tokens: float,
    spread: float,
    seed: int = 1,
) -> tuple[list[float], list[int]]:
    """Let a limiter work on it, with always more to send.

    Args:
        limiter: whose limit is kept to.
        seconds: for how long.
        places: requests worked on at a time, at a time.
        step: seconds that a step takes, and
        each: how much longer for each request in it.
        tokens: of an answer, in the mean; their number is distributed log-normally.
        spread: of the logarithm of that.
        seed: of the draws.

    Returns:
        For each second: the tokens of the answers that came, and the limit.
    """
    draw = random.Random(seed)
    done, limits = [0.0] * seconds, [0] * seconds
    running: list[tuple[float, float, float]] = []  # at which step each ends, when it was sent, and its tokens
    waiting: deque[float] = deque()
    now, steps, in_flight = 0.0, 0.0, 0

    def begin(sent: float) -> None:
        size = draw.lognormvariate(math.log(tokens) - spread * spread / 2, spread)
        heapq.heappush(running, (steps + size, sent, size))

    while True:
        while in_flight < limiter.limit:
            in_flight += 1
            if len(running) < places(now):
                begin(now)
            else:
                waiting.append(now)
        end, sent, size = running[0]
        now += (end - steps) * (step + each * len(running))
        if now >= seconds:
            return done, limits
        steps = end
        heapq.heappop(running)
        while waiting and len(running) < places(now):
            begin(waiting.popleft())
        done[int(now)] += size
        limits[int(now)] = limiter.limit
        limiter.answered(now, began=sent, in_flight=in_flight, work=size)
        in_flight -= 1
