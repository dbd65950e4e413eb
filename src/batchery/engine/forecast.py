"""When running batches are expected to be done: from how fast results have come in, and the turns that batches get.

Three parts. `groups` tells apart the batches of which no upstream serves both: each group has a pace of its own. `Pace`
says how many results a second come in, from what has been recorded since the run began or in the last minute; `ends`
lets all batches go on at that pace, shared as the scheduler shares. Pure: the clock is an argument.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence

import msgspec

from batchery.engine.scheduler import RESERVED, urgency

LONGEST = 60.0
"""Seconds that the pace is measured over at most: it follows a change of the upstream within that time."""

RECENT = 0.75
"""The share of a younger run that it is measured over: its beginning, when slots fill, says little about the rest."""

MAX_STEPS = 100_000
"""Batches times owners up to which turns are followed exactly; beyond, all are taken in order of deadline."""


class Progress(msgspec.Struct, frozen=True):
    """A batch that runs, or waits for its plan.

    Attributes:
        id: its bare id.
        owner: whose it is.
        weight: of its owner's share.
        deadline: when its window ends, Unix seconds.
        left: requests without a recorded result.
        done: results in this run.
        since: when the run's first request could go out, Unix seconds; None before its plan.
        model: that all its requests ask for; None where they ask for several.
    """

    id: str
    owner: str
    weight: float
    deadline: int
    left: int
    done: int
    since: float | None
    model: str | None = None


class Group(msgspec.Struct, frozen=True):
    """Batches that share upstreams, directly or by way of others.

    Attributes:
        batches: in the order given.
        models: that their upstreams list; None where the group is all that there is.
    """

    batches: list[Progress]
    models: frozenset[str] | None


def groups(running: Sequence[Progress], lists: Collection[frozenset[str]]) -> dict[str, Group]:
    """The batches by group; of two groups, no upstream serves both.

    Args:
        running: all batches.
        lists: the models of each upstream; an empty one where it may serve any.

    Returns:
        By a name that stays the same as long as the upstreams do.
    """
    everything = {"": Group(list(running), None)} if running else {}
    parts: list[set[str]] = []
    for models in set(lists):
        if not models:
            return everything
        joined = set(models)
        for part in [part for part in parts if part & joined]:
            joined |= part
            parts.remove(part)
        parts.append(joined)
    of = {model: part for part in parts for model in part}
    if len(parts) < 2 or any(batch.model not in of for batch in running):
        return everything
    found: dict[str, Group] = {}
    for batch in running:
        assert batch.model is not None
        part = of[batch.model]
        found.setdefault(min(part), Group([], frozenset(part))).batches.append(batch)
    return found


class Pace:
    """Results a second of a group's batches together."""

    def __init__(self) -> None:
        self._done: dict[str, int] = {}
        self._looks: deque[tuple[float, int]] = deque()  # when, and how many results in all had come by then

    def vanished(self, running: Sequence[Progress]) -> list[str]:
        """The batches that ran at the last look and are not among these: what `observe` wants to know of."""
        return list(self._done.keys() - {batch.id for batch in running})

    def begins(self, running: Sequence[Progress]) -> float | None:
        """When the run began, where nothing is known of it yet; None where the last look was during this run."""
        starts = [batch.since for batch in running if batch.since is not None]
        if not starts:
            return None
        return min(starts) if not self._looks or min(starts) > self._looks[-1][0] else None

    def observe(self, now: float, running: Sequence[Progress], ended: Mapping[str, int] | int) -> None:
        """Take a look.

        Args:
            now: Unix seconds.
            running: every batch that runs.
            ended: of each that `vanished`, its results; where `begins` has named a time, how many results batches have
                had that began since then and have ended.
        """
        start = self.begins(running)
        if start is not None:
            self._looks = deque([(start, 0)])
            assert isinstance(ended, int)
            total = ended + sum(batch.done for batch in running)
        elif not self._looks:
            return
        else:
            assert not isinstance(ended, int)
            current = {batch.id: batch.done for batch in running} | dict(ended)
            # A batch that was retried in between counts from 0 again.
            new = sum(max(0, done - self._done.get(id, 0)) for id, done in current.items())
            total = self._looks[-1][1] + new
        self._done = {batch.id: batch.done for batch in running}
        if now > self._looks[-1][0]:
            self._looks.append((now, total))
        while len(self._looks) > 2 and self._looks[1][0] <= now - LONGEST:
            self._looks.popleft()

    def measured(self, now: float) -> float:
        """Seconds that the pace is known over."""
        return now - self._looks[0][0] if self._looks else 0.0

    def rate(self, now: float) -> float | None:
        """Results a second; None as long as there are none."""
        if len(self._looks) < 2:
            return None
        span = min(LONGEST, RECENT * self.measured(now))
        when, total = max((look for look in self._looks if look[0] <= now - span), default=self._looks[0])
        results = self._looks[-1][1] - total
        seconds = self._looks[-1][0] - when
        return results / seconds if results > 0 and seconds > 0 else None


def ends(running: Sequence[Progress], rate: float, now: float) -> dict[str, float]:
    """In how many seconds each batch has its last result, if results come at this rate and no batch is added.

    Args:
        running: all batches, in order of deadline.
        rate: results a second, above 0.
        now: Unix seconds.
    """
    queues: dict[str, deque[Progress]] = {}
    for batch in running:
        queues.setdefault(batch.owner, deque()).append(batch)
    if len(running) * len(queues) > MAX_STEPS:
        return _in_order(running, rate)
    left = {batch.id: float(batch.left) for batch in running}
    levels = {batch.id: urgency(batch.deadline, now) for batch in running}
    found: dict[str, float] = {}
    passed = 0.0
    while queues:
        heads = [queue[0] for queue in queues.values()]
        rates = _shares(heads, levels, rate)
        step = min(left[batch.id] / rates[batch.id] for batch in heads)
        passed += step
        for batch in heads:
            left[batch.id] -= step * rates[batch.id]
            if left[batch.id] <= 1e-6:
                found[batch.id] = passed
                queues[batch.owner].popleft()
                if not queues[batch.owner]:
                    del queues[batch.owner]
    return found


def _shares(heads: Sequence[Progress], levels: Mapping[str, int], rate: float) -> dict[str, float]:
    """The rate of each owner's first batch: see `batchery.engine.scheduler` for how owners share."""
    first = min(levels[batch.id] for batch in heads)
    everybody = sum(batch.weight for batch in heads)
    urgent = sum(batch.weight for batch in heads if levels[batch.id] == first)
    return {
        batch.id: rate
        * batch.weight
        * (RESERVED / everybody + ((1 - RESERVED) / urgent if levels[batch.id] == first else 0.0))
        for batch in heads
    }


def _in_order(running: Sequence[Progress], rate: float) -> dict[str, float]:
    found = {}
    before = 0
    for batch in running:
        before += batch.left
        found[batch.id] = before / rate
    return found
