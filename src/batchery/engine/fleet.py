"""The fleet: the workers on one database, each before upstreams of its own, and which models one leaves to others.

A model that none of a worker's upstreams lists, while those of another worker do, is left to that one: here it would be
refused for good. A model that nobody lists is anybody's, since a server may know it by a name that is not on its list.

Each worker tells with its heartbeat what its upstreams list. That may come too late for one that has just started, so
a request that is refused because of its model is no failure yet while it is open who serves what: it goes back into the
plan, and its model is left alone until that is known. Pure: the clock is an argument.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from batchery.engine.breaker import GONE_AFTER
from batchery.store.workers import UpstreamSnapshot, WorkerRow, decode_snapshot

REMEMBERED = 60.0
"""Seconds after its last heartbeat for which a worker's upstreams count: longer than it takes to start it again."""

SETTLING = 10.0
"""Seconds after its start in which a worker does not take the others that it sees for all that there are, as where
all are started together."""

BLIND = REMEMBERED / 2
"""Seconds without a look, as where the database was away, after which the others may have had no chance to show
themselves either, so that it has to settle again."""

MAX_MODELS = 500
"""Models that are left to others at most because those list them, and at most because they were refused here: each is a
part of the queries for shards."""


class _Other(msgspec.Struct, frozen=True):
    """What another worker has told.

    Attributes:
        heartbeat_at: when, Unix seconds.
        models: that its upstreams list.
        may_list_more: whether one of them has not been there yet.
    """

    heartbeat_at: float
    models: frozenset[str]
    may_list_more: bool


class Fleet:
    """What a worker knows of the others.

    Args:
        worker: its own id.
        alone: whether there was no other when it started.

    Attributes:
        elsewhere: the models that it leaves to others.
    """

    def __init__(self, worker: str, *, alone: bool = False) -> None:
        self.elsewhere: frozenset[str] = frozenset()
        self._worker = worker
        self._alone = alone
        self._settled_at: float | None = None
        self._looked_at = float("-inf")
        self._others: dict[str, _Other] = {}
        self._theirs: frozenset[str] = frozenset()
        self._mine: frozenset[str] = frozenset()
        self._takes_any = False
        self._is_open = not alone
        self._refused: set[str] = set()

    def serves(self, models: Collection[str], *, takes_any: bool) -> None:
        """Its own upstreams have said what they serve.

        Args:
            models: that they list.
            takes_any: whether one of them is there and has no list, so that it may serve any.
        """
        self._mine, self._takes_any = frozenset(models), takes_any
        self._decide()

    def look(self, workers: Iterable[WorkerRow], now: float) -> None:
        """Take a look at the workers that there are.

        A worker that is not among them any more counts until its heartbeat is too old: it may be starting anew.

        Args:
            now: Unix seconds.
        """
        if self._settled_at is None:
            self._settled_at = now if self._alone else now + SETTLING
        elif now - self._looked_at > BLIND:
            self._settled_at = now + SETTLING
        self._looked_at = now
        for row in workers:
            if row.id != self._worker:
                self._others[row.id] = _told(row, now)
        self._others = {id: said for id, said in self._others.items() if said.heartbeat_at > now - REMEMBERED}
        self._theirs = frozenset[str]().union(*(said.models for said in self._others.values()))
        self._is_open = now < self._settled_at or any(said.may_list_more for said in self._others.values())
        if not self._is_open:
            self._refused &= self._theirs
        self._decide()

    def leaves(self, model: str, *, refused: bool) -> bool:
        """Whether a request that has failed here, and is not to be tried here again at once, is left to others.

        Args:
            model: that it asks for.
            refused: whether it has failed because there is no such model.
        """
        if model in self.elsewhere:
            return True
        if not refused or model in self._mine or not (self._is_open or model in self._theirs):
            return False
        if len(self._refused) >= MAX_MODELS:
            return False
        self._refused.add(model)
        self._decide()
        return True

    def _decide(self) -> None:
        listed = frozenset[str]() if self._takes_any else self._theirs - self._mine
        if len(listed) > MAX_MODELS:
            listed = frozenset(sorted(listed)[:MAX_MODELS])
        refused = self._refused - self._mine
        self.elsewhere = listed | (refused if self._is_open else refused & self._theirs)


def _told(row: WorkerRow, now: float) -> _Other:
    upstreams = decode_snapshot(row.snapshot).upstreams if row.snapshot else [UpstreamSnapshot()]
    lists = [one.served for one in upstreams]
    return _Other(
        row.heartbeat_at,
        frozenset(model for served in lists if served is not None for model in served),
        # One that has been away for longer is gone, as the breaker has it.
        None in lists and now - row.started_at < GONE_AFTER,
    )
