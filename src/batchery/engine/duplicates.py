"""Duplicates: which requests of a batch are one and the same question, so that one answer will do for all of them.

Two requests are duplicates when their urls and the bytes of their bodies are the same, as they stand in the file, and
the answer does not depend on chance: a `temperature` of 0 or a `seed`, and one choice; or a url that draws nothing. The
bytes decide, so another order of the keys makes another request. Pure; CPU-bound. A plan is only ever regrouped, so
that duplicates lie in one shard with the first of them: what is recorded of a shard then says what is left of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from batchery.wire.lines import read_request

WITHOUT_CHANCE = frozenset({"/v1/embeddings", "/v1/moderations", "/v1/rerank", "/v1/score"})


class _Sampling(msgspec.Struct):
    temperature: Any = None
    seed: Any = None
    n: Any = None


_read_sampling = msgspec.json.Decoder(_Sampling).decode


def is_deterministic(url: str, body: bytes | msgspec.Raw) -> bool:
    """Whether the same question gets the same answer, as far as the request can say so."""
    if url in WITHOUT_CHANCE:
        return True
    try:
        asked = _read_sampling(body)
    except (msgspec.MsgspecError, RecursionError, ValueError):  # such as a number that no float can hold
        return False
    greedy = type(asked.temperature) in (int, float) and asked.temperature == 0
    return (greedy or type(asked.seed) is int) and (asked.n is None or (type(asked.n) is int and asked.n == 1))


class Finder:
    """Finds the duplicates among requests, of which it keeps 20 bytes each."""

    def __init__(self) -> None:
        self._requests = array("I")
        self._high = array("Q")
        self._low = array("Q")

    def add(self, requests: Iterable[int], lines: Iterable[bytes]) -> None:
        """Look at some requests and their lines."""
        for request, line in zip(requests, lines, strict=True):
            read = read_request(line)
            body = bytes(read.body)
            if is_deterministic(read.url, body):
                digest = blake2b(read.url.encode() + b"\0" + body, digest_size=16).digest()
                self._requests.append(request)
                self._high.append(int.from_bytes(digest[:8]))
                self._low.append(int.from_bytes(digest[8:]))

    def copies(self) -> dict[int, list[int]]:
        """Of the requests that have duplicates, the first of each kind in order of being added, and the others."""
        requests, high, low = self._requests, self._high, self._low
        found: dict[int, list[int]] = {}
        order = sorted(range(len(requests)), key=high.__getitem__)
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order) and high[order[end]] == high[order[start]]:
                end += 1
            if end - start > 1:
                firsts: dict[int, int] = {}
                for place in order[start:end]:  # the sort is stable: in order of being added
                    first = firsts.setdefault(low[place], requests[place])
                    if first != requests[place]:
                        found.setdefault(first, []).append(requests[place])
            start = end
        return found


def regroup(
    plan: Sequence[tuple[str, bytes]], copies: dict[int, list[int]]
) -> tuple[list[tuple[str, bytes]], list[bytes | None]]:
    """A plan in which duplicates follow the first of them.

    Args:
        plan: for each shard the model and the packed requests.
        copies: from `Finder.copies`.

    Returns:
        The plan, and for each shard its twins: for each request the place of the first like it, unsigned 32 bit; None
        where no two are alike.
    """
    others = {request for some in copies.values() for request in some}
    found: list[tuple[str, bytes]] = []
    alike: list[bytes | None] = []
    for model, packed in plan:
        requests, twins = array("I"), array("I")
        for request in array("I", packed):
            if request in others:
                continue
            place = len(requests)
            same = copies.get(request, ())
            requests.append(request)
            requests.extend(same)
            twins.extend([place] * (1 + len(same)))
        if requests:
            found.append((model, requests.tobytes()))
            alike.append(None if len(set(twins)) == len(twins) else twins.tobytes())
    return found, alike


def split(
    left: Sequence[tuple[int, int]], twins: bytes
) -> tuple[list[tuple[int, int]], dict[int, list[tuple[int, int]]]]:
    """What is to be sent of a shard, and what is answered with it.

    Args:
        left: (place, request) of what is not recorded yet.
        twins: of the shard.

    Returns:
        What is sent, and by the places of these what is answered by the same answer. Where a crash came between the
        answers of duplicates, the first of those that are left is sent.
    """
    first_of = array("I", twins)
    senders: dict[int, int] = {}
    sent: list[tuple[int, int]] = []
    copies: dict[int, list[tuple[int, int]]] = {}
    for place, request in left:
        kind = first_of[place]
        sender = senders.setdefault(kind, place)
        if sender == place:
            sent.append((place, request))
        else:
            copies.setdefault(sender, []).append((place, request))
    return sent, copies
