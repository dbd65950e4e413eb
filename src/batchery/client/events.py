"""Server-sent events, read from the pieces of a body as they arrive (the event stream format of the HTML standard).

Pure: pieces in, events out. An event that broke off before its blank line is never given out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

MAX_EVENT = 64 * 1024 * 1024
"""Bytes of one event after which the stream is not an event stream, but something without an end."""


class Event(msgspec.Struct, frozen=True):
    """One event.

    Attributes:
        name: its type; `message` where none was given.
        data: its data lines, joined.
        id: the last id that the stream gave, to go on from.
    """

    name: str
    data: bytes
    id: str


def read_events(pieces: Iterable[bytes]) -> Iterator[Event]:
    """The events in a body.

    Args:
        pieces: the body; cut anywhere.

    Raises:
        ValueError: an event is longer than `MAX_EVENT`.
    """
    name, id = "", ""
    data: list[bytes] = []
    for line in _lines(pieces):
        if not line:
            if data:
                yield Event(name or "message", b"\n".join(data), id)
            name, data = "", []
            continue
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode("utf-8", "replace")
        elif field == b"id" and b"\0" not in value:
            id = value.decode("utf-8", "replace")


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Lines, ended by a line feed with or without a carriage return before it."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > MAX_EVENT:
            raise ValueError("an event without an end")
        for line in lines:
            yield line.removesuffix(b"\r")
