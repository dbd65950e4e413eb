"""The outermost layer, around one request and its answer: what holds for all of them, whatever happens inside.

Each answer gets its `x-request-id`. HEAD is answered as GET without the body. A target or headers beyond all reason are
refused before anything looks at them. An error that came before the client had finished sending is sent at once but
for its last byte; then the rest of the request is taken and thrown away for a while, because an HTTP server closes the
connection once the answer is complete, and the answer would often be lost on a client that is still sending.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from batchery.server.context import AnyRequest
from batchery.server.errors import Refused, rendered, understood
from batchery.server.metrics import Traffic
from batchery.wire.errors import ApiError

MAX_TARGET = 8 * 1024
MAX_HEADERS = 32 * 1024
DRAIN = 10.0
"""Seconds for which the rest of a refused body is taken."""

STALL = 0.5
"""Seconds without a byte after which that ends: the client has seen the answer, or waits for it."""

log = structlog.get_logger()


def is_head(request: AnyRequest) -> bool:
    """Whether the answer's body will not be sent, so that there is no need to make one."""
    return bool(request.state.head)


def at_end(request: AnyRequest, call: Callable[[], None]) -> None:
    """Have something called once this request's answer has been sent, or has been broken off."""
    request.state.at_end.append(call)


class Exchange:
    """One request and its answer.

    Args:
        scope: as the HTTP server gave it.
        receive, send: likewise.

    Attributes:
        method: as it came; the app gets GET for HEAD.
        status: of the answer, once it has begun; 0 before.
        bytes_in: of the request's body, so far.
        bytes_out: of the answer's body, so far.
    """

    def __init__(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._id = "req_" + secrets.token_hex(16)
        self.method = scope["method"]
        self._head = self.method == "HEAD"
        self._asks_first = any(name == b"expect" for name, _ in scope["headers"])
        self._begun = 0
        self._received = False
        self._finished = False
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.at_end: list[Callable[[], None]] = []
        state = {"request_id": self._id, "head": self._head, "at_end": self.at_end}
        self.scope: Scope = {**scope, "state": state}
        if self._head:
            self.scope["method"] = "GET"

    @property
    def id(self) -> str:
        """What the answer is called in the log."""
        return self._id

    @property
    def complete(self) -> bool:
        """Whether the last of the answer has been sent."""
        return self._finished

    async def receive(self) -> Any:
        """The next of the request; notes when it is complete."""
        message = await self._receive()
        self._begun += 1
        if message["type"] == "http.request":
            self.bytes_in += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._received = True
        return message

    async def send(self, message: Message) -> None:
        """The next of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self._id.encode())]
            await self._send(message)
        elif message["type"] != "http.response.body" or self._finished:
            return
        elif self._head:
            self._finished = True
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        elif message["more_body"] or self.status < 400 or self._received:
            self._finished = not message["more_body"]
            await self._send(message)
            self.bytes_out += len(message["body"])
        else:
            self._finished = True
            body = message["body"]
            self.bytes_out += len(body)
            await self._send({"type": "http.response.body", "body": body[:-1], "more_body": True})
            await self._drain()
            await self._send({"type": "http.response.body", "body": body[-1:], "more_body": False})

    async def _drain(self) -> None:
        if self._begun == 0 and self._asks_first:
            return
        try:
            async with asyncio.timeout(DRAIN):
                while not self._received:
                    async with asyncio.timeout(STALL):
                        await self.receive()
        except TimeoutError:
            return

    async def answer(self, error: ApiError) -> None:
        """Answer with an error, from outside the app."""
        status, headers, body = rendered(error)
        headers["content-length"] = str(len(body))
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


def _beyond_reason(scope: HTTPScope) -> ApiError | None:
    if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_TARGET:
        return Refused(414, f"The path and query are longer than {MAX_TARGET} bytes.", code="uri_too_long")
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
        return Refused(431, f"The headers are longer than {MAX_HEADERS} bytes in all.", code="headers_too_large")
    return None


def with_exchange(app: ASGIApp, traffic: Traffic) -> ASGIApp:
    """An app, inside this layer.

    Args:
        app: the app.
        traffic: counts what passes.
    """

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        began = time.perf_counter()
        exchange = Exchange(scope, receive, send)
        traffic.began(exchange)
        refusal = _beyond_reason(scope)
        try:
            if refusal is not None:
                await exchange.answer(refusal)
            else:
                await app(exchange.scope, exchange.receive, exchange.send)
        except Exception as error:
            log.error("answer broken off", request_id=exchange.id, path=scope["path"], exc_info=error)
            if exchange.status:
                raise  # the connection is cut, so that the client sees that something is missing
            await exchange.answer(understood(error))
        finally:
            for call in exchange.at_end:
                call()
            seconds = time.perf_counter() - began
            traffic.ended(exchange, seconds)
            log.debug(
                "request",
                request_id=exchange.id,
                method=scope["method"],
                path=scope["path"],
                status=exchange.status,
                seconds=round(seconds, 6),
            )

    return front
