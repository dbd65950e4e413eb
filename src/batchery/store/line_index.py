"""The line index of an upload as one blob: where each request is, and which requests ask for which model.

Layout, little-endian: the 8 bytes `BATCHIX1`, a 32-bit length and a msgpack header of that length, then the arrays of
`FileIndex` one after the other: starts (8 bytes each), lengths (4), numbers (4, if the header says so), and each
model's requests (4). Planning cuts shards out of the last part without looking at a single line.
"""

from __future__ import annotations

import struct
import sys
from array import array

import msgspec

from batchery.wire.validation import FileIndex

_MAGIC = b"BATCHIX1"


class _Header(msgspec.Struct, frozen=True, array_like=True):
    count: int
    has_numbers: bool
    models: tuple[str, ...]
    model_counts: tuple[int, ...]
    urls: tuple[str, ...]


_encode_header = msgspec.msgpack.Encoder().encode
_decode_header = msgspec.msgpack.Decoder(_Header).decode


class InvalidIndexError(ValueError):
    """The blob is not a line index: it was damaged, or written by a later version."""


def encode(index: FileIndex) -> list[bytes]:
    """The index as the pieces of its blob, in order."""
    header = _encode_header(
        _Header(
            len(index),
            index.numbers is not None,
            index.models,
            tuple(len(requests) for requests in index.by_model),
            index.urls,
        )
    )
    arrays = [index.starts, index.lengths, *([] if index.numbers is None else [index.numbers]), *index.by_model]
    return [_MAGIC + struct.pack("<I", len(header)) + header, *(_little_endian(values).tobytes() for values in arrays)]


def decode(blob: bytes | memoryview) -> FileIndex:
    """Read a blob that `encode` made.

    Raises:
        InvalidIndexError: it is not one.
    """
    view = memoryview(blob)
    try:
        if view[:8] != _MAGIC:
            raise InvalidIndexError("a line index has no magic number; the blob is damaged")
        (length,) = struct.unpack_from("<I", view, 8)
        header = _decode_header(view[12 : 12 + length])
        position = 12 + length
        if len(header.models) != len(header.model_counts):
            raise InvalidIndexError("a line index does not say how many requests each model has; the blob is damaged")

        def take(typecode: str, count: int) -> array[int]:
            nonlocal position
            if count < 0:
                raise InvalidIndexError("a line index has a negative length; the blob is damaged")
            values = array(typecode)
            end = position + count * values.itemsize
            if end > len(view):
                raise InvalidIndexError("a line index ends too early; the blob is damaged")
            values.frombytes(view[position:end])
            position = end
            return _little_endian(values)

        return FileIndex(
            starts=take("Q", header.count),
            lengths=take("I", header.count),
            numbers=take("I", header.count) if header.has_numbers else None,
            models=header.models,
            by_model=tuple(take("I", count) for count in header.model_counts),
            urls=header.urls,
        )
    except (struct.error, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidIndexError(f"a line index cannot be read: {error}") from error


def _little_endian(values: array[int]) -> array[int]:
    if sys.byteorder == "big":
        values = array(values.typecode, values)
        values.byteswap()
    return values
