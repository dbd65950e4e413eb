"""The scheduler: which leased shard the next requests come from, and how many more to lease.

Earliest deadline first: a batch with a shorter window overtakes at once whatever has not been sent yet. Pure, but for
the list that it keeps.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from batchery.engine.work import LeasedShard


def _order(shard: LeasedShard) -> tuple[int, int]:
    return shard.deadline, shard.id


class Scheduler:
    """The shards that a worker holds, in the order of their deadlines."""

    def __init__(self) -> None:
        self._shards: list[LeasedShard] = []

    def __iter__(self) -> Iterator[LeasedShard]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def add(self, shard: LeasedShard) -> None:
        """A shard was leased."""
        bisect.insort(self._shards, shard, key=_order)

    def remove(self, shard: LeasedShard) -> None:
        """A shard is done with."""
        self._shards.remove(shard)

    def next(self, now: float) -> LeasedShard | None:
        """The shard to read from: the earliest deadline among those with something unread that can be read.

        Args:
            now: on the monotonic clock.
        """
        for shard in self._shards:
            if shard.unread and not shard.stopping and shard.unreadable_until <= now:
                return shard
        return None

    def unread(self) -> int:
        """Requests that are leased and not yet read."""
        return sum(len(shard.unread) for shard in self._shards)

    def last_deadline(self) -> int | None:
        """The latest deadline among shards with something unread; a batch due sooner should be leased too."""
        return max((shard.deadline for shard in self._shards if shard.unread), default=None)


def shards_wanted(unread: int, target: int, shard_size: float) -> int:
    """How many shards to lease so that about `target` requests are at hand.

    Args:
        unread: requests leased and not yet read.
        target: how many there should be.
        shard_size: requests in a shard, from those leased last.
    """
    missing = target - unread
    return 0 if missing <= 0 else max(1, min(16, round(missing / max(1.0, shard_size))))
