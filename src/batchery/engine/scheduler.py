"""The scheduler: which batch the next shards are leased from, and which leased shard the next requests come from.

The earliest deadline goes first, and owners share. How that goes together:

- Of one owner's batches the earliest deadline goes first, always.
- Between owners, most of the capacity goes to the most urgent batches: those whose time left has the same power of two
  are equally urgent, so that a 1 h batch overtakes a 24 h one, but not one that was created a minute later.
- Owners who are equally urgent share in proportion to their weights, and `RESERVED` of the capacity is shared so by all
  owners whatever their deadlines. So nobody starves, however many urgent batches others bring.

Shares are counted where shards are leased; what is leased is read in that order, but for this: of shards for one model
that are equally urgent, those go on together whose prompts begin alike, from batch to batch, so that the inference
server finds the beginnings in its prefix cache. Each shard is in the order of their keys, so they are merged as sorted
lists are, round and round. When something more urgent comes, what has been leased for less urgent batches and not been
sent is given back. Pure: no clock, no database.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Collection, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import NamedTuple

from batchery.engine.fair_share import Claim, FairShare
from batchery.engine.work import LeasedShard
from batchery.store.agenda import Running

RESERVED = 0.25
"""The share of the capacity that all owners share, whatever their deadlines."""

RETRIES = 1_000
"""Requests waiting for another try, of all batches, from which on those are held back that have the most of them."""

MAX_LEASES = 16
"""Shards that are leased at once at most."""

AHEAD = 2 * MAX_LEASES
"""How many leases later a shard may have been leased that is read first, for the sake of the prefix order."""

MAX_MODELS = 1_000
"""Models of which it is known what was read last."""

ONLY = 10.0
"""Seconds for which a batch that had nothing else to lease is passed over while the same models are full: others may
have given back what they held of it."""

_KEYS = 1 << 64
_NONE = (frozenset[str](), 0.0)


def urgency(deadline: int, now: float) -> int:
    """How urgent a deadline is: the fewer, the more. It falls by one whenever the time left has halved.

    Args:
        deadline, now: Unix seconds.
    """
    return int(max(0.0, deadline - now)).bit_length()


def held_back(waiting_of: Mapping[str, int], limit: int, *, full: bool) -> set[str]:
    """The batches that nothing more is read from, because too many of their requests wait for another try.

    A batch that mostly fails must not fill the memory with what it will try again, and a healthy one must not wait for
    it: of those with requests waiting, the ones with at least an equal part of all that may wait.

    Args:
        waiting_of: by batch, how many wait.
        limit: requests in flight at most.
        full: whether what waits takes as many bytes as it may.
    """
    waiting = sum(waiting_of.values())
    most = max(RETRIES, 4 * limit)
    if full:
        most = min(most, waiting)
    if waiting < most or not waiting:
        return set()
    return {batch for batch, count in waiting_of.items() if count * len(waiting_of) >= most}


class _Entry:
    """A running batch on the agenda.

    Attributes:
        batch: as the database has it.
        free: how many of its requests may be in shards that nobody holds, as far as is known.
    """

    __slots__ = ("batch", "free")

    def __init__(self, batch: Running, free: int) -> None:
        self.batch = batch
        self.free = free


class _Lease(NamedTuple):
    """How a shard came to be leased.

    Attributes:
        rank: how urgent the most urgent was at that time; what was leased then is read no later.
        order: among all leases.
        share: where its owner was charged for it.
        batch: as the database had it.
    """

    rank: int
    order: int
    share: FairShare
    batch: Running


class Wanted(NamedTuple):
    """What is to be leased of one batch.

    Attributes:
        charges: for each shard where its owner was charged for it, and for how many requests.
    """

    charges: list[tuple[FairShare, int]]

    @property
    def shards(self) -> int:
        """How many shards."""
        return len(self.charges)

    @property
    def size(self) -> int:
        """Requests that were charged."""
        return sum(size for _, size in self.charges)


class Scheduler:
    """What runs, and the shards that a worker holds, in the order in which they are read."""

    def __init__(self) -> None:
        self._leases: dict[LeasedShard, _Lease] = {}
        self._queue: list[LeasedShard] = []  # of the shards those that may have something unread
        self._orders = itertools.count()
        self._rank = 0
        self._entries: dict[str, _Entry] = {}
        self._by_owner: dict[str, list[_Entry]] = {}
        self._everybody = FairShare()
        self._urgent: dict[int, FairShare] = {}
        self._has_news = False
        self._credit = 0.0  # of the reserve, in requests
        # By batch with several models: which were full when it had nothing else to lease, and until when that counts.
        self._only: dict[str, tuple[frozenset[str], float]] = {}
        self._prefixes: dict[str, int] = {}  # by model: of what was read last

    def __iter__(self) -> Iterator[LeasedShard]:
        return iter(list(self._leases))

    def __len__(self) -> int:
        return len(self._leases)

    # What runs.

    def update(self, running: Iterable[Running]) -> None:
        """The database was asked what runs.

        Args:
            running: in order of deadline.
        """
        held: dict[str, int] = {}
        for shard in self._leases:
            held[shard.batch_id] = held.get(shard.batch_id, 0) + shard.open
            if not shard.returning:
                held[shard.batch_id] += len(shard.unread)
        self._entries = {}
        self._by_owner = {}
        for batch in running:
            self._put(_Entry(batch, batch.left - held.get(batch.id, 0)))
        self._only = {id: only for id, only in self._only.items() if id in self._entries}

    def planned(self, batch: Running) -> None:
        """A batch has begun to run."""
        if batch.id not in self._entries:
            self._put(_Entry(batch, batch.left))
            entries = self._by_owner[batch.owner]
            insort(entries, entries.pop(), key=_deadline)

    def _put(self, entry: _Entry) -> None:
        self._has_news = True
        self._entries[entry.batch.id] = entry
        self._by_owner.setdefault(entry.batch.owner, []).append(entry)

    # Leasing.

    def wanted(
        self,
        target: int,
        now: float,
        *,
        size: float,
        held_back: Collection[str] = frozenset(),
        full: Collection[str] = frozenset(),
    ) -> dict[str, Wanted]:
        """What to lease, so that about `target` requests are at hand; the owners are charged for it.

        Args:
            target: requests that should be leased and not yet read.
            now: Unix seconds.
            size: requests in a shard, from those leased last.
            held_back: batches that nothing is to be leased from just now.
            full: models of which nothing is to be read just now; what is leased of them does not count.

        Returns:
            By batch, in the order of their turns.
        """
        found: dict[str, Wanted] = {}
        whole = max(1, round(size))
        waiting = self._waiting(now, held_back, full)
        if not waiting:
            return found
        claims = {owner: _claim(entry, whole) for owner, entry in waiting.items()}
        self._rank = min(urgency(claim.deadline, now) for claim in claims.values())
        unread = self.unread(held_back, full, now=now, urgent=self._rank)
        # Several are leased at a time, since each time costs a transaction.
        missing = 0 if 2 * unread > target else target - unread
        for _ in range(MAX_LEASES):
            if missing <= 0 or not claims:
                break
            claim, share = self._turn(claims, now)
            owner, each = claim.owner, claim.size
            entry = waiting[owner]
            found.setdefault(entry.batch.id, Wanted([])).charges.append((share, each))
            entry.free -= each
            missing -= each
            following = entry if entry.free > 0 else self._first_of(owner, now, held_back, full)
            if following is None:
                del claims[owner]
            else:
                waiting[owner] = following
                claims[owner] = _claim(following, whole)
        return found

    def _waiting(
        self, now: float, held_back: Collection[str], full: Collection[str] = frozenset()
    ) -> dict[str, _Entry]:
        """For each owner with something to lease the batch that is due first."""
        found = ((owner, self._first_of(owner, now, held_back, full)) for owner in self._by_owner)
        return {owner: entry for owner, entry in found if entry is not None}

    def _first_of(self, owner: str, now: float, held_back: Collection[str], full: Collection[str]) -> _Entry | None:
        for entry in self._by_owner[owner]:
            id = entry.batch.id
            if entry.free > 0 and entry.batch.deadline > now and id not in held_back and entry.batch.model not in full:
                models, until = self._only.get(id, _NONE) if full else _NONE
                if now >= until or not models.issubset(full):
                    return entry
        return None

    def _turn(self, claims: dict[str, Claim], now: float) -> tuple[Claim, FairShare]:
        """Whose turn it is, and where it was charged for that."""
        if self._credit > 0:
            share = self._everybody
            claim = share.first(claims.values())
            assert claim is not None
            self._credit -= claim.size * (1 - RESERVED)
        else:
            levels = {owner: urgency(claim.deadline, now) for owner, claim in claims.items()}
            first = min(levels.values())
            share = self._urgent.setdefault(first, FairShare())
            claim = share.first(claim for owner, claim in claims.items() if levels[owner] == first)
            assert claim is not None
            self._credit += claim.size * RESERVED
        share.charge(claim)
        return claim, share

    def leased(
        self,
        wanted: dict[str, Wanted],
        shards: Iterable[LeasedShard],
        full: Collection[str] = frozenset(),
        now: float = 0.0,
    ) -> None:
        """These shards were leased, of those that were wanted.

        Args:
            full: models of which none was to be leased.
            now: Unix seconds.
        """
        got: dict[str, list[LeasedShard]] = {id: [] for id in wanted}
        for shard in shards:
            got[shard.batch_id].append(shard)
        for id, some in got.items():
            entry = self._entries.get(id)
            if full and not some and (entry is None or entry.batch.model is None):
                self._only[id] = frozenset(full), now + ONLY
            if entry is None:  # as for a batch that has ended meanwhile
                entry = _Entry(Running(id, "", 1.0, min((shard.deadline for shard in some), default=0), 0), 0)
            elif len(some) < wanted[id].shards:
                entry.free = 0  # until the database is asked again
            for (share, size), shard in itertools.zip_longest(wanted[id].charges, some):
                came = 0 if shard is None else len(shard.unread)
                share.correct(entry.batch.owner, entry.batch.weight, came - size)
                if shard is not None:
                    self._leases[shard] = _Lease(self._rank, next(self._orders), share, entry.batch)
                    self._queue.append(shard)

    def remove(self, shard: LeasedShard) -> None:
        """A shard is done with, or was given back."""
        del self._leases[shard]
        entry = self._entries.get(shard.batch_id)
        if entry is not None and shard.returning:
            entry.free = max(entry.free, 0) + len(shard.unread)

    def overtaken(self, now: float, elsewhere: Collection[str] = frozenset()) -> list[LeasedShard]:
        """The shards with something unsent in the way of what is more urgent and not yet leased; told once after each
        news of what runs.

        Args:
            now: Unix seconds.
            elsewhere: models that other workers are for.
        """
        if not self._has_news:
            return []
        self._has_news = False
        waiting = self._waiting(now, (), elsewhere)
        first = min((urgency(entry.batch.deadline, now) for entry in waiting.values()), default=1 << 30)
        return [
            shard
            for shard, lease in self._leases.items()
            if self._rank_of(shard, lease, now) > first and not (shard.stopping or shard.returning)
        ]

    def given_back(self, shard: LeasedShard, requests: int) -> None:
        """So many requests of a shard are given back, once what is in flight of it has ended: its owner does not pay
        for them."""
        lease = self._leases[shard]
        lease.share.correct(lease.batch.owner, lease.batch.weight, -requests)

    def is_mixed(self, wanted: Iterable[str]) -> bool:
        """Whether one of these batches asks for several models, as far as is known."""
        entries = map(self._entries.get, wanted)
        return any(entry is None or entry.batch.model is None for entry in entries)

    @staticmethod
    def _rank_of(shard: LeasedShard, lease: _Lease, now: float) -> int:
        return min(lease.rank, urgency(shard.deadline, now))

    # Reading.

    def next(
        self, now: float, monotonic: float, held_back: Collection[str] = (), full: Collection[str] = ()
    ) -> LeasedShard | None:
        """The shard to read from: of those with something unread that can be read the first in turn, or one near it
        that goes on with the prefix that was read last, or with the one that follows.

        Args:
            now: Unix seconds.
            monotonic: on that clock.
            held_back: batches that nothing is to be read from just now.
            full: models of which nothing is to be read just now.
        """
        self._queue = [shard for shard in self._queue if _is_readable(shard)]
        turns = [
            (self._rank_of(shard, self._leases[shard], now), self._leases[shard].order, shard)
            for shard in self._queue
            if shard.unreadable_until <= monotonic and shard.batch_id not in held_back and shard.model not in full
        ]
        if not turns:
            return None
        rank, order, first = min(turns, key=itemgetter(0, 1))
        last = self._prefixes.get(first.model, 0)
        urgent = urgency(first.deadline, now)
        _, _, best = min(
            ((shard.prefix - last) % _KEYS, turn, shard)
            for level, turn, shard in turns
            if level == rank
            and turn <= order + AHEAD
            and shard.model == first.model
            and urgency(shard.deadline, now) <= urgent
        )
        if len(self._prefixes) >= MAX_MODELS:
            self._prefixes.clear()
        self._prefixes[best.model] = best.prefix
        return best

    @property
    def has_choice(self) -> bool:
        """Whether there is more than one shard to read from."""
        return len(self._queue) > 1

    def models(self) -> set[str]:
        """The models of which something may be unread."""
        return {shard.model for shard in self._queue}

    def unread(
        self,
        held_back: Collection[str] = (),
        full: Collection[str] = (),
        *,
        now: float = 0.0,
        urgent: int = 1 << 30,
    ) -> int:
        """Requests that are leased, not yet read, and no less urgent than that.

        Args:
            held_back: batches that do not count.
            full: models that do not count.
            now: Unix seconds.
        """
        return sum(
            len(shard.unread)
            for shard in self._queue
            if _is_readable(shard)
            and shard.batch_id not in held_back
            and shard.model not in full
            and self._rank_of(shard, self._leases[shard], now) <= urgent
        )


def _deadline(entry: _Entry) -> int:
    return entry.batch.deadline


def _claim(entry: _Entry, whole: int) -> Claim:
    """An owner's claim to a shard of its first batch, of at most so many requests."""
    return Claim(entry.batch.owner, entry.batch.weight, min(whole, entry.free), entry.batch.deadline)


def _is_readable(shard: LeasedShard) -> bool:
    return bool(shard.unread) and not (shard.stopping or shard.returning)
