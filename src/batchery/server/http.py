"""Serving the app over HTTP in this process's event loop, until told to stop."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server
from litestar.types import ASGIApp, Receive, Scope, Send

from batchery.server.port import Port

BACKLOG = 2048
MAX_CONNECTIONS = 16_384
"""Connections at a time; more wait in the system's queue."""

RESERVE = 256
"""Open files that connections leave to the database, the store and the rest."""

STALL_MS = 60_000
"""How long a client may take nothing of what it is sent before its connection is cut."""

IDLE_MS = 60_000
"""How long a connection may take to send its headers, and stay open between two requests."""

READ_BUFFER = 128 * 1024
"""Bytes that a connection may hold of what arrives; also the most that its headers may have."""

GRACE = 5.0
"""Seconds that requests in flight get to end in, once told to stop."""

START_PATIENCE = 10.0
LAST_PATIENCE = 1.0
"""Seconds for connections to close once their requests have been cut short."""


class _InFlight:
    """An app that knows which requests it is at work on.

    Args:
        app: the app.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.tasks: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            await self._app(scope, receive, send)
        finally:
            self.tasks.discard(task)


async def serve_http(
    app: ASGIApp,
    at: Port,
    stop: asyncio.Event,
    ready: Callable[[], None],
    *,
    grace: float = GRACE,
) -> None:
    """Serve until told to stop; then requests in flight may end, for a while.

    Args:
        app: from `create_app`.
        at: where; it stays the caller's.
        stop: ends it.
        ready: called once connections are accepted.
        grace: seconds that requests in flight get to end in.

    Raises:
        AddressInUse: somebody else listens there.
        OSError: the address cannot be listened at.
        RuntimeError: the server ended by itself.
    """
    at.check()
    app = in_flight = _InFlight(app)
    server = Server(
        app,
        at.address,
        at.number,
        interface=Interfaces.ASGINL,
        http=HTTPModes.http1,
        websockets=False,
        backlog=BACKLOG,
        backpressure=_max_connections(),
        http1_settings=HTTP1Settings(header_read_timeout=IDLE_MS, max_buffer_size=READ_BUFFER),
        # Its own log configuration would write to stdout. What goes wrong in the app is logged there, once.
        log_level=LogLevels.critical,
        log_dictconfig={"incremental": True, "handlers": {}, "loggers": {}},
    )
    serving = asyncio.create_task(server.serve())
    stopping = asyncio.create_task(stop.wait())
    try:
        await _accepting(at.address, at.number, serving)
        if not serving.done():
            _cut_stalled(at.number)
            ready()
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
            raise RuntimeError("the HTTP server ended by itself")
    finally:
        stopping.cancel()
        server.stop()  # type: ignore[no-untyped-call]
        await asyncio.wait({serving}, timeout=grace)
        await _end(set(in_flight.tasks))
        await asyncio.wait({serving}, timeout=LAST_PATIENCE)
        await _end({serving})


def _max_connections() -> int:
    """How many connections there may be, so that files can still be opened beside them.

    A connection that streams a file holds two descriptors; but an accepted connection without a descriptor left would
    be worse than one that waits.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, files - RESERVE))


def _cut_stalled(port: int) -> None:
    """Have the system cut connections whose client takes nothing for `STALL_MS`.

    Nothing else would: the HTTP server waits for such a client for ever, with what it has sent to it held in memory.
    Connections inherit the option from the socket that they were accepted by, which is not shown to us, so it is
    looked for among all that this process has open. Where the system has no such option, there is none to set.
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is None:
        return
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with suppress(OSError):  # it is no socket, or not this one
            found = socket.socket(fileno=int(name))
            try:
                is_listening = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if is_listening and found.getsockname()[1:2] == (port,):
                    found.setsockopt(socket.IPPROTO_TCP, option, STALL_MS)
            finally:
                found.detach()


async def _accepting(address: str, port: int, serving: asyncio.Task[None]) -> None:
    """Wait until a connection succeeds."""
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104
    async with asyncio.timeout(START_PATIENCE):
        while not serving.done():
            with suppress(ConnectionError):
                _, writer = await asyncio.open_connection(target, port)
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()
                return
            await asyncio.sleep(0.005)


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel what has not ended, and wait for it to clean up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
