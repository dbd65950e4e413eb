"""One POST over one connection to one address that the caller has chosen: what a webhook's attempt needs, and no more.

No redirect is followed, no proxy is asked, no cookie is kept, and no name is resolved: the connection goes to the
address given, whatever the URL says, which `batchery.engine.egress` relies on. The name is for the header `Host` and,
with TLS, for the certificate. An answer's body is thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import Mapping, Sequence

import httptools
import msgspec

from batchery.engine.egress import Address, Target

CONNECT_TIMEOUT = 5.0
"""Seconds for a connection to one address, with the TLS handshake."""

MAX_ADDRESSES = 3
"""Of a name that has more, so many are tried until one connects."""

MAX_HEAD = 64 * 1024
MAX_BODY = 4 * 1024
LINGER = 1.0
"""Bytes and seconds that the answer's body may take to end by itself, before the connection is closed under it."""


class PostError(Exception):
    """No answer came; the text says why, in words for a log."""


class Reply(msgspec.Struct, frozen=True):
    """The head of an answer.

    Attributes:
        status: from 200.
        retry_after: the header of that name; None where there is none.
    """

    status: int
    retry_after: str | None


async def post(
    target: Target, addresses: Sequence[Address], headers: Mapping[str, str], body: bytes, tls: ssl.SSLContext
) -> Reply:
    """Send and wait for the answer; for how long is for the caller to limit.

    Args:
        target: the URL.
        addresses: where to connect, the best first.
        headers: but for `Host`, `Content-Length` and `Connection`.
        body: as it is to arrive.
        tls: for https.

    Raises:
        PostError: there was no connection or no answer.
    """
    reader, writer = await _connect(target, addresses, tls)
    try:
        lines = {"Host": target.authority, **headers, "Content-Length": str(len(body)), "Connection": "close"}
        head = f"POST {target.path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(head.encode("ascii") + b"\r\n" + body)
        return await _answer(reader)
    except (OSError, EOFError) as error:
        raise PostError(f"the connection broke off: {_words(error)}") from None
    finally:
        writer.transport.abort()


async def _connect(
    target: Target, addresses: Sequence[Address], tls: ssl.SSLContext
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    failure = ""
    for address in addresses[:MAX_ADDRESSES]:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                return await asyncio.open_connection(
                    str(address),
                    target.port,
                    ssl=tls if target.tls else None,
                    server_hostname=target.host if target.tls else None,
                    limit=MAX_HEAD,
                )
        except TimeoutError:
            reason = f"nothing within {CONNECT_TIMEOUT:g} s"
        except (OSError, EOFError) as error:  # TLS failures are among them
            reason = _words(error)
        failure = f"no connection to {address}, port {target.port}: {reason}"
    raise PostError(failure)


async def _answer(reader: asyncio.StreamReader) -> Reply:
    answer = _Answer()
    received = 0
    while answer.reply is None:
        if received > MAX_HEAD:
            raise PostError(f"the answer's head is longer than {MAX_HEAD} bytes")
        data = await reader.read(MAX_HEAD)
        if not data:
            raise PostError("the connection was closed without an answer")
        received += len(data)
        if not answer.feed(data):
            break
    if answer.reply is None:
        raise PostError("the answer is not one in HTTP/1")
    # Let it end by itself, so that a receiver need not see its connection break.
    with contextlib.suppress(OSError, EOFError):  # also a timeout
        async with asyncio.timeout(LINGER):
            while answer.body <= MAX_BODY and not answer.ended:
                data = await reader.read(MAX_BODY)
                if not data or not answer.feed(data):
                    break
    return answer.reply


class _Answer:
    """An answer as it comes in.

    Attributes:
        reply: once the head is there.
        body: bytes of the body so far.
        ended: whether that was all of it.
    """

    def __init__(self) -> None:
        self.reply: Reply | None = None
        self.body = 0
        self.ended = False
        self._retry_after: str | None = None
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> bool:
        """Parse some more; whether that was possible."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return False
        return True

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self._retry_after = value.decode("ascii", "replace")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and self.reply is None:  # what is below is only on the way to the answer
            self.reply = Reply(status, self._retry_after)
        self._retry_after = None

    def on_body(self, data: bytes) -> None:
        self.body += len(data)

    def on_message_complete(self) -> None:
        self.ended = self.reply is not None


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not good: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or 'no reason given'}"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__
