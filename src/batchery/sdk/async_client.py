"""`Client` for programs that run in an event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TypeVar, Unpack, overload

from batchery.client.objects import Batch
from batchery.sdk.async_job import AsyncBatchJob
from batchery.sdk.client import FOLDER, Checked, Client, RunOptions
from batchery.sdk.raw import File

T = TypeVar("T")


class AsyncClient:
    """A batch server, and the jobs, checks and raw calls that go to it; the arguments are those of `Client`."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        server: str | None = None,
        upstream: str | None = None,
        upstream_key_env: str | None = None,
        max_in_flight: int | None = None,
        folder: str | os.PathLike[str] = FOLDER,
        progress: bool | None = None,
    ) -> None:
        self._client = Client(
            base_url,
            api_key=api_key,
            server=server,
            upstream=upstream,
            upstream_key_env=upstream_key_env,
            max_in_flight=max_in_flight,
            folder=folder,
            progress=progress,
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop following the jobs that run, which can be gone on with, and end the raw calls."""
        await asyncio.to_thread(self._client.close)

    @property
    def files(self) -> AsyncFiles:
        """The Files API of the server."""
        return AsyncFiles(self._client)

    @property
    def batches(self) -> AsyncBatches:
        """The Batch API of the server."""
        return AsyncBatches(self._client)

    async def models(self) -> list[str]:
        """The models that the server has."""
        return await asyncio.to_thread(self._client.models)

    @overload
    async def run(self, rows: Any, *, schema: type[T], **options: Unpack[RunOptions]) -> AsyncBatchJob[T]: ...
    @overload
    async def run(
        self, rows: Any, *, schema: Mapping[str, Any] | str | None = None, **options: Unpack[RunOptions]
    ) -> AsyncBatchJob[Any]: ...
    async def run(self, rows: Any, *, schema: Any = None, **options: Unpack[RunOptions]) -> AsyncBatchJob[Any]:
        """Run rows as batches; see `Client.run`. Returns once all rows are checked and the job is on its way."""
        return AsyncBatchJob(await asyncio.to_thread(lambda: self._client.run(rows, schema=schema, **options)))

    async def check(self, rows: Any, **options: Any) -> Checked:
        """Look at rows, offline; see `Client.check`."""
        return await asyncio.to_thread(self._client.check, rows, **options)


class AsyncFiles:
    """The Files API; see `Files`."""

    def __init__(self, client: Client) -> None:
        self._files = client.files

    async def upload(self, source: str | os.PathLike[str] | bytes, *, filename: str | None = None) -> File:
        """`POST /files` with the purpose `batch`."""
        return await asyncio.to_thread(self._files.upload, source, filename=filename)

    async def retrieve(self, file_id: str) -> File:
        """`GET /files/{id}`."""
        return await asyncio.to_thread(self._files.retrieve, file_id)

    async def list(self, *, purpose: str | None = None, limit: int = 100, after: str | None = None) -> list[File]:
        """`GET /files`, the newest first: one page."""
        return await asyncio.to_thread(self._files.list, purpose=purpose, limit=limit, after=after)

    async def content(self, file_id: str) -> bytes:
        """`GET /files/{id}/content`, whole."""
        return await asyncio.to_thread(self._files.content, file_id)

    async def delete(self, file_id: str) -> None:
        """`DELETE /files/{id}`."""
        await asyncio.to_thread(self._files.delete, file_id)


class AsyncBatches:
    """The Batch API; see `Batches`."""

    def __init__(self, client: Client) -> None:
        self._batches = client.batches

    async def create(
        self,
        input_file_id: str,
        *,
        endpoint: str = "/v1/chat/completions",
        window: str = "24h",
        metadata: dict[str, str] | None = None,
        deduplicate: bool = False,
    ) -> Batch:
        """`POST /batches`, once whatever happens."""
        return await asyncio.to_thread(
            self._batches.create,
            input_file_id,
            endpoint=endpoint,
            window=window,
            metadata=metadata,
            deduplicate=deduplicate,
        )

    async def retrieve(self, batch_id: str, *, wait: int = 0) -> Batch:
        """`GET /batches/{id}`."""
        return await asyncio.to_thread(self._batches.retrieve, batch_id, wait=wait)

    async def list(self, *, limit: int = 20, after: str | None = None) -> list[Batch]:
        """`GET /batches`, the newest first: one page."""
        return await asyncio.to_thread(self._batches.list, limit=limit, after=after)

    async def cancel(self, batch_id: str) -> Batch:
        """`POST /batches/{id}/cancel`; one that is over stays as it is."""
        return await asyncio.to_thread(self._batches.cancel, batch_id)

    async def retry(self, batch_id: str) -> Batch:
        """Run again what has not succeeded."""
        return await asyncio.to_thread(self._batches.retry, batch_id)
