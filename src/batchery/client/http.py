"""The raw calls: one method for each thing asked of a server, with retries inside and typed errors outside.

It never follows a redirect (a key must not travel to another host), never holds a file in memory, and never retries
what could cost money twice without asking first whether it has already happened.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import msgspec
from pyreqwest.client import SyncClient, SyncClientBuilder
from pyreqwest.exceptions import ClientClosedError
from pyreqwest.multipart import FormBuilder, PartBuilder
from pyreqwest.request import SyncRequestBuilder
from pyreqwest.response import SyncResponse

from batchery import __version__
from batchery.client.errors import ApiError, ClientError, ConnectionLostError, DetachedError
from batchery.client.events import Event, read_events
from batchery.client.exchange import Content, TryFailedError, exchange, opened, retry_after
from batchery.client.objects import Batch, read_batch, read_batches, read_file_id
from batchery.client.retry import Patience, pause_before_retry
from batchery.client.server import Server

CONNECT_TIMEOUT = timedelta(seconds=5)
READ_TIMEOUT = timedelta(seconds=120)  # between two pieces of an answer; longer than any `Prefer: wait`
SLOWEST_UPLOAD = 20_000  # bytes a second; an upload slower than this is given up
CHUNK = 256 * 1024
LOOK_BACK_PAGES = 5

T = TypeVar("T")


class Readable(Protocol):
    """What an upload reads from: an open file, or something that looks like one."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, at most so many; none at the end."""


OpenFile = Callable[[], AbstractContextManager[Readable]]


class Look(msgspec.Struct, frozen=True):
    """A look at a batch.

    Attributes:
        value: the decoded answer, for `read_batch`.
        heeded: the server says that it heeded the wish to wait.
        advice: seconds after which the server wants to be asked again, where it says so.
    """

    value: Any
    heeded: bool = False
    advice: float | None = None


class Api:
    """Calls to one server. Blocking; `close` may be called from any thread and ends what is under way.

    Args:
        server: where, and with which key.
        patience: how long one call is tried.
    """

    def __init__(self, server: Server, patience: Patience | None = None) -> None:
        self.server = server
        self._patience = patience or Patience()
        self._closed = threading.Event()
        self._answered = False
        # The read timeout runs from the start of a request to its answer, so an upload needs a client without one.
        self._client = _builder(server).read_timeout(READ_TIMEOUT).build()
        self._upload_client = _builder(server).build()

    def close(self) -> None:
        """End every call under way, and every pause, with `DetachedError`."""
        self._closed.set()
        for client in (self._client, self._upload_client):
            client.close()

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._closed.is_set()

    def pause(self, seconds: float) -> None:
        """Wait, unless the client is closed meanwhile.

        Raises:
            DetachedError: it was.
        """
        if self._closed.wait(seconds):
            raise DetachedError("stopped while waiting")

    def upload(self, name: str, size: int, open_file: OpenFile, key: str, on_sent: Callable[[int], None]) -> str:
        """`POST /files`, streamed: memory stays flat.

        Args:
            name: the file's name at the server.
            size: bytes.
            open_file: opens the file anew for each try.
            key: the `Idempotency-Key`; the same for every try of the same file.
            on_sent: told how many bytes of the file have been handed over so far; falls back to 0 on a retry.

        Returns:
            The file's id.
        """
        timeout = timedelta(seconds=600 + size / SLOWEST_UPLOAD)

        def build() -> SyncRequestBuilder:
            part = PartBuilder.from_stream_with_length(_pieces(open_file, on_sent), size)
            form = FormBuilder().text("purpose", "batch")
            form = form.part("file", part.file_name(name).mime("application/jsonl"))
            request = self._request(self._upload_client, "POST", "/files").timeout(timeout)
            return request.header("Idempotency-Key", key).multipart(form)

        return read_file_id(self._json(build, "uploading the input")[0])

    def create_batch(
        self,
        *,
        file_id: str,
        endpoint: str,
        window: str,
        metadata: dict[str, str],
        key: str,
        tag: str,
        deduplicate: bool = False,
    ) -> Batch:
        """`POST /batches`. Where a try may have reached the server without its answer reaching us, the server is asked
        for the batch with our tag before the next, so that a server without idempotency keys does not make two.

        Args:
            file_id: the uploaded input.
            endpoint: the url its lines are for.
            window: the completion window, such as `24h`.
            metadata: the user's; it must hold the tag.
            key: the `Idempotency-Key`.
            tag: the value of `metadata["batchery"]`.
            deduplicate: ask for identical deterministic requests to be sent once. A server that does it answers with a
                batch that has `deduplicated`.
        """
        # An option that was not asked for is not named, since a server may refuse what it does not know.
        extension = {"deduplicate": True} if deduplicate else {}
        body = msgspec.json.encode(
            {
                "input_file_id": file_id,
                "endpoint": endpoint,
                "completion_window": window,
                "metadata": metadata,
                **extension,
            }
        )

        def attempt() -> Batch:
            request = self._request(self._client, "POST", "/batches").header("Idempotency-Key", key)
            return read_batch(exchange(request.header("Content-Type", "application/json").body_bytes(body))[0])

        try:
            return self._try(attempt, "creating the batch", before_retry=lambda: self.find_batch(tag))
        except ApiError as error:
            if error.param in extension:
                error.args = (f"{error}. This server does not take --deduplicate; leave it out", *error.args[1:])
            raise

    def find_batch(self, tag: str) -> Batch | None:
        """The batch with this tag among the newest 500, or None. A server that cannot list has none."""
        after: str | None = None
        for _ in range(LOOK_BACK_PAGES):
            query = {"limit": "100"} if after is None else {"limit": "100", "after": after}
            try:
                page, more = read_batches(self._get("/batches", "listing batches", query=query)[0])
            except ApiError as error:
                if error.status in (400, 404, 405, 501):
                    return None
                raise
            found = next((batch for batch in page if batch.tag == tag), None)
            if found is not None or not more or not page:
                return found
            after = page[-1].id
        return None

    def get_batch(self, batch_id: str, wait: int = 0) -> Look:
        """`GET /batches/{id}`.

        Args:
            batch_id: which.
            wait: ask the server to hold its answer until something changes, at most so many seconds; 0 for at once.
        """
        headers = {"Prefer": f"wait={wait}"} if wait else {}
        value, response = self._get(_batch(batch_id), "asking for the batch", headers=headers)
        heeded = "wait" in (response.get_header("preference-applied") or "").lower()
        return Look(value, heeded, retry_after(response))

    def retry_batch(self, batch_id: str) -> Batch:
        """`POST /batches/{id}/retry`: run what has not succeeded again. Tried once only, since a try whose answer was
        lost may have been heard.

        Raises:
            ApiError: the server cannot (404 or 405), or there is nothing to run (400), or it runs already (409).
        """
        return read_batch(self.call("POST", _batch(batch_id, "/retry"), "running a batch again", once=True))

    def cancel_batch(self, batch_id: str) -> Batch:
        """`POST /batches/{id}/cancel`; doing it again does no harm."""
        return read_batch(self.call("POST", _batch(batch_id, "/cancel"), "cancelling the batch"))

    @contextmanager
    def events(self, batch_id: str, last_id: str) -> Iterator[Iterator[Event] | None]:
        """`GET /batches/{id}/events`, as it comes; None where the server has no such thing, or no more to tell.

        Args:
            batch_id: which.
            last_id: the last event that was seen, to go on behind it; empty to begin.
        """

        def attempt() -> tuple[ExitStack, SyncResponse]:
            request = self._request(self._client, "GET", _batch(batch_id, "/events"))
            request = request.header("Accept", "text/event-stream").streamed_read_buffer_limit(0)
            if last_id:
                request = request.header("Last-Event-ID", last_id)
            with ExitStack() as stack:
                response = stack.enter_context(opened(request))
                return stack.pop_all(), response

        stack, response = self._try(attempt, "following the batch")
        with stack:
            kind = (response.get_header("content-type") or "").lower()
            is_stream = response.status == 200 and kind.startswith("text/event-stream")
            yield read_events(Content(response).chunks()) if is_stream else None

    def call(
        self,
        method: str,
        path: str,
        doing: str,
        *,
        query: dict[str, str] | None = None,
        body: Any = None,
        headers: dict[str, str] | None = None,
        once: bool = False,
    ) -> Any:
        """Any call that is answered with JSON or with nothing.

        Args:
            method: of HTTP.
            path: behind the base URL.
            doing: what is being done, for messages.
            query, headers: of the request.
            body: sent as JSON, if given.
            once: do not try again, whatever happens.

        Returns:
            The decoded answer; None for an empty one.
        """

        def build() -> SyncRequestBuilder:
            request = self._request(self._client, method, path).query(query or {}).headers(headers or {})
            if body is not None:
                request = request.header("Content-Type", "application/json").body_bytes(msgspec.json.encode(body))
            return request

        return self._json(build, doing, once=once)[0]

    def models(self) -> tuple[Any, str | None]:
        """`GET /models`: the decoded answer, and the server's `Date`."""
        value, response = self._get("/models", "asking for the models")
        return value, response.get_header("date")

    @contextmanager
    def content(self, file_id: str, after: int = 0) -> Iterator[Content]:
        """`GET /files/{id}/content`, streamed.

        Args:
            file_id: which.
            after: start after so many lines, on a server that can; 0 asks for the whole file in the plain way.
        """

        def attempt() -> tuple[ExitStack, SyncResponse]:
            request = self._request(self._client, "GET", f"/files/{quote(file_id, safe='')}/content")
            # By default the first 64 KiB are read ahead, and lost if the body breaks off in them.
            request = request.streamed_read_buffer_limit(0)
            if after:
                request = request.query({"offset": str(after), "skip": str(after)})
            with ExitStack() as stack:
                response = stack.enter_context(opened(request))
                return stack.pop_all(), response

        stack, response = self._try(attempt, "fetching results")
        with stack:
            yield Content(response)

    def _get(
        self, path: str, doing: str, *, query: dict[str, str] | None = None, headers: dict[str, str] | None = None
    ) -> tuple[Any, SyncResponse]:
        def build() -> SyncRequestBuilder:
            return self._request(self._client, "GET", path).query(query or {}).headers(headers or {})

        return self._json(build, doing)

    def _json(
        self, build: Callable[[], SyncRequestBuilder], doing: str, *, once: bool = False
    ) -> tuple[Any, SyncResponse]:
        return self._try(lambda: exchange(build()), doing, once=once)

    def _request(self, client: SyncClient, method: str, path: str) -> SyncRequestBuilder:
        request = client.request(method, self.server.base_url + path)
        if self.server.api_key is not None:
            request = request.header("Authorization", f"Bearer {self.server.api_key}", is_sensitive=True)
        return request

    def _try(
        self,
        attempt: Callable[[], T],
        doing: str,
        before_retry: Callable[[], T | None] | None = None,
        *,
        once: bool = False,
    ) -> T:
        """Call `attempt` until it succeeds, fails for good, or patience ends.

        Args:
            attempt: one try; fails with `TryFailedError`.
            doing: what is being done, for the message of a lost connection.
            before_retry: called before each further try whose forerunner may have been heard; what it returns, if
                anything, is the answer.
            once: never try again.
        """
        began, tries = time.monotonic(), 0
        while True:
            if self._closed.is_set():
                raise DetachedError(f"stopped while {doing}")
            try:
                result = attempt()
            except ClientClosedError:
                raise DetachedError(f"stopped while {doing}") from None
            except TryFailedError as failed:
                failure, error, tries = failed.failure, failed.error, tries + 1
            else:
                self._answered = True
                return result
            pause = pause_before_retry(
                failure,
                self._patience,
                tries=tries,
                elapsed=time.monotonic() - began,
                answered=self._answered,
                jitter=random.random(),  # noqa: S311 - spreads retries, guards nothing
            )
            self._answered = self._answered or failure.status is not None
            if pause is None or once:
                if failure.status is None:
                    raise ConnectionLostError(f"{doing} at {self.server.base_url} failed: {error}")
                raise self._without_key(error)
            self.pause(pause)
            unheard = failure.status is not None and failure.status < 500
            if before_retry is not None and not unheard and (found := before_retry()) is not None:
                return found

    def _without_key(self, error: ClientError) -> ClientError:
        """The error, without the key in it: some servers say which one they refuse."""
        key = self.server.api_key
        if key is not None and key in str(error):
            error.args = (str(error).replace(key, "[key]"), *error.args[1:])
        return error


def _builder(server: Server) -> SyncClientBuilder:
    builder = (
        SyncClientBuilder()
        .user_agent(f"batchery/{__version__}")
        .follow_redirects(False)
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_keepalive(timedelta(seconds=30))
        .tcp_user_timeout(READ_TIMEOUT)
    )
    # A proxy named in the environment knows nothing of this machine's loopback.
    return builder.no_proxy() if server.is_local else builder


def _batch(batch_id: str, action: str = "") -> str:
    return f"/batches/{quote(batch_id, safe='')}{action}"


def _pieces(open_file: OpenFile, on_sent: Callable[[int], None]) -> Iterator[bytes]:
    sent = 0
    on_sent(0)
    with open_file() as file:
        while piece := file.read(CHUNK):
            yield piece
            sent += len(piece)
            on_sent(sent)
