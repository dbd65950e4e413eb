"""Weighted fair sharing between owners, by fair queueing that keeps its own clock (after S. J. Golestani, INFOCOM 1994,
and P. Goyal and others, SIGCOMM 1996).

Each owner has a tag: what it has been given, divided by its weight. Whoever would come to the end of its next piece
first is served, so that in the long run owners with work get shares in proportion to their weights, and the one with
the smallest piece does not wait for a whole round. Who had no work earns no credit for it: a tag counts at least as
much as the beginning of the piece served last. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

KEPT = 1_024
"""Owners without work whose tags are kept; of more, who was served longest ago is forgotten."""


class Claim(NamedTuple):
    """An owner who has work.

    Attributes:
        owner: whose it is.
        weight: of its share, above 0.
        size: of its next piece, above 0.
        deadline: which decides where all else is equal.
    """

    owner: str
    weight: float
    size: int
    deadline: int


class FairShare:
    """Who has been given how much."""

    def __init__(self) -> None:
        self._clock = 0.0
        self._finish: dict[str, float] = {}  # by owner, of what it was given last
        self._start: dict[str, float] = {}  # of who waits, where its next piece begins

    def first(self, claims: Iterable[Claim]) -> Claim | None:
        """The owner whose turn it is; None where there is no claim. Who has none now does not wait any more."""
        clock, before, finish = self._clock, self._start, self._finish
        self._start = starts = {}
        best, best_key = None, (0.0, 0, "")
        for claim in claims:
            owner = claim.owner
            start = before.get(owner)
            if start is None:
                start = max(clock, finish.get(owner, clock))
            starts[owner] = start
            key = (start + claim.size / claim.weight, claim.deadline, owner)
            if best is None or key < best_key:
                best, best_key = claim, key
        return best

    def charge(self, claim: Claim) -> None:
        """The owner whose turn it was, is given its piece."""
        owner = claim.owner
        start = self._start[owner]
        self._clock = max(self._clock, start)
        self._finish.pop(owner, None)
        self._finish[owner] = self._start[owner] = start + claim.size / claim.weight
        if len(self._finish) > KEPT + len(self._start):
            self._finish = dict(itertools.islice(self._finish.items(), KEPT // 2, None))

    def correct(self, owner: str, weight: float, size: int) -> None:
        """An owner was given so much more than it was charged for; less, and some comes back, where it is negative."""
        for tags in (self._finish, self._start):
            if owner in tags:
                tags[owner] += size / weight
