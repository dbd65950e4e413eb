"""The line index of an upload as one blob: where each request is, which requests ask for which model, and where the
bad lines are.

Layout, little-endian: the 8 bytes `BATCHIX3`, a 32-bit length and a msgpack header of that length, then the arrays one
after the other, and at the end the CRC-32 of everything before it. The arrays are those of `FileIndex`: starts (8 bytes
each), lengths (4), numbers (4, if the header says so), and each model's requests (4); then those of `BadLines`: starts
(8), lengths (4), numbers (4) and firsts (4, signed); then those of `Prefixes`: keys (8) and groups (2, if the header
says so). Planning cuts shards out of the models' requests without looking
at a single line.

Blobs of earlier versions are still read: `BATCHIX2` has no prefixes, and `BATCHIX1` neither those, nor bad lines, nor a
checksum.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array

import msgspec

from batchery.wire.file_index import ONE_MODEL_TOO_MANY, BadLines, FileIndex
from batchery.wire.prefixes import Prefixes

_MAGIC = b"BATCHIX3"
_MAGIC_2 = b"BATCHIX2"
_MAGIC_1 = b"BATCHIX1"


class _Header(msgspec.Struct, frozen=True, array_like=True):
    count: int
    has_numbers: bool
    models: tuple[str, ...]
    model_counts: tuple[int, ...]
    urls: tuple[str, ...]
    bad_count: int = 0
    bad_limit: int = 0
    key_count: int = 0
    has_groups: bool = False


_encode_header = msgspec.msgpack.Encoder().encode
_decode_header = msgspec.msgpack.Decoder(_Header).decode


class InvalidIndexError(ValueError):
    """The blob is not a line index: it was damaged, or written by a later version."""


def encode(index: FileIndex) -> list[bytes]:
    """The index as the pieces of its blob, in order."""
    bad, prefixes = index.bad, index.prefixes
    header = _encode_header(
        _Header(
            len(index),
            index.numbers is not None,
            index.models,
            tuple(len(requests) for requests in index.by_model),
            index.urls,
            len(bad),
            bad.limit,
            len(prefixes.keys),
            prefixes.groups is not None,
        )
    )
    arrays = [
        index.starts,
        index.lengths,
        *([] if index.numbers is None else [index.numbers]),
        *index.by_model,
        bad.starts,
        bad.lengths,
        bad.numbers,
        bad.firsts,
        prefixes.keys,
        *([] if prefixes.groups is None else [prefixes.groups]),
    ]
    pieces = [
        _MAGIC + struct.pack("<I", len(header)) + header,
        *(_little_endian(values).tobytes() for values in arrays),
    ]
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    return [*pieces, struct.pack("<I", checksum)]


def decode(blob: bytes | memoryview) -> FileIndex:
    """Read a blob that `encode` made, of this version or an earlier one.

    Raises:
        InvalidIndexError: it is not one.
    """
    view = memoryview(blob)
    try:
        magic = view[:8]
        if magic in (_MAGIC, _MAGIC_2):
            (checksum,) = struct.unpack_from("<I", view, max(0, len(view) - 4))
            view = view[:-4]
            if zlib.crc32(view) != checksum:
                raise InvalidIndexError("a line index does not have its checksum; the blob is damaged")
        elif magic != _MAGIC_1:
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

        index = FileIndex(
            starts=take("Q", header.count),
            lengths=take("I", header.count),
            numbers=take("I", header.count) if header.has_numbers else None,
            models=header.models,
            by_model=tuple(take("I", count) for count in header.model_counts),
            urls=header.urls,
            bad=BadLines()
            if magic == _MAGIC_1
            else BadLines(
                limit=header.bad_limit,
                starts=take("Q", header.bad_count),
                lengths=take("I", header.bad_count),
                numbers=take("I", header.bad_count),
                firsts=take("i", header.bad_count),
            ),
            prefixes=Prefixes(
                keys=take("Q", header.key_count), groups=take("H", header.count) if header.has_groups else None
            )
            if magic == _MAGIC
            else Prefixes(),
        )
        if position != len(view):
            raise InvalidIndexError("a line index goes on after its end; the blob is damaged")
        keys, groups = index.prefixes.keys, index.prefixes.groups
        if not keys or (groups and max(groups) >= len(keys)):
            raise InvalidIndexError("a line index names a prefix that it does not have; the blob is damaged")
        firsts = index.bad.firsts
        if firsts and not ONE_MODEL_TOO_MANY <= min(firsts) <= max(firsts) < len(index):
            raise InvalidIndexError("a line index names a request that it does not have; the blob is damaged")
    except (struct.error, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidIndexError(f"a line index cannot be read: {error}") from error
    return index


def _little_endian(values: array[int]) -> array[int]:
    if sys.byteorder == "big":
        values = array(values.typecode, values)
        values.byteswap()
    return values
