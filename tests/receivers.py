"""Real HTTP receivers of webhooks for tests, each a thread of its own, so that they stand beside any event loop."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="

Answer = Callable[[BaseHTTPRequestHandler, int], None]
"""Answers a request, given how many came before it."""


@dataclass(frozen=True)
class Delivery:
    """A request as it came in; the names of its headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """A receiver.

    Attributes:
        port: where, on 127.0.0.1.
        deliveries: everything that was received.
        released: what `hang` waits for.
    """

    port: int = 0
    deliveries: list[Delivery] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """A webhook's URL, with a query."""
        return f"http://127.0.0.1:{self.port}/hooks/batch?token=a-token"

    def ids(self) -> list[str]:
        """The event of each delivery."""
        return [delivery.headers["webhook-id"] for delivery in self.deliveries]


def accept(handler: BaseHTTPRequestHandler, before: int) -> None:
    """200."""
    status(200)(handler, before)


def status(code: int, **headers: str) -> Answer:
    """An answer with this status; `_` in a header's name is a `-`."""

    def answer(handler: BaseHTTPRequestHandler, before: int) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "2")
        handler.end_headers()
        handler.wfile.write(b"ok")

    return answer


def first(count: int, answer: Answer, then: Answer = accept) -> Answer:
    """One answer to the first requests, and another to the rest."""
    return lambda handler, before: (answer if before < count else then)(handler, before)


@contextlib.contextmanager
def receiver(answer: Answer | None = None, host: str = "127.0.0.1", port: int = 0) -> Iterator[Receiver]:
    """A receiver for the length of a block.

    Args:
        answer: 200 where none is given.
        host: the address that it listens at.
        port: and the port; 0 takes a free one.
    """
    found = Receiver()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with lock:
                before = len(found.deliveries)
                found.deliveries.append(Delivery(self.command, self.path, headers, body))
            with contextlib.suppress(OSError):
                (answer or accept)(self, before)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A sender that went away is what some tests are about."""

    server = Server((host, port), Handler)
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.released.set()
        server.shutdown()
        server.server_close()


def hang(of: Callable[[], Receiver]) -> Answer:
    """No answer until the receiver is released."""

    def answer(handler: BaseHTTPRequestHandler, before: int) -> None:
        of().released.wait(60)
        handler.connection.shutdown(socket.SHUT_RDWR)

    return answer
