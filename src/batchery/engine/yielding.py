"""Yielding: how many requests batch work keeps in flight at an engine that others use too.

Batch work can wait, somebody at a keyboard cannot. An engine that has room works on a request at once; where some wait,
or its cache is full, batch work steps back by as many as are in the way, and comes back when none waits any more. What
waits in an engine's queue does no work, so an engine that only batches use loses nothing by it, and a request of
somebody else finds no queue before it. How far batch work steps back is its operator's to say.

`Level` decides and is pure. It must never ask an engine that tells nothing more than now and then, nor one that has
nothing of ours to do.
"""

from __future__ import annotations

import asyncio
import math

from batchery.engine.dispatcher import Dispatcher
from batchery.upstreams.base import Load, TellsLoad

LOOK = 0.5
"""Seconds between looks at an engine."""

MUTE = 30.0
"""Seconds until an engine is asked again that told nothing."""

SLACK = 0.02
"""Requests that may wait, relative to those that run: a request that has only just come waits for a moment."""

LEAST_PART = 0.5
"""The part of what waits that batch work steps back by, however little of it is its own."""

FULL = 0.95
"""The used share of a cache from which engines begin to throw requests out of it, and do their work twice."""

EASED = 0.9
"""What is left in flight at a look while the cache is full."""

FIRST_RISE, LARGEST_RISE = 0.02, 0.5
"""How much more may be in flight at the first look at which nobody waits, relative to what there is; twice as much at
each further one, so that little is too much where others stay, and what they leave is soon in use."""


class Level:
    """How many requests may be in flight, by what an engine tells.

    Args:
        share: of what the engine works on that is given up at most, 0 to 1; with 1, one request is left.

    Attributes:
        cap: requests that may be in flight; None where only the limit counts.
    """

    def __init__(self, share: float) -> None:
        self.cap: int | None = None
        self._share = share
        self._rise = FIRST_RISE

    def look(self, load: Load | None, *, limit: int, in_flight: int) -> int | None:
        """Take a look.

        Args:
            load: what the engine tells; None where it tells nothing.
            limit: requests that might be in flight if nobody else were there.
            in_flight: those of ours that there are.

        Returns:
            The new cap.
        """
        if load is None:
            self.cap = None
            return None
        running = load.running
        slack = max(1, round(SLACK * (in_flight if running is None else running)))
        if load.waiting > slack:
            # As many as wait are too many; of those, as many are ours as of all there are, so that several workers
            # that see the same do not all go for it. While what is in flight comes to its end, it falls together with
            # what waits; so this says the same until that has had its effect.
            everybody = in_flight if running is None else max(in_flight, running + load.waiting)
            ours = max(LEAST_PART, in_flight / max(1, everybody))
            self._fall(in_flight - math.ceil(load.waiting * ours), limit, running)
        elif load.cache is not None and load.cache >= FULL:
            self._fall(int(in_flight * EASED), limit, running)
        elif self.cap is not None and load.waiting == 0:
            self.cap = max(self.cap + 1, int(self.cap * (1.0 + self._rise)))
            self._rise = min(LARGEST_RISE, 2 * self._rise)
        else:
            self._rise = FIRST_RISE
        if self.cap is not None and self.cap >= limit:
            self.cap = None
        return self.cap

    def _fall(self, wanted: int, limit: int, running: int | None) -> None:
        least = max(1, round((1.0 - self._share) * (limit if running is None else min(limit, running))))
        self.cap = max(least, wanted if self.cap is None else min(wanted, self.cap))
        self._rise = FIRST_RISE


class Yielding:
    """Looks at an engine, and lets a dispatcher step back.

    Args:
        upstream: the engine.
        dispatcher: what sends to it.
        share: as for `Level`.

    Attributes:
        load: what the engine told last; None where it told nothing.
    """

    def __init__(self, upstream: TellsLoad, dispatcher: Dispatcher, share: float) -> None:
        self.load: Load | None = None
        self._upstream = upstream
        self._dispatcher = dispatcher
        self._level = Level(share)
        self._mute_until = float("-inf")

    async def look(self) -> bool:
        """Take a look; a role of the worker."""
        dispatcher = self._dispatcher
        now = asyncio.get_running_loop().time()
        if (dispatcher.in_flight == 0 and self._level.cap is None) or now < self._mute_until:
            return False
        self.load = load = await self._upstream.load()
        if load is None:
            self._mute_until = now + MUTE
        dispatcher.cap_at(self._level.look(load, limit=dispatcher.uncapped, in_flight=dispatcher.in_flight))
        return False
