"""The units that the parts of the engine hand to each other: a leased shard, a request on its way, a result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from batchery.engine.duplicates import split
from batchery.engine.retry import Tries
from batchery.store.shards import ShardRow
from batchery.wire.results import Failure, Kind, Usage


class LeasedShard:
    """A shard that this worker holds.

    Attributes:
        id: of its row.
        batch_id: the batch's bare id.
        model: which model its requests ask for.
        deadline: when the batch's window ends, Unix seconds.
        epoch: of the lease; a former holder has a smaller one.
        size: requests in the shard, recorded ones included.
        bits: one bit for each that is recorded.
        unread: (place, request) of those not yet read from the file, in reverse order.
        prefix: the key of the beginning that the prompt of the next unread one shares with others; 0 where unknown.
        open: how many are read, or are copies of what is, and have no recorded result yet.
        unreadable_until: when its lines may be read again after that has failed, on the monotonic clock.
        copies: by place, (place, request) of those that are answered by the answer of the request there; None where
            there are no duplicates.
        stopping: whether nothing more of it is to be sent, because its batch has been cancelled or has expired.
        returning: whether nothing more of it is to be sent, because it is given back: for something more urgent, or
            because other workers are for its model.
    """

    __slots__ = (
        "batch_id",
        "bits",
        "copies",
        "deadline",
        "epoch",
        "id",
        "model",
        "open",
        "prefix",
        "returning",
        "size",
        "stopping",
        "unread",
        "unreadable_until",
    )

    def __init__(self, row: ShardRow) -> None:
        self.id = row.id
        self.batch_id = row.batch_id
        self.model = row.model
        self.deadline = row.deadline
        self.epoch = row.epoch
        self.size = len(row.requests) // 4
        self.bits = bytearray(row.done or bytes((self.size + 7) // 8))
        self.copies: dict[int, list[tuple[int, int]]] | None = None
        left = row.left()
        if row.twins is not None:
            left, self.copies = split(left, row.twins)
        self.unread = left[::-1]
        self.prefix = 0
        self.open = 0
        self.stopping = False
        self.returning = False
        self.unreadable_until = 0.0

    def mark(self, places: Iterable[int]) -> None:
        """Note that the requests at these places are recorded."""
        bits = self.bits
        for place in places:
            bits[place >> 3] |= 1 << (place & 7)


class Work(msgspec.Struct, gc=False, eq=False):
    """A request on its way: read from the file, and not yet recorded.

    Attributes:
        shard: the shard that it belongs to.
        place: its place there.
        request: its number in the file, from 0.
        custom_id: as in its line.
        url: likewise.
        body: the bytes of its body; let go once there is a result.
        size: of that body, in bytes; 0 for a copy, which is not sent.
        tries: its attempts so far.
        since: when the last of them failed, or the first began, on the event loop's clock.
        copies: (place, request) of the duplicates that are answered by its answer.
        prefix: the key of the beginning that its prompt shares with others; 0 where it does not matter.
        passed: one bit for each of the worker's upstreams that refused it for good, as another may not.
        aborted: whether it was taken off its upstream because its batch has ended.
    """

    shard: LeasedShard
    place: int
    request: int
    custom_id: str
    url: str
    body: bytes
    size: int = 0
    tries: Tries = msgspec.field(default_factory=Tries)
    since: float = 0.0
    copies: Sequence[tuple[int, int]] = ()
    prefix: int = 0
    passed: int = 0
    aborted: bool = False


class Result(msgspec.Struct, frozen=True):
    """What a request ended in.

    Attributes:
        work: the request.
        kind: which file its line goes to.
        line: the line, with its line break.
        usage: the tokens that the answer reports.
        reason: why the request was not sent, if it was not; its batch shows it too.
        saved: the tokens of the answer, where that is another request's.
    """

    work: Work
    kind: Kind
    line: bytes
    usage: Usage | None
    reason: Failure | None = None
    saved: Usage | None = None
