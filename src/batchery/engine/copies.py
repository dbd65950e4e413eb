"""Copies: gives the answer of a request to the duplicates that were not sent, each as a result line of its own.

It runs beside the dispatcher, a piece at a time and only as fast as results are recorded, so that one answer for a
hundred thousand requests takes no memory. What it has not got to when the process dies is still in the plan; it must
never hold back a result that is there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import structlog

from batchery.engine.reader import Reader
from batchery.engine.recorder import Recorder
from batchery.engine.work import Result, Work
from batchery.store.errors import StoreError
from batchery.wire import ids
from batchery.wire.results import Usage, reissued

log = structlog.get_logger()

PIECE = 256
"""Copies that are made at a time."""

MAX_BYTES = 16 * 1024 * 1024
"""Bytes of answers that may wait to be copied before nothing more is read to be sent."""

PAUSE = 0.5
"""Seconds until the file is read again after that has failed."""


class Copies:
    """Answers duplicates for one worker.

    Args:
        reader: for the `custom_id`s of the copies.
        recorder: takes their results.
        dropped: called with each copy that is given up unrecorded, because its batch has ended.
    """

    def __init__(self, reader: Reader, recorder: Recorder, dropped: Callable[[Work], None]) -> None:
        self._reader = reader
        self._recorder = recorder
        self._dropped = dropped
        self._queue: deque[tuple[Result, deque[tuple[int, int]]]] = deque()
        self._bytes = 0
        self._arrived = asyncio.Event()
        self._closing = False

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be copied that nothing more should be sent."""
        return self._bytes >= MAX_BYTES

    def add(self, result: Result) -> None:
        """Take a result whose request has copies; these are no longer the request's to account for."""
        copies, result.work.copies = result.work.copies, ()
        self._queue.append((result, deque(copies)))
        self._bytes += len(result.line)
        self._arrived.set()

    def close(self) -> None:
        """Let `run` end once every copy is made."""
        self._closing = True
        self._arrived.set()

    async def run(self) -> None:
        """Make copies until `close`, and then what is left."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._queue:
                await self._some()
            if self._closing:
                return

    async def _some(self) -> None:
        """Make the copies at the head of the queue, up to `PIECE` of one batch."""
        batch = self._queue[0][0].work.shard.batch_id
        piece: list[tuple[Result, tuple[int, int]]] = []
        for result, copies in self._queue:
            if result.work.shard.batch_id != batch:
                break
            piece += [(result, copy) for copy in islice(copies, PIECE - len(piece))]
            if len(piece) >= PIECE:
                break
        try:
            custom_ids: Sequence[str | None] = await self._reader.custom_ids(batch, [copy[1] for _, copy in piece])
        except StoreError as error:
            if not (self._closing or any(result.work.shard.stopping for result, _ in piece)):
                log.error("duplicates cannot be answered just now; trying again", batch=batch, reason=str(error))
                await asyncio.sleep(PAUSE)
                return
            custom_ids = [None] * len(piece)
        for (result, copy), custom_id in zip(piece, custom_ids, strict=True):
            await self._recorder.room()
            self._take(result)
            if custom_id is None:
                self._dropped(_work_of(result, copy, ""))
            else:
                self._recorder.add(_copy(result, copy, custom_id))

    def _take(self, result: Result) -> None:
        """One copy less at the head of the queue."""
        head, copies = self._queue[0]
        assert head is result
        copies.popleft()
        if not copies:
            self._queue.popleft()
            self._bytes -= len(result.line)


def _work_of(result: Result, copy: tuple[int, int], custom_id: str) -> Work:
    work = result.work
    return Work(work.shard, *copy, custom_id=custom_id, url=work.url, body=b"")


def _copy(result: Result, copy: tuple[int, int], custom_id: str) -> Result:
    """The result of a request that is answered by another's answer."""
    work = _work_of(result, copy, custom_id)
    batch = work.shard.batch_id
    line = reissued(
        result.line,
        (ids.request_id(batch, result.work.request), result.work.custom_id),
        (ids.request_id(batch, work.request), custom_id),
    )
    return Result(work, result.kind, line, None, result.reason, result.usage or Usage())
