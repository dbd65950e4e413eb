"""The rows of a job as they land, each once, for whoever goes through them."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from batchery.client.join import outcome_of
from batchery.client.results import Cause, read_result
from batchery.sdk.row_index import RowIndex
from batchery.sdk.row_result import RowResult, read_row

T = TypeVar("T")


class Landed(Protocol[T]):
    """What a job gives of its results; see `BatchJob`."""

    schema: Any

    def subscribe(self) -> queue.SimpleQueue[bytes]: ...
    def unsubscribe(self, landed: queue.SimpleQueue[bytes]) -> None: ...
    def wait(self, timeout: float | None = None) -> bool: ...
    def lines(self) -> Iterator[RowResult[T]]: ...
    def row_index(self) -> RowIndex | None: ...


class Landing(Generic[T]):
    """The rows of a job, each once, as they land. Close it at the end.

    Args:
        job: the job.
    """

    def __init__(self, job: Landed[T]) -> None:
        self._job = job
        self._queue: queue.SimpleQueue[bytes] | None = job.subscribe()
        self._rows: RowIndex | None = None
        self._given: set[str] = set()
        self._rest: Iterator[RowResult[T]] = iter(())

    def next(self, timeout: float) -> RowResult[T] | StopIteration | None:
        """The next row; a `StopIteration` at the end; None if there is nothing new after so many seconds.

        Raises:
            ClientError: the job was stopped by this.
        """
        if self._queue is not None:
            try:
                while line := self._queue.get(timeout=timeout):
                    found = self._of_line(line)
                    if found is not None:
                        return found
            except queue.Empty:
                return None
            self._queue = None
            self._job.wait()
            self._rest = self._job.lines()
        for result in self._rest:
            if result.custom_id not in self._given:
                return result
        return StopIteration()

    def close(self) -> None:
        """Let go of it."""
        if self._queue is not None:
            self._job.unsubscribe(self._queue)
        if self._rows is not None:
            self._rows.__exit__(None, None, None)

    def _of_line(self, line: bytes) -> RowResult[T] | None:
        """The row's outcome, if the line settles it: what failed may be run again, and is told at the end."""
        result = read_result(line)
        if result.cause is not Cause.ok or result.custom_id is None or result.custom_id in self._given:
            return None
        if self._rows is None:
            self._rows = self._job.row_index()
        if self._rows is None:
            return None
        row = self._rows.get(result.custom_id)
        if row is None:
            return None
        self._given.add(result.custom_id)
        outcome = msgspec.json.encode(outcome_of(row, line, result.cause), enc_hook=str)
        return read_row(outcome, self._job.schema)
