"""`BatchJob` for programs that run in an event loop: the same job, awaited."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from batchery.client.job import Progress
from batchery.client.objects import Batch
from batchery.client.receipt import Receipt
from batchery.sdk.job import BatchJob
from batchery.sdk.landing import Landing
from batchery.sdk.row_result import RowResult

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

T = TypeVar("T")

LOOK = 0.5  # seconds that a thread waits at a time, so that none is held long after its task was cancelled


class AsyncBatchJob(Generic[T]):
    """One job. `AsyncClient.run` makes it; see `BatchJob`.

    Cancelling a task that waits for it leaves the job running.
    """

    def __init__(self, job: BatchJob[T]) -> None:
        self._job = job

    async def __aiter__(self) -> AsyncIterator[RowResult[T]]:
        """Each row once: those that succeed as they land, then, in order, the rest."""
        with contextlib.closing(Landing(self._job)) as landing:
            while True:
                found = await asyncio.to_thread(landing.next, LOOK)
                if isinstance(found, RowResult):
                    yield found
                elif found is not None:
                    return

    def __repr__(self) -> str:
        return f"<Async{repr(self._job)[1:]}"

    def _repr_html_(self) -> str:
        return self._job._repr_html_()

    @property
    def name(self) -> str:
        """Of the job."""
        return self._job.name

    @property
    def output(self) -> Path:
        """The file with an outcome for each row, in order, once the job has ended."""
        return self._job.output

    @property
    def progress(self) -> Progress | None:
        """Where it is; None before the server was reached."""
        return self._job.progress

    @property
    def done(self) -> bool:
        """Whether it has ended, however."""
        return self._job.done

    @property
    def status(self) -> str:
        """As `BatchJob.status`."""
        return self._job.status

    @property
    def batch_ids(self) -> list[str]:
        """The batches that it has at the server so far."""
        return self._job.batch_ids

    async def wait(self) -> None:
        """Wait for the end; raises what stopped the job."""
        while not await asyncio.to_thread(self._job.wait, LOOK):
            pass

    async def results(self) -> list[RowResult[T]]:
        """Every row's outcome, exactly one each, in the order of the rows."""
        await self.wait()
        return await asyncio.to_thread(self._job.results)

    async def failed(self) -> list[RowResult[T]]:
        """The outcomes that are not `ok`, in order."""
        await self.wait()
        return await asyncio.to_thread(self._job.failed)

    async def receipt(self) -> Receipt:
        """What came of it: rows, tokens, cost, time."""
        await self.wait()
        return self._job.receipt()

    async def retry(self) -> AsyncBatchJob[T]:
        """Run again what has not succeeded and may yet; see `BatchJob.retry`."""
        await self.wait()
        await asyncio.to_thread(self._job.retry)
        return self

    async def cancel(self) -> list[Batch]:
        """Cancel its batches; what is finished is kept."""
        return await asyncio.to_thread(self._job.cancel)

    async def close(self) -> None:
        """Stop following; the same `run` goes on later."""
        await asyncio.to_thread(self._job.close)

    async def to_records(self) -> list[dict[str, Any]]:
        """The outcomes as flat records; see `BatchJob.to_records`."""
        await self.wait()
        return await asyncio.to_thread(self._job.to_records)

    async def to_pandas(self) -> pd.DataFrame:
        """The outcomes as a DataFrame of pandas."""
        await self.wait()
        return await asyncio.to_thread(self._job.to_pandas)

    async def to_polars(self) -> pl.DataFrame:
        """The outcomes as a DataFrame of polars."""
        await self.wait()
        return await asyncio.to_thread(self._job.to_polars)

    async def to_parquet(self, path: str | Path) -> Path:
        """Write the outcomes as a Parquet file."""
        await self.wait()
        return await asyncio.to_thread(self._job.to_parquet, path)

    async def to_csv(self, path: str | Path) -> Path:
        """Write the outcomes as a CSV file."""
        await self.wait()
        return await asyncio.to_thread(self._job.to_csv, path)
