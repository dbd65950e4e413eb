"""Reading request bodies: bounded in size, in number, and in how long a client may take over them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from batchery.server.context import AnyRequest, context_of
from batchery.server.errors import CutOff, Refused
from batchery.server.places import Uploads
from batchery.wire.errors import TooLarge

SMALL = 64 * 1024
"""Bytes of a body that cost next to nothing to hold. Up to here a body takes no upload's place, so that clients who
only trickle cannot keep the others from uploading."""


async def chunks(request: AnyRequest) -> AsyncIterator[bytes]:
    """A request's body as it arrives.

    Only the time that we wait for the client counts against it, not the time that we take over what came.

    Raises:
        CutOff: the client went away.
        Refused: 408, nothing came for the context's `idle_timeout`, or less than `min_rate` for `rate_window`.
    """
    context = context_of(request)
    idle, window = context.idle_timeout, context.rate_window
    wanted = context.min_rate * window
    waited, came = 0.0, 0  # in the current window
    while True:
        # A window that has had its share may end while we wait; then the next one must pass as well.
        patience = window - waited + (window if came >= wanted else 0)
        began = time.monotonic()
        try:
            async with asyncio.timeout(min(idle, patience)):
                message = await request.receive()
        except TimeoutError:
            reason = (
                f"No byte of the request body came for {idle:g} seconds"
                if idle <= patience
                else f"The request body came at less than {context.min_rate} bytes a second for {window:g} seconds"
            )
            raise Refused(408, f"{reason}; nothing was stored. Send it again.", code="request_timeout") from None
        waited += time.monotonic() - began
        if waited >= window:
            waited, came = waited - window, 0
        if message["type"] != "http.request":
            raise CutOff
        if message["body"]:
            came += len(message["body"])
            yield message["body"]
        if not message["more_body"]:
            return


@contextmanager
def upload(request: AnyRequest) -> Iterator[AsyncIterator[bytes]]:
    """A request's body as it arrives, of any size; to be read inside the block, which holds an upload's place.

    Raises:
        TooManyRequests: all places are taken; said before reading where the client announced a large body.
    """
    places: Uploads = request.app.state.uploads
    if (content_length(request) or 0) > SMALL:
        places.check()
    has_place = False

    async def counted() -> AsyncIterator[bytes]:
        nonlocal has_place
        size = 0
        async for chunk in chunks(request):
            size += len(chunk)
            if size > SMALL and not has_place:
                places.take()
                has_place = True
            yield chunk

    try:
        yield counted()
    finally:
        if has_place:
            places.give_back()


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
