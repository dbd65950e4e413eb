"""`GET /batches/{id}/events`: a batch as it runs, as server-sent events.

A stream says the batch's status first, then what changes, and ends after a status that is terminal, which is always its
last event. Each event's id says which result lines have been sent, so that a stream that breaks off goes on without
losing or repeating one. Nothing is queued for a slow reader: it is told the latest state when it is ready for it, and
lines are read from the growing files as it takes them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, cast

import msgspec
import structlog
from litestar import Response, get
from litestar.params import FromPath
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Send

from batchery.server.batches import owned_batch
from batchery.server.content import Slice, stream
from batchery.server.context import AnyRequest, Context, context_of, owner_of
from batchery.server.exchange import is_head
from batchery.server.parameters import parameters_of
from batchery.server.places import Downloads
from batchery.server.render import batch_object
from batchery.server.watch import Hub, check_key, gone, hub_of
from batchery.store import files
from batchery.store.batches import BatchRow
from batchery.store.errors import StoreError
from batchery.store.files import FileRow
from batchery.store.schema import ENDED
from batchery.wire import ids
from batchery.wire.errors import BadRequest, TooManyRequests, Unauthorized
from batchery.wire.objects import BatchObject, BatchUsage, RequestCounts
from batchery.wire.results import Kind

EVENT_STREAM = "text/event-stream"
RECONNECT_MS = 2_000
"""After how long a client whose stream broke off is to come back."""

KEEP_ALIVE = 15.0
"""Seconds without an event after which a comment is sent, so that nothing in between takes the stream for dead."""

RETRY = 2.0
"""Seconds until a store that could not be read is read again."""

LAST_PATIENCE = 1.0
"""Seconds that a client gets to take what is on its way once the server stops."""

PIECE = 64 * 1024
"""About so many bytes of events are sent at a time."""

FULL_RETRY_AFTER = 30
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

_POSITION = re.compile(r"o([0-9]{1,15})-e([0-9]{1,15})(?:-([0-9a-f]{32}))?(-end)?", re.ASCII)

Pieces = AsyncGenerator[bytes, None]

log = structlog.get_logger()


class CountsEvent(msgspec.Struct, kw_only=True):
    """The data of a `counts` event."""

    id: str
    request_counts: RequestCounts
    usage: BatchUsage | None
    estimated_completion_at: int | None


class LinesEvent(msgspec.Struct, kw_only=True):
    """The data of a `lines` event: how long the files are."""

    id: str
    output_file_id: str
    error_file_id: str | None
    output_lines: int
    error_lines: int


class DeletedEvent(msgspec.Struct, kw_only=True):
    """The data of a `deleted` event."""

    id: str


EVENTS = (CountsEvent, LinesEvent, DeletedEvent)


class Position(msgspec.Struct, frozen=True):
    """How far a stream is, as its events' ids say: `o120-e3-<error file>`, and `-end` behind a terminal status.

    Attributes:
        output: lines of the output file that have been sent.
        errors: lines of the error file that have been sent.
        error_file: which error file that is, since a batch that is retried gets another; None before there is one.
        ended: the terminal status has been sent.
    """

    output: int = 0
    errors: int = 0
    error_file: str | None = None
    ended: bool = False

    def __str__(self) -> str:
        file = "" if self.error_file is None else f"-{self.error_file}"
        return f"o{self.output}-e{self.errors}{file}{'-end' if self.ended else ''}"


def parse_position(text: str) -> Position:
    """Read an event's id.

    Raises:
        BadRequest: it is none of ours.
    """
    match = _POSITION.fullmatch(text)
    if match is None or (int(match[2]) > 0 and match[3] is None):
        raise BadRequest(
            f"Last-Event-ID must be the id of an event of this batch, such as o120-e0, not {text[:100]!r}; leave it "
            "out to begin at the beginning.",
            param="last_event_id",
            code="invalid_value",
        )
    return Position(int(match[1]), int(match[2]), match[3], match[4] is not None)


@get("/batches/{id:str}/events")
async def get_events(request: AnyRequest, id: FromPath[str]) -> Response[Any]:
    """Follow a batch: its status, its counts and, with `lines=true`, its results, as server-sent events."""
    context, hub = context_of(request), hub_of(request)
    parameters = parameters_of(request)
    with_lines = parameters.flag("lines")
    last = request.headers.get("last-event-id") or parameters.text("last_event_id")
    position = parse_position(last) if last else Position()
    async with context.database.read() as connection:
        row = await owned_batch(connection, id, owner_of(request))
        output = await files.get(connection, row.output_file)
        errors = None if position.error_file is None else await files.get(connection, position.error_file)
    if position.error_file != row.error_file and not _is_former(errors, row):
        position, errors = msgspec.structs.replace(position, errors=0, error_file=None), None
    if (output is not None and position.output > output.lines) or (
        errors is not None and position.errors > errors.lines
    ):
        raise BadRequest(
            f"Last-Event-ID {last!r} is beyond the end of this batch's files; it must be the id of one of its events.",
            param="last_event_id",
            code="invalid_value",
        )
    if _has_everything(position, row, output, errors, with_lines=with_lines):
        return Response(None, status_code=204, headers=HEADERS)
    if is_head(request):
        return Response(b"", headers=HEADERS, media_type=EVENT_STREAM)
    if hub.is_full:
        raise TooManyRequests(
            f"{hub.watching} requests wait for batches to change, the most that this server takes at a time. Ask for "
            "the batch itself now and then, or come back later.",
            retry_after=FULL_RETRY_AFTER,
            code="too_many_streams",
        )
    downloads: Downloads | None = request.app.state.downloads if with_lines else None
    feed = Feed(context, hub, row, position, downloads=downloads, check=partial(check_key, request))
    return EventStream(feed.events(), context.stopping)


def _is_former(file: FileRow | None, row: BatchRow) -> bool:
    """Whether this is an error file that the batch had before it was retried."""
    return file is not None and file.batch_id == row.id and file.purpose == "batch_error"


def _has_everything(
    position: Position, row: BatchRow, output: FileRow | None, errors: FileRow | None, *, with_lines: bool
) -> bool:
    """Whether a stream from this position on would say nothing new, however long it was held open."""
    if not position.ended or row.status not in ENDED or position.error_file != row.error_file:
        return False
    if not with_lines:
        return True
    return (output is None or position.output >= output.lines) and (errors is None or position.errors >= errors.lines)


class Feed:
    """The events of one stream, in order.

    Args:
        context: whose database and blobs.
        hub: says when the batch changes.
        row: the batch as just read.
        position: where the stream goes on.
        downloads: if the result lines themselves are wanted, the places of which one is held while they are sent.
        check: raises Unauthorized once nothing more may be told.
    """

    def __init__(
        self,
        context: Context,
        hub: Hub,
        row: BatchRow,
        position: Position,
        *,
        downloads: Downloads | None,
        check: Callable[[], Awaitable[None]],
    ) -> None:
        self._context = context
        self._hub = hub
        self._batch = row
        self._position = msgspec.structs.replace(position, ended=False)
        self._downloads = downloads
        self._with_lines = downloads is not None
        self._has_place = False
        self._check = check
        self._said_status: BatchRow | None = None
        self._said_counts = _counts(row)
        self._said_lines = (0, 0, "")
        self._growing: dict[str, FileRow] = {}
        self._failing = False

    async def events(self) -> Pieces:
        """The stream, as long as the batch lives and the server is not told to stop."""
        yield b"retry: %d\n\n" % RECONNECT_MS
        async with self._hub.watch(self._batch) as watch:
            while not self._hub.stopping:
                if watch.row is None:
                    yield self._event("deleted", DeletedEvent(id=ids.show("batch", self._batch.id)))
                    return
                self._batch = watch.row
                try:
                    await self._check()
                    async with aclosing(self._news()) as news:
                        async for piece in news:
                            yield piece
                except Unauthorized:  # when the client comes back, it is told why
                    return
                except TooManyRequests:  # files are being sent, as many as may be
                    yield b": waiting to be sent lines\n\n"
                    await watch.changed(RETRY)
                    continue
                except StoreError as error:
                    if not self._failing:
                        log.warning("an event stream cannot read on just now", batch=self._batch.id, cause=str(error))
                    self._failing = True
                    yield b": the store does not answer\n\n"
                    await watch.changed(RETRY)
                    continue
                finally:
                    self._give_place_back()
                self._failing = False
                if self._position.ended:
                    return
                if watch.row is self._batch and not await watch.changed(KEEP_ALIVE):
                    yield b": still here\n\n"

    async def _news(self) -> Pieces:
        """What the client has not been told of the batch as it is now. What has been is noted before it is sent, so
        that this can be begun again after a failure."""
        row = self._batch
        ended = row.status in ENDED
        if not ended and self._status_is_new():
            yield await self._status()
        counts = _counts(row)
        if counts != self._said_counts:
            shown = batch_object(row, await self._context.forecast.of(row))
            self._said_counts = counts
            yield self._event(
                "counts",
                CountsEvent(
                    id=shown.id,
                    request_counts=shown.request_counts,
                    usage=shown.usage,
                    estimated_completion_at=shown.estimated_completion_at,
                ),
            )
        output_end, errors_end = row.output_lines, row.error_lines
        if ended:
            self._growing.clear()
            output, errors = await self._file(row.output_file), await self._file(row.error_file)
            output_end = output_end if output is None else output.lines
            errors_end = errors_end if errors is None else errors.lines
        lines = (output_end, errors_end, row.error_file or "")
        if lines != self._said_lines:
            self._said_lines = lines
            yield self._event("lines", self._lengths(output_end, errors_end))
        async for piece in self._results(output_end, errors_end):
            yield piece
        if ended and not self._hub.stopping:
            self._position = msgspec.structs.replace(self._position, ended=True)
            yield await self._status()

    def _status_is_new(self) -> bool:
        said, row = self._said_status, self._batch
        if said is None or said.status != row.status:
            return True
        # It has ended and been retried between two looks.
        return said.expires_at != row.expires_at or said.error_file not in (None, row.error_file)

    async def _status(self) -> bytes:
        row = self._batch
        done_at = await self._context.forecast.of(row)
        self._said_status = row
        self._said_counts = _counts(row)
        return self._event("status", batch_object(row, done_at))

    def _lengths(self, output: int, errors: int) -> LinesEvent:
        shown = batch_object(self._batch, None)
        assert shown.output_file_id is not None
        return LinesEvent(
            id=shown.id,
            output_file_id=shown.output_file_id,
            error_file_id=shown.error_file_id,
            output_lines=output,
            error_lines=errors,
        )

    async def _results(self, output_end: int, errors_end: int) -> Pieces:
        """The result lines up to these ends, if they are wanted, and in any case the change to another error file."""
        row = self._batch
        former = self._position.error_file
        if self._with_lines and former is not None and former != row.error_file:
            self._growing.pop(former, None)  # it has been finished since
            if (file := await self._file(former)) is not None:
                async for piece in self._file_lines("error", file, file.lines):
                    yield piece
        if self._position.error_file != row.error_file:
            self._position = msgspec.structs.replace(self._position, errors=0, error_file=row.error_file)
        ends: tuple[tuple[Kind, str | None, int], ...] = (
            ("output", row.output_file, output_end),
            ("error", row.error_file, errors_end),
        )
        if self._with_lines:
            for kind, id, end in ends:
                if self._sent(kind) < end and (file := await self._file(id)) is not None:
                    async for piece in self._file_lines(kind, file, end):
                        yield piece

    async def _file(self, id: str | None) -> FileRow | None:
        """A file as it was when it was first looked at; None once it is deleted. What is read of it as it was then is
        right also when it has been finished since."""
        if id is not None and id not in self._growing:
            async with self._context.database.read() as connection:
                row = await files.get(connection, id)
            if row is None:
                return None
            self._growing[id] = row
        return None if id is None else self._growing[id]

    async def _file_lines(self, kind: Kind, file: FileRow, end: int) -> Pieces:
        """Each line of a file from the position up to `end` as an event, joined into pieces."""
        self._take_place()
        line = self._sent(kind)
        part = Slice(first=line, end=end, last_line=end, incomplete=True, whole=False)
        events: list[bytes] = []
        size = 0
        rest = b""
        try:
            async with aclosing(cast(Pieces, stream(self._context, file, part))) as pieces:
                async for piece in pieces:
                    *lines, rest = (rest + piece).split(b"\n")
                    for text in lines:
                        line += 1
                        position = self._moved(kind, line)
                        events.append(_encode(position, kind, text))
                        size += len(events[-1])
                        if size >= PIECE or line == end:
                            self._position = position
                            yield b"".join(events)
                            events, size = [], 0
                            if self._hub.stopping:
                                return
        except StoreError:
            self._growing.pop(file.id, None)  # look at it anew: it may be deleted
            raise

    def _take_place(self) -> None:
        """Raises TooManyRequests if there is none: while a client takes its time, megabytes of the log are held."""
        if self._downloads is not None and not self._has_place:
            self._downloads.take()
            self._has_place = True

    def _give_place_back(self) -> None:
        if self._downloads is not None and self._has_place:
            self._downloads.give_back()
            self._has_place = False

    def _sent(self, kind: Kind) -> int:
        return self._position.output if kind == "output" else self._position.errors

    def _moved(self, kind: Kind, line: int) -> Position:
        if kind == "output":
            return msgspec.structs.replace(self._position, output=line)
        return msgspec.structs.replace(self._position, errors=line)

    def _event(self, name: str, data: BatchObject | CountsEvent | LinesEvent | DeletedEvent) -> bytes:
        return _encode(self._position, name, msgspec.json.encode(data))


def _encode(position: Position, name: str, data: bytes) -> bytes:
    """An event.

    Args:
        data: JSON without raw line breaks, as result lines are.
    """
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (str(position).encode(), name.encode(), data)


def _counts(row: BatchRow) -> tuple[int, ...]:
    """What of a batch is in a `counts` event."""
    tokens = (row.input_tokens, row.cached_tokens, row.output_tokens, row.reasoning_tokens)
    return (row.total, row.completed, row.failed, *tokens)


class EventStream(Response[None]):
    """An answer that is sent as events come, until they end or the client goes away.

    Args:
        events: what is sent.
        stopping: set when the server is told to stop. The events end by themselves then; a client that does not take
            them is left behind.
    """

    def __init__(self, events: Pieces, stopping: asyncio.Event) -> None:
        super().__init__(None, headers=HEADERS, media_type=EVENT_STREAM)
        self._events = events
        self._stopping = stopping

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIResponse:
        """The answer itself."""
        return _Sending(self._events, self._stopping)


class _Sending(ASGIResponse):
    _should_set_content_length = False

    def __init__(self, events: Pieces, stopping: asyncio.Event) -> None:
        super().__init__(headers=dict(HEADERS), media_type=EVENT_STREAM)
        self._events = events
        self._stopping = stopping

    async def send_body(self, send: Send, receive: Receive) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        ends = [sending, asyncio.ensure_future(gone(receive)), asyncio.ensure_future(self._stopping.wait())]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if ends[2].done() and not ends[1].done():
                await asyncio.wait({sending}, timeout=LAST_PATIENCE)
        finally:
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
        if not sending.cancelled():
            sending.result()

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for piece in events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
