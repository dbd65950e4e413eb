"""Reading request bodies: bounded in size, and given up when the client sends nothing for a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from batchery.server.context import AnyRequest, context_of
from batchery.server.errors import CutOff, Refused
from batchery.wire.errors import TooLarge


async def chunks(request: AnyRequest) -> AsyncIterator[bytes]:
    """A request's body as it arrives.

    Raises:
        CutOff: the client went away.
        Refused: 408, nothing came for the context's `idle_timeout`.
    """
    idle = context_of(request).idle_timeout
    while True:
        try:
            async with asyncio.timeout(idle):
                message = await request.receive()
        except TimeoutError:
            raise Refused(
                408,
                f"No byte of the request body came for {idle:g} seconds; nothing was stored. Send it again.",
                code="request_timeout",
            ) from None
        if message["type"] != "http.request":
            raise CutOff
        if message["body"]:
            yield message["body"]
        if not message["more_body"]:
            return


async def read_whole(request: AnyRequest, limit: int) -> bytes:
    """A request's body at once.

    Raises:
        TooLarge: it has more than `limit` bytes.
    """
    body = bytearray()
    async for chunk in chunks(request):
        body += chunk
        if len(body) > limit:
            raise TooLarge(f"The request body is larger than {limit} bytes, the most that is accepted here.")
    return bytes(body)


def content_length(request: AnyRequest) -> int | None:
    """The length that the client announced, if it did."""
    announced = request.headers.get("content-length", "")
    return int(announced) if announced.isascii() and announced.isdigit() else None
