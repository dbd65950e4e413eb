"""How a complete file is sent: validators, conditions, ranges and content codings, as RFC 9110 has them. Pure.

A complete file changes only when its batch is run again, and then its hash does: the entity tag is the SHA-256 of the
content, with the coding's name behind it where one is applied. Only identity bytes are sent in ranges, and only one
range at a time; a `Range` that asks for anything else is ignored, as it may be.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from batchery.server.compress import CODINGS, Coding
from batchery.server.content import Slice
from batchery.server.errors import Refused
from batchery.store.files import FileRow
from batchery.wire.errors import RangeNotSatisfiable

TINY = 1024
"""Bytes below which compressing is not worth a client's while."""

_MEMBER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)(?:[ \t]*;[ \t]*[qQ]=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?")
_TAG = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')
_RANGE = re.compile(r"bytes[ \t]*=[ \t]*([0-9]{0,999})[ \t]*-[ \t]*([0-9]{0,999})", re.IGNORECASE)


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """An answer with a complete file, or with a part of its bytes, or with none.

    Attributes:
        status: 200, 206 or 304.
        headers: that depend on the request.
        coding: what the body is to be compressed with; None for its own bytes.
        start: the first byte of the file that is sent.
        end: the byte after the last.
    """

    status: int
    headers: dict[str, str]
    coding: Coding | None = None
    start: int = 0
    end: int = 0


Header = Callable[[str], str | None]
"""A request's header by its name, all lines of it joined by commas; None where it is not there."""


def delivery(row: FileRow, header: Header, *, head: bool) -> Delivery:
    """What is sent of a complete file.

    Args:
        row: the file.
        header: of the request.
        head: whether it is a HEAD request, which knows no ranges.

    Raises:
        RangeNotSatisfiable: the range begins behind the file's end.
        Refused: 412, `If-Match` names another version.
    """
    wanted = None if head else byte_range(header("range"), row.size)
    coding = chosen(header("accept-encoding"), row.size, ranged=wanted is not None)
    tag = etag(row, coding)
    headers = {"ETag": tag, "Vary": "Accept-Encoding", "Cache-Control": "private, no-cache", "Accept-Ranges": "bytes"}
    required = header("if-match")
    if required is not None and not _names(required, tag, weak=False):
        raise Refused(412, f"The file's ETag is {tag}, which If-Match does not name.", code="precondition_failed")
    known = header("if-none-match")
    if known is not None and _names(known, tag, weak=True):
        return Delivery(status=304, headers=headers)
    if wanted is not None and coding is None and _still(header("if-range"), tag):
        start, end = wanted
        if start >= end:
            raise RangeNotSatisfiable(
                f"The range lies behind the end of the file, which has {row.size} bytes; ask for an earlier one.",
                size=row.size,
            )
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{row.size}"
        headers["Content-Length"] = str(end - start)
        return Delivery(status=206, headers=headers, start=start, end=end)
    if coding is None:
        headers["Content-Length"] = str(row.size)
    else:
        headers["Content-Encoding"] = coding
    return Delivery(status=200, headers=headers, coding=coding, end=row.size)


def piecemeal(row: FileRow, part: Slice) -> Delivery:
    """How some lines of a file are sent, or a file that grows: as they are, and not to be kept by any cache.

    There is no entity tag, and conditions and ranges are ignored: a cache that took a 304 for a page would give it the
    `X-Last-Line` of another answer, and a client that resumes from there would lose lines.
    """
    headers = {"Cache-Control": "no-store"}
    if part.whole:
        headers["Content-Length"] = str(row.size)
    return Delivery(status=200, headers=headers, end=row.size)


def etag(row: FileRow, coding: Coding | None = None) -> str:
    """The strong entity tag of a complete file in a coding.

    A file that was never written has no hash; its id and length name its content just as well, since a file only grows.
    """
    name = row.sha256 or f"{row.id}-{row.size}"
    return f'"{name}"' if coding is None else f'"{name}-{coding}"'


def chosen(accept: str | None, size: int, *, ranged: bool = False) -> Coding | None:
    """The content coding for a client: of those on offer the one it weighs most; None for none.

    Args:
        accept: its `Accept-Encoding`; None where it sent none, and then gets none.
        size: of the content, in bytes.
        ranged: whether it asks for a range, which is cut from identity bytes.
    """
    weights = _weights(accept or "")
    anything = weights.get("*")
    identity = weights.get("identity", anything)
    if identity != 0 and (ranged or size < TINY):
        return None
    offers: list[tuple[float, Coding]] = [(weights.get(coding, anything or 0), coding) for coding in CODINGS]
    weight, best = max(offers, key=lambda offer: offer[0])  # of equals the first
    return best if weight > 0 and weight >= (identity or 0) else None


def _weights(accept: str) -> dict[str, float]:
    """What a client accepts, and how much; what cannot be understood is passed over."""
    weights: dict[str, float] = {}
    for member in accept.split(","):
        found = _MEMBER.fullmatch(member.strip(" \t"))
        if found is not None:
            name = found[1].lower()
            weights.setdefault("gzip" if name == "x-gzip" else name, float(found[2] or 1))
    return weights


def byte_range(value: str | None, size: int) -> tuple[int, int] | None:
    """The bytes that `Range` asks for, from the first up to, not including, the end; empty for none that is there.

    Args:
        value: of the header.
        size: of the file. An empty file has no ranges at all, so that clients that always ask for one are served.

    Returns:
        None where the header is to be ignored: there is none, it is malformed, of another unit, or asks for several.
    """
    found = _RANGE.fullmatch((value or "").strip(" \t,"))
    if found is None or size == 0 or not (found[1] or found[2]):
        return None
    if not found[1]:
        return max(0, size - int(found[2])), size
    first = int(found[1])
    if not found[2]:
        return first, size
    last = int(found[2])
    return None if last < first else (first, min(last + 1, size))


def _names(condition: str, tag: str, *, weak: bool) -> bool:
    """Whether a list of entity tags, or `*`, names this one."""
    if condition.strip() == "*":
        return True
    return any(found[2] == tag and (weak or not found[1]) for found in _TAG.finditer(condition))


def _still(condition: str | None, tag: str) -> bool:
    """Whether `If-Range` holds: it is not there, or it is this very tag. A date never holds: files have none."""
    return condition is None or condition.strip() == tag
