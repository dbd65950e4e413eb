"""The recorder: group commit of results.

Results that arrive while a commit runs, or shortly after one, go together into the next, so that one transaction and
one fsync carry many. A result counts only once it is committed; what a shard's lease no longer covers is dropped there,
because its new holder will record it. When the database fails or the disk is full, results are kept and tried again,
and `room` holds the dispatcher back, so that none is lost and memory stays bounded.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate

import msgspec
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.engine import lifecycle
from batchery.engine.histogram import Histogram
from batchery.engine.small_batches import is_small
from batchery.engine.work import LeasedShard, Result, Work
from batchery.store import batches, files, results, shards
from batchery.store.batches import BatchRow
from batchery.store.database import Database
from batchery.store.errors import StoreError
from batchery.store.ids import new_id
from batchery.store.results import Segment
from batchery.wire.objects import BatchError
from batchery.wire.results import Kind, Usage

log = structlog.get_logger()

INTERVAL = 0.04
"""Seconds between the starts of commits, when results keep coming: at most 50 ms pass until an answer is on disk."""

MAX_BYTES = 32 * 1024 * 1024
"""Bytes of lines that may wait to be recorded before new requests are held back."""

COMMIT_BYTES = 4 * 1024 * 1024
"""Bytes of lines that start a commit at once and bound a segment."""

RETRY_PAUSE = 0.5

COMMIT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
COMMIT_RESULTS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1_000.0, 2_000.0, 5_000.0, 10_000.0)
"""Bounds of the histograms."""

MAX_REASONS = 100
"""Reasons for not sending requests that a batch shows."""


class Recorder:
    """Records results for one worker.

    Args:
        database: where.
        worker: its id; leases are checked against it.
        lease: seconds for which it takes a batch.
        recorded: called after each commit with the works that are settled: recorded, or dropped because the lease
            was lost.
        batch_done: called when a commit has completed batches, with those that were taken to be finished here, and
            whether there are others, which are anybody's to take.
        places: says how many batches that are completed may be taken, any number of small ones in the place of one:
            that saves a transaction and the looking for them.
        copied: called with each result that is also that of other requests.

    Attributes:
        has_room: whether results are recorded as fast as they come.
        count: results recorded so far.
        seconds: how long each commit took, those that failed before it did not count.
        sizes: how many results each had.
    """

    def __init__(
        self,
        database: Database,
        worker: str,
        lease: float,
        recorded: Callable[[list[Work]], None],
        batch_done: Callable[[list[BatchRow], bool], None],
        copied: Callable[[Result], None] | None = None,
        places: Callable[[], int] | None = None,
    ) -> None:
        self._database = database
        self._worker = worker
        self._lease = lease
        self._recorded = recorded
        self._batch_done = batch_done
        self._copied = copied
        self._places = places
        self._pending: list[Result] = []
        self._pending_bytes = 0
        self._committing_bytes = 0
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self.has_room = True
        self._closing = False
        self.count = 0
        self.seconds = Histogram(COMMIT_SECONDS)
        self.sizes = Histogram(COMMIT_RESULTS)

    def add(self, result: Result) -> None:
        """Take a result; it is recorded soon."""
        if result.work.copies:
            assert self._copied is not None
            self._copied(result)
        self._pending.append(result)
        self._pending_bytes += len(result.line)
        self._arrived.set()
        if self._pending_bytes >= COMMIT_BYTES:
            self._full.set()
            if self._pending_bytes + self._committing_bytes >= MAX_BYTES:
                self._room.clear()
                self.has_room = False

    async def room(self) -> None:
        """Wait until results are recorded as fast as they come."""
        await self._room.wait()

    async def run(self) -> None:
        """Commit until `close`, and then what is left."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._pending:
                started = time.monotonic()
                await self._commit_pending()
                left = INTERVAL - (time.monotonic() - started)
                if left > 0 and not self._closing:
                    try:
                        async with asyncio.timeout(left):
                            await self._full.wait()
                    except TimeoutError:
                        pass
            if self._closing:
                return

    def hurry(self) -> None:
        """Commit what has been taken without waiting for more, which is not coming just now."""
        if self._pending:
            self._full.set()

    def close(self) -> None:
        """Let `run` end once everything is recorded."""
        self._closing = True
        self._arrived.set()
        self._full.set()

    async def _commit_pending(self) -> None:
        group, self._pending = self._pending, []
        self._committing_bytes, self._pending_bytes = self._pending_bytes, 0
        self._full.clear()
        failures = 0
        while True:
            began = time.monotonic()
            try:
                await self._commit(group)
                self.seconds.observe(time.monotonic() - began)
                self.sizes.observe(len(group))
                break
            except StoreError as error:
                failures += 1
                log.error(
                    "results cannot be recorded; they are kept and tried again",
                    results=len(group),
                    failures=failures,
                    reason=str(error),
                )
                if self._closing and failures > 3:
                    raise
                await asyncio.sleep(RETRY_PAUSE)
        if failures:
            log.info("results are recorded again", results=len(group))
        self._committing_bytes = 0
        if self._pending_bytes < MAX_BYTES:
            self._room.set()
            self.has_room = True
        self._recorded([result.work for result in group])

    async def _commit(self, group: list[Result]) -> None:
        """Record a group in one transaction: log, counts and plan move together."""
        by_shard: dict[LeasedShard, list[Result]] = defaultdict(list)
        for result in group:
            by_shard[result.work.shard].append(result)
        now = int(time.time())
        held: dict[LeasedShard, list[Result]] = {}
        left = False
        taken: list[BatchRow] = []
        places = 0 if self._places is None else self._places()

        async def record(connection: AsyncConnection) -> None:
            nonlocal left
            rows_held = await shards.held(connection, self._worker, [shard.id for shard in by_shard])
            for shard, items in by_shard.items():
                row_held = rows_held.get(shard.id)
                if row_held is None or row_held.epoch != shard.epoch:
                    log.warning("a lease was lost; its results are left to the new holder", batch=shard.batch_id)
                    continue
                new = _not_recorded(items, row_held.done)
                if new:
                    held[shard] = new
            if not held:
                return
            by_batch: dict[str, list[Result]] = defaultdict(list)
            for shard, items in held.items():
                by_batch[shard.batch_id].extend(items)
            rows = await batches.get_many(connection, list(by_batch), lock=True)
            free = places
            segments: list[Segment] = []
            changes: list[dict[str, object]] = []
            for id, row in rows.items():
                change, lines, error_file = _record_batch(row, by_batch[id], now)
                segments.extend(lines)
                changes.append(change)
                if change["status"] != row.status:
                    ended = msgspec.structs.replace(row, **change)
                    if (places if is_small(ended) else free) > 0:
                        free -= not is_small(ended)
                        change["lease_owner"], change["lease_until"] = self._worker, now + self._lease
                        taken.append(ended)
                    else:
                        left = True
                if error_file is not None:
                    await files.insert(connection, **error_file)
            await results.insert(connection, segments)
            await batches.change_many(connection, changes)
            for shard, items in held.items():
                shard.mark([result.work.place for result in items])
            await shards.record(
                connection,
                [{"shard": shard.id, "bits": bytes(shard.bits)} for shard in held if not _is_done(shard)],
                [shard.id for shard in held if _is_done(shard)],
            )

        await self._database.write_at_once(record)
        self.count += sum(map(len, held.values()))
        if taken or left:
            self._batch_done(taken, left)


def _not_recorded(items: list[Result], done: bytes | None) -> list[Result]:
    """The results that the table does not have yet: a commit that seemed to fail may have happened after all."""
    if done is None:
        return items
    return [result for result in items if not done[result.work.place >> 3] >> (result.work.place & 7) & 1]


def _is_done(shard: LeasedShard) -> bool:
    return int.from_bytes(shard.bits, "little").bit_count() >= shard.size


def _record_batch(
    row: BatchRow, items: list[Result], now: int
) -> tuple[dict[str, object], list[Segment], dict[str, object] | None]:
    """What a group's results do to their batch: its changed columns, the segments, and its error file if new."""
    usage = Usage(row.input_tokens, row.cached_tokens, row.output_tokens, row.reasoning_tokens)
    saved, copies = Usage(), 0
    lines: dict[Kind, list[Result]] = {"output": [], "error": []}
    for result in items:
        lines[result.kind].append(result)
        if result.saved is not None and result.kind == "output":
            copies += 1
            saved.add(result.saved)
    usage.add_all([result.usage for result in items if result.usage is not None])
    output = _segments(row.id, "output", row.output_lines, lines["output"])
    error = _segments(row.id, "error", row.error_lines, lines["error"])
    error_file = None
    error_id = row.error_file
    if lines["error"] and error_id is None:
        error_id = new_id()
        error_file = files.growing_file(
            id=error_id, owner=row.owner, purpose="batch_error", batch=row.id, created_at=now
        )
    completed = row.completed + len(lines["output"])
    failed = row.failed + len(lines["error"])
    change: dict[str, object] = {
        "id": row.id,
        "status": row.status,
        "finalizing_at": row.finalizing_at,
        "ending": row.ending,
        "lease_owner": row.lease_owner,
        "lease_until": row.lease_until,
        "completed": completed,
        "failed": failed,
        "output_lines": row.output_lines + len(lines["output"]),
        "output_bytes": row.output_bytes + sum(len(segment.body) for segment in output),
        "error_lines": row.error_lines + len(lines["error"]),
        "error_bytes": row.error_bytes + sum(len(segment.body) for segment in error),
        "error_file": error_id,
        "errors": _with_reasons(row.errors, lines["error"]),
        "input_tokens": usage.input_tokens,
        "cached_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "deduplicated": row.deduplicated + copies,
        "deduplicated_input_tokens": row.deduplicated_input_tokens + saved.input_tokens,
        "deduplicated_output_tokens": row.deduplicated_output_tokens + saved.output_tokens,
    }
    change |= lifecycle.recorded(row.status, total=row.total, completed=completed, failed=failed, now=now) or {}
    return change, output + error, error_file


def _with_reasons(errors: bytes | None, items: list[Result]) -> bytes | None:
    """A batch's errors with the reasons for which requests were not sent, each once."""
    reasons = {result.reason for result in items if result.reason is not None}
    if not reasons:
        return errors
    known = [] if errors is None else batches.decode_errors(errors)
    texts = {error.message for error in known}
    new = [BatchError(code=reason.code, message=reason.message) for reason in reasons if reason.message not in texts]
    return batches.encode_errors((known + new)[:MAX_REASONS])


def _segments(batch: str, kind: Kind, position: int, items: list[Result]) -> list[Segment]:
    """The lines of a group as segments of at most about `COMMIT_BYTES`."""
    segments = []
    while items:
        ends = list(accumulate([len(result.line) for result in items]))
        taken = bisect_left(ends, COMMIT_BYTES) + 1
        some = items[:taken]
        segments.append(
            Segment(
                batch_id=batch,
                kind=kind,
                position=position,
                requests=array("I", [result.work.request for result in some]),
                ends=array("I", ends[:taken]),
                attempts=array("I", [result.work.tries.attempts for result in some]),
                body=b"".join([result.line for result in some]),
            )
        )
        position += len(some)
        items = items[taken:]
    return segments
