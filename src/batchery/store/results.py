"""Queries over `results`: the log of recorded results.

A row is one group commit's lines of one batch and kind: a segment of the growing file, with its lines' ends and the
requests that they answer. Reading the file is reading the segments in order, and finishing it is joining them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.schema import results
from batchery.wire.results import Kind

_KIND: dict[Kind, int] = {"output": 0, "error": 1}


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """Some lines of a growing file.

    Attributes:
        batch_id: whose.
        kind: which of its files.
        position: of the first line, from 0.
        requests: which request each line answers, unsigned 32 bit.
        ends: where each line ends in `body`, unsigned 32 bit.
        attempts: after how many attempts, unsigned 32 bit.
        body: the lines.
    """

    batch_id: str
    kind: Kind
    position: int
    requests: array[int]
    ends: array[int]
    attempts: array[int]
    body: bytes


class Lines(msgspec.Struct, frozen=True):
    """Of a segment what reading needs.

    Attributes:
        position: of the first line, from 0.
        ends: where each line ends in `body`.
        body: the lines.
        requests: which request each line answers.
        attempts: after how many attempts.
    """

    position: int
    ends: array[int]
    body: bytes
    requests: array[int]
    attempts: array[int]


class Layout(msgspec.Struct, frozen=True):
    """A segment without its lines: which requests it answers, and where in it.

    Attributes:
        position: of the first line, from 0.
        requests: which request each line answers.
        ends: where each line ends.
        attempts: after how many attempts.
    """

    position: int
    requests: array[int]
    ends: array[int]
    attempts: array[int]


_INSERT = sa.insert(results)
_OF_BATCHES = (
    sa.select(results)
    .where(results.c.batch_id.in_(sa.bindparam("ids", expanding=True)))
    .order_by(results.c.kind, results.c.position)
)
_DROP_OF = sa.delete(results).where(results.c.batch_id.in_(sa.bindparam("ids", expanding=True)))


async def insert(connection: AsyncConnection, segments: Sequence[Segment]) -> None:
    """Add segments; the database refuses a position that is taken."""
    await connection.execute(
        _INSERT,
        [
            {
                "batch_id": segment.batch_id,
                "kind": _KIND[segment.kind],
                "position": segment.position,
                "count": len(segment.ends),
                "requests": segment.requests.tobytes(),
                "ends": segment.ends.tobytes(),
                "attempts": segment.attempts.tobytes(),
                "body": segment.body,
            }
            for segment in segments
        ],
    )


async def read(connection: AsyncConnection, batch: str, kind: Kind, first: int, *, segments: int = 4) -> list[Lines]:
    """Segments of a growing file from the one that holds line `first` on; empty when there is none.

    Args:
        first: a line, from 0.
        segments: at most so many, since each may hold some megabytes.
    """
    found = await connection.execute(
        sa.select(results.c.position, results.c.ends, results.c.body, results.c.requests, results.c.attempts)
        .where(
            results.c.batch_id == batch,
            results.c.kind == _KIND[kind],
            results.c.position + results.c.count > first,
            results.c.position
            >= sa.select(sa.func.coalesce(sa.func.max(results.c.position), 0))
            .where(results.c.batch_id == batch, results.c.kind == _KIND[kind], results.c.position <= first)
            .scalar_subquery(),
        )
        .order_by(results.c.position)
        .limit(segments)
    )
    return [
        Lines(position, array("I", ends), body, array("I", requests), array("I", attempts))
        for position, ends, body, requests, attempts in found
    ]


async def of_batches(connection: AsyncConnection, ids: Sequence[str]) -> list[Segment]:
    """The whole logs of some batches, of which the caller knows that they are small; in order of kind and position."""
    found = await connection.execute(_OF_BATCHES, {"ids": ids})
    kinds = {number: kind for kind, number in _KIND.items()}
    return [
        Segment(
            batch_id=row.batch_id,
            kind=kinds[row.kind],
            position=row.position,
            requests=array("I", row.requests),
            ends=array("I", row.ends),
            attempts=array("I", row.attempts),
            body=row.body,
        )
        for row in found
    ]


async def layout(
    connection: AsyncConnection, batch: str, kind: Kind, first: int, *, segments: int = 1_000
) -> list[Layout]:
    """Segments of a growing file without their lines, from the one that begins at line `first` on.

    Args:
        first: a line, from 0.
        segments: at most so many.
    """
    found = await connection.execute(
        sa.select(results.c.position, results.c.requests, results.c.ends, results.c.attempts)
        .where(results.c.batch_id == batch, results.c.kind == _KIND[kind], results.c.position >= first)
        .order_by(results.c.position)
        .limit(segments)
    )
    return [
        Layout(position, array("I", requests), array("I", ends), array("I", attempts))
        for position, requests, ends, attempts in found
    ]


async def body(connection: AsyncConnection, batch: str, kind: Kind, position: int) -> bytes | None:
    """The lines of the segment that begins at a position; None when there is none any more."""
    found = await connection.execute(
        sa.select(results.c.body).where(
            results.c.batch_id == batch, results.c.kind == _KIND[kind], results.c.position == position
        )
    )
    lines: bytes | None = found.scalar()
    return lines


async def drop_some(connection: AsyncConnection, batch: str, segments: int) -> int:
    """Drop up to `segments` rows of an ended batch's log, so that no transaction is long.

    Returns:
        How many were dropped.
    """
    some = sa.select(results.c.kind, results.c.position).where(results.c.batch_id == batch).limit(segments)
    keys = [(kind, position) for kind, position in await connection.execute(some)]
    if keys:
        await connection.execute(
            sa.delete(results).where(
                results.c.batch_id == batch,
                results.c.kind == sa.bindparam("of_kind"),
                results.c.position == sa.bindparam("of_position"),
            ),
            [{"of_kind": kind, "of_position": position} for kind, position in keys],
        )
    return len(keys)


async def drop_of(connection: AsyncConnection, ids: Sequence[str]) -> None:
    """Drop the whole logs of some batches, of which the caller knows that they are small."""
    await connection.execute(_DROP_OF, {"ids": ids})
