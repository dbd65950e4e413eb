"""The Files and Batch API as they are, typed: one method for each call."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from batchery.client.cancelling import cancelled
from batchery.client.errors import SettingsError, UnexpectedAnswerError
from batchery.client.http import Api
from batchery.client.inputs import open_input
from batchery.client.objects import Batch, read_batch, read_batches
from batchery.client.retry_batch import retry_batch
from batchery.sdk.errors import in_words_of_programs


class File(msgspec.Struct, frozen=True):
    """A file at a server; None where it does not say.

    Attributes:
        bytes: its size.
        created_at, expires_at: Unix seconds.
    """

    id: str
    filename: str | None = None
    purpose: str | None = None
    bytes: int | None = None
    status: str | None = None
    created_at: int | None = None
    expires_at: int | None = None


class Files:
    """The Files API.

    Args:
        api: the server.
    """

    def __init__(self, api: Api) -> None:
        self._api = api

    def upload(self, source: str | os.PathLike[str] | bytes, *, filename: str | None = None) -> File:
        """`POST /files` with the purpose `batch`, streamed; a path, or the content itself.

        Raises:
            ClientError: it was refused, or the server cannot be reached.
        """
        with in_words_of_programs():
            if isinstance(source, bytes):
                size, name = len(source), filename or "requests.jsonl"
                opened: Any = lambda: io.BytesIO(source)  # noqa: E731
            else:
                path = Path(source)
                with open_input(path) as file:
                    size = file.seek(0, 2)
                name = filename or path.name
                opened = lambda: open_input(path)  # noqa: E731
            if not size:
                raise SettingsError("the file is empty")
            file_id = self._api.upload(name, size, opened, f"upload-{uuid.uuid4()}", lambda _: None)
        return self.retrieve(file_id)

    def retrieve(self, file_id: str) -> File:
        """`GET /files/{id}`."""
        with in_words_of_programs():
            return _file(self._api.call("GET", f"/files/{quote(file_id, safe='')}", "asking for the file"))

    def list(self, *, purpose: str | None = None, limit: int = 100, after: str | None = None) -> list[File]:
        """`GET /files`, the newest first: one page.

        Args:
            purpose: only these.
            limit: at most so many.
            after: those behind the file with this id.
        """
        query = {"limit": str(limit)} | {k: v for k, v in (("purpose", purpose), ("after", after)) if v}
        with in_words_of_programs():
            value = self._api.call("GET", "/files", "listing files", query=query)
        rows = value if isinstance(value, list) else value.get("data") if isinstance(value, dict) else None
        if not isinstance(rows, list):
            raise UnexpectedAnswerError("the server's answer is not a list of files")
        return [_file(row) for row in rows]

    def content(self, file_id: str) -> bytes:
        """`GET /files/{id}/content`, whole; `stream` holds only a piece at a time."""
        return b"".join(self.stream(file_id))

    def stream(self, file_id: str, *, after: int = 0) -> Iterator[bytes]:
        """`GET /files/{id}/content`, piece by piece.

        Args:
            file_id: which.
            after: start after so many lines, on a server that can.
        """
        with in_words_of_programs(), self._api.content(file_id, after) as found:
            yield from found.chunks()

    def delete(self, file_id: str) -> None:
        """`DELETE /files/{id}`."""
        with in_words_of_programs():
            self._api.call("DELETE", f"/files/{quote(file_id, safe='')}", "deleting the file")


class Batches:
    """The Batch API.

    Args:
        api: the server.
    """

    def __init__(self, api: Api) -> None:
        self._api = api

    def create(
        self,
        input_file_id: str,
        *,
        endpoint: str = "/v1/chat/completions",
        window: str = "24h",
        metadata: dict[str, str] | None = None,
        deduplicate: bool = False,
    ) -> Batch:
        """`POST /batches`, once whatever happens: it has an idempotency key, and a tag to find it again by.

        Args:
            input_file_id: the uploaded input.
            endpoint: the url of its lines.
            window: the completion window.
            metadata: your own.
            deduplicate: have identical requests that leave nothing to chance sent once; on a server that does so the
                batch has `deduplicated`.
        """
        key = f"batch-{uuid.uuid4()}"
        with in_words_of_programs():
            return self._api.create_batch(
                file_id=input_file_id,
                endpoint=endpoint,
                window=window,
                metadata={**(metadata or {}), "batchery": key},
                key=key,
                tag=key,
                deduplicate=deduplicate,
            )

    def retrieve(self, batch_id: str, *, wait: int = 0) -> Batch:
        """`GET /batches/{id}`.

        Args:
            batch_id: which.
            wait: have the server hold its answer until something changes, at most so many seconds, where it can.
        """
        with in_words_of_programs():
            return read_batch(self._api.get_batch(batch_id, wait).value)

    def list(self, *, limit: int = 20, after: str | None = None) -> list[Batch]:
        """`GET /batches`, the newest first: one page."""
        query = {"limit": str(limit)} | ({"after": after} if after else {})
        with in_words_of_programs():
            return read_batches(self._api.call("GET", "/batches", "listing batches", query=query))[0]

    def cancel(self, batch_id: str) -> Batch:
        """`POST /batches/{id}/cancel`; one that is over stays as it is."""
        with in_words_of_programs():
            return cancelled(self._api, batch_id)

    def retry(self, batch_id: str) -> Batch:
        """Run again what has not succeeded: by the server itself where it can, else as a new batch."""
        with in_words_of_programs():
            return retry_batch(self._api, batch_id)


def _file(value: Any) -> File:
    if not isinstance(value, dict) or not isinstance(value.get("id"), str):
        raise UnexpectedAnswerError("the server's answer is not a file: it has no id")
    texts = {name: value[name] for name in ("filename", "purpose", "status") if isinstance(value.get(name), str)}
    numbers = {n: value[n] for n in ("bytes", "created_at", "expires_at") if type(value.get(n)) is int}
    return File(value["id"], **texts, **numbers)
