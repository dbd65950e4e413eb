"""Finding what appears twice among millions of texts, in 16 bytes of memory for each: only hashes are kept, and only at
the end are they compared. Equal hashes are a suspicion; who has the texts settles it.
"""

from __future__ import annotations

from array import array

_PARTS = 64


class Duplicates:
    """Collects texts by hash, each with a number, given in rising order."""

    def __init__(self) -> None:
        self._hashes = [array("q") for _ in range(_PARTS)]
        self._numbers = [array("Q") for _ in range(_PARTS)]

    def add(self, text: str | bytes, number: int) -> None:
        """Take note of a text."""
        hashed = hash(text)
        part = hashed % _PARTS
        self._hashes[part].append(hashed)
        self._numbers[part].append(number)

    def pairs(self) -> list[tuple[int, int]]:
        """For each text that seems to be a repeat: its number and that of the first like it, by number."""
        found = []
        for hashes, numbers in zip(self._hashes, self._numbers, strict=True):
            if len(set(hashes)) == len(hashes):
                continue
            first: dict[int, int] = {}
            for hashed, number in zip(hashes, numbers, strict=True):
                earlier = first.setdefault(hashed, number)
                if earlier != number:
                    found.append((number, earlier))
        return sorted(found)

    def count(self) -> int:
        """How many seem to be repeats."""
        return sum(len(hashes) - len(set(hashes)) for hashes in self._hashes)
