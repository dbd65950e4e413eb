"""The result index of an ended batch as one blob: how each request ended, and where its line is in the finished files.

It is what `/results` reads the files by in input order, and what `/retry` plans by. Layout, little-endian: the 8 bytes
`BATCHRX1`, a 32-bit count, then for all requests the arrays of `ResultIndex` one after the other.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

from batchery.wire.results import Kind

_MAGIC = b"BATCHRX1"

Status = Literal["pending", "completed", "failed", "expired", "cancelled", "invalid"]
STATUSES: tuple[Status, ...] = ("pending", "completed", "failed", "expired", "cancelled", "invalid")
CODES: dict[Status, int] = {status: code for code, status in enumerate(STATUSES)}
"""`invalid` is a bad line that was passed over: it never was a request, and retrying it is of no use."""

_INVALID = CODES["invalid"]


class DamagedIndexError(ValueError):
    """The blob is not a result index: it was damaged, or written by a later version."""


class ResultIndex(msgspec.Struct, frozen=True):
    """How each request of a batch ended, by its number, from 0.

    Attributes:
        statuses: the code of each one's status, unsigned 8 bit.
        numbers: the physical line of each in the input file, from 1, unsigned 32 bit.
        starts: byte offset of its line in the output file (when completed) or the error file, unsigned 64 bit.
        lengths: bytes of that line with its line break, unsigned 32 bit.
        attempts: how often it was sent, unsigned 32 bit.
    """

    statuses: bytearray
    numbers: array[int]
    starts: array[int]
    lengths: array[int]
    attempts: array[int]

    @classmethod
    def empty(cls, numbers: array[int]) -> ResultIndex:
        """An index in which nothing has ended yet."""
        count = len(numbers)
        return cls(
            statuses=bytearray(count),
            numbers=numbers,
            starts=array("Q", bytes(8 * count)),
            lengths=array("I", bytes(4 * count)),
            attempts=array("I", bytes(4 * count)),
        )

    def __len__(self) -> int:
        return len(self.statuses)

    def put(self, request: int, status: Status, start: int, length: int, attempts: int) -> None:
        """Note how a request ended, and where its line is."""
        self.statuses[request] = CODES[status]
        self.starts[request] = start
        self.lengths[request] = length
        self.attempts[request] = attempts

    def put_lines(
        self, kind: Kind, start: int, requests: Sequence[int], ends: Sequence[int], attempts: Sequence[int], good: int
    ) -> None:
        """Note how requests ended whose lines are one after the other.

        Args:
            kind: which file they are in: of those in the output file all are completed.
            start: byte offset of the first line.
            ends: where each line ends, from there.
            good: the number of requests; what comes after them are bad lines that were passed over.
        """
        statuses, starts, lengths, all_attempts = self.statuses, self.starts, self.lengths, self.attempts
        code = CODES["completed" if kind == "output" else "failed"]
        before = 0
        for request, end, times in zip(requests, ends, attempts, strict=True):
            statuses[request] = code if request < good else _INVALID
            starts[request] = start + before
            lengths[request] = end - before
            all_attempts[request] = times
            before = end

    def to_retry(self) -> list[int]:
        """The requests that running again may mend, in file order."""
        final = (CODES["completed"], CODES["invalid"])
        return [request for request, code in enumerate(self.statuses) if code not in final]


def encode(index: ResultIndex) -> list[bytes]:
    """The index as the pieces of its blob, in order."""
    arrays = (index.numbers, index.starts, index.lengths, index.attempts)
    return [
        _MAGIC + struct.pack("<I", len(index)),
        bytes(index.statuses),
        *(_little_endian(values).tobytes() for values in arrays),
    ]


def decode(blob: bytes | memoryview) -> ResultIndex:
    """Read a blob that `encode` made.

    Raises:
        DamagedIndexError: it is not one.
    """
    view = memoryview(blob)
    if len(view) < 12 or view[:8] != _MAGIC:
        raise DamagedIndexError("a result index has no magic number; the blob is damaged")
    (count,) = struct.unpack_from("<I", view, 8)
    if len(view) != 12 + 21 * count:
        raise DamagedIndexError(f"a result index of {count} requests has {len(view)} bytes; the blob is damaged")
    position = 12 + count

    def take(typecode: str) -> array[int]:
        nonlocal position
        values = array(typecode)
        end = position + count * values.itemsize
        values.frombytes(view[position:end])
        position = end
        return _little_endian(values)

    statuses = bytearray(view[12:position])
    if statuses and max(statuses) >= len(STATUSES):
        raise DamagedIndexError("a result index has a status that does not exist; the blob is damaged")
    return ResultIndex(statuses, take("I"), take("Q"), take("I"), take("I"))


def _little_endian(values: array[int]) -> array[int]:
    if sys.byteorder == "big":
        values = array(values.typecode, values)
        values.byteswap()
    return values
