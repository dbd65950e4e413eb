"""HTTP/1.1 over one connection: requests in, answers out, in the order in which the requests came.

It parses, frames and bounds; what an answer says is decided elsewhere. It must never hold more than one read beyond its
limits in memory, answer out of order, or do work per request that it could have done once: benchmarks run against it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from http import HTTPStatus
from typing import Protocol, cast

import httptools

MAX_BODY = 32 * 1024 * 1024
MAX_HEAD = 64 * 1024
MAX_PIPELINED = 64
LINGER = 2.0

JSON = b"application/json"
HTML = b"text/html; charset=utf-8"

_HEADS: dict[tuple[int, bytes], bytes] = {}


def _head(status: int, content_type: bytes) -> bytes:
    """The head of an answer up to the value of its Content-Length, made once for each kind."""
    head = _HEADS.get((status, content_type))
    if head is None:
        head = (
            b"HTTP/1.1 %d %s\r\nServer: batchery-simulator\r\nContent-Type: %s\r\n"
            % (status, phrase(status).encode(), content_type)
            + b"Content-Length: "
        )
        _HEADS[status, content_type] = head
    return head


def phrase(status: int) -> str:
    """The reason phrase of a status, also of one that HTTP does not know."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Simulated"


class Exchange:
    """One request and the way to answer it; exactly one of `send`, `reset` and `truncate` may be called, once.

    Args:
        connection: it came in on.
        method: such as `b"POST"`.
        path: without its query.
        authorization: the header's value, or empty.
        keep_alive: whether the connection stays open after the answer.
        old: whether the client speaks HTTP/1.0.
    """

    __slots__ = ("authorization", "body", "connection", "keep_alive", "method", "old", "path", "refusal", "ticket")

    def __init__(
        self, connection: Connection, method: bytes, path: bytes, *, authorization: bytes, keep_alive: bool, old: bool
    ) -> None:
        self.connection = connection
        self.method = method
        self.path = path
        self.authorization = authorization
        self.keep_alive = keep_alive
        self.old = old
        self.body: bytes | bytearray = b""
        self.refusal = 0
        self.ticket: object = None

    def _frame(self, status: int, body: bytes, content_type: bytes, headers: bytes) -> bytes:
        if not self.keep_alive:
            headers += b"Connection: close\r\n"
        elif self.old:
            headers += b"Connection: keep-alive\r\n"
        return b"%b%d\r\n%b\r\n%b" % (_head(status, content_type), len(body), headers, body)

    def send(self, status: int, body: bytes, content_type: bytes = JSON, headers: bytes = b"") -> None:
        """Answer.

        Args:
            headers: further header lines, each ending in CRLF.
        """
        frame = self._frame(status, body, content_type, headers)
        if self.method == b"HEAD":
            frame = frame[: len(frame) - len(body)]
        self.connection.finish(frame, self.keep_alive)

    def truncate(self, status: int, body: bytes) -> None:
        """Promise the body, send half of it and close."""
        frame = self._frame(status, body, JSON, b"")
        self.connection.finish(frame[: len(frame) - (len(body) + 1) // 2], False)

    def reset(self) -> None:
        """Reset the connection instead of answering."""
        self.connection.reset()


class Service(Protocol):
    """What answers the exchanges."""

    def handle(self, exchange: Exchange) -> None:
        """Answer this exchange now or later."""

    def refuse(self, exchange: Exchange) -> None:
        """Answer an exchange whose request HTTP itself forbids: `refusal` is its status."""

    def abandon(self, exchange: Exchange) -> None:
        """The client of an exchange that has no answer yet has gone."""


class Connection(asyncio.Protocol):
    """The server's end of a connection.

    Args:
        service: answers its requests.
        open_connections: the set of connections to be in while open.
    """

    def __init__(self, service: Service, open_connections: set[Connection]) -> None:
        self._service = service
        self._open = open_connections
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._queue: deque[Exchange] = deque()
        self._active: Exchange | None = None
        self._advancing = False
        self._writable = True
        self._closing = False
        # Deaf: nothing more is read from this client, what it still sends is thrown away.
        self._deaf = False
        self._owes_continue = False
        self._in_head = self._began = False
        self._begin_message()

    def _begin_message(self) -> None:
        self._url = b""
        self._authorization = b""
        self._expects = False
        self._head_size = 0
        self._incoming: Exchange | None = None

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.discard(self)
        self._closing = self._deaf = True
        self._queue.clear()
        if self._active is not None:
            active, self._active = self._active, None
            self._service.abandon(active)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._began = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The exchange that asked for it is queued, and closes the connection when answered: nothing is upgraded.
            self._deaf = True
        except httptools.HttpParserError:
            self._refuse(400)
        if self._in_head and not self._began:
            # The parser keeps a header back until it is whole, so one without an end is counted here.
            self._count_head(len(data))

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._advance()

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._begin_message()
        self._in_head = self._began = True

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        size = len(name)
        self._count_head(size + len(value))
        if size == 13 and name.lower() == b"authorization":
            self._authorization = value
        elif size == 14 and name.lower() == b"content-length":
            # The parser has made sure that it is a number.
            if int(value) > MAX_BODY:
                self._refuse(413)
        elif size == 6 and name.lower() == b"expect":
            self._expects = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._deaf:
            return
        parser = self._parser
        url = self._url
        if not url.startswith(b"/"):
            url = _origin_form(url)
        self._incoming = Exchange(
            self,
            parser.get_method(),
            url.partition(b"?")[0] if b"?" in url else url,
            authorization=self._authorization,
            keep_alive=parser.should_keep_alive() and not parser.should_upgrade(),
            old=parser.get_http_version() == "1.0",
        )
        if self._expects:
            # A client that waits for this sends nothing else meanwhile, but answers of earlier requests come first.
            self._owes_continue = True
            self._advance()

    def on_body(self, body: bytes) -> None:
        incoming = self._incoming
        if incoming is None:
            return
        if not incoming.body:
            incoming.body = body
        elif isinstance(incoming.body, bytes):
            incoming.body = bytearray(incoming.body) + body
        else:
            incoming.body += body
        if len(incoming.body) > MAX_BODY:
            self._refuse(413)

    def on_message_complete(self) -> None:
        incoming, self._incoming = self._incoming, None
        if incoming is None or self._deaf:
            return
        self._owes_continue = False
        self._queue.append(incoming)
        if len(self._queue) == MAX_PIPELINED:
            self._transport.pause_reading()
        self._advance()

    # Answering.

    def _count_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > MAX_HEAD:
            self._refuse(431)

    def _refuse(self, status: int) -> None:
        """Answer the request that is coming in with this status, after all before it, and read nothing more."""
        if self._deaf:
            return
        self._deaf = True
        self._incoming = None
        exchange = Exchange(self, b"", b"", authorization=b"", keep_alive=False, old=False)
        exchange.refusal = status
        self._queue.append(exchange)
        self._advance()

    def _advance(self) -> None:
        """Hand on the next request, if it is its turn."""
        # An exchange may be answered while it is handed on, which leads back here: one loop then takes all of them.
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._queue and self._active is None and self._writable and not self._closing:
                exchange = self._queue.popleft()
                if len(self._queue) == MAX_PIPELINED - 1:
                    self._transport.resume_reading()
                self._active = exchange
                if exchange.refusal:
                    self._service.refuse(exchange)
                else:
                    self._service.handle(exchange)
        finally:
            self._advancing = False
        if self._owes_continue and self._active is None and not self._queue and not self._closing:
            self._owes_continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def finish(self, data: bytes, keep_alive: bool) -> None:
        """Write the answer of the active exchange."""
        active, self._active = self._active, None
        self._transport.write(data)
        if keep_alive:
            if self._queue or self._owes_continue:
                self._advance()
            return
        self._closing = self._deaf = True
        if active is not None and active.refusal and self._transport.can_write_eof():
            # Closing with unread data would reset the connection, and the client might lose the answer that tells it
            # why. So what it still sends is read for a while, and thrown away.
            self._transport.write_eof()
            asyncio.get_running_loop().call_later(LINGER, self._transport.close)
        else:
            self._transport.close()

    def reset(self) -> None:
        """Close with a TCP reset; nothing that is still to be written is sent."""
        self._active = None
        self._closing = self._deaf = True
        peer = self._transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def close(self) -> None:
        """Close at once; an exchange without an answer is abandoned."""
        self._transport.abort()


def _origin_form(url: bytes) -> bytes:
    """The path of a target in absolute form, `http://host/path`; other forms as they are, to match nothing."""
    try:
        return httptools.parse_url(url).path or b"/"
    except httptools.HttpParserInvalidURLError:
        return url
