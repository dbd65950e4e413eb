"""Queries over `small_indexes`: the result indexes of batches that have few results.

A blob of its own costs a batch a file to be made and to be synced. A row is written in the transaction that ends its
batch, and goes when another index takes its place, or with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.schema import small_indexes

HERE = "small_indexes"
"""What stands in place of a blob's key in `batches.result_index` where the index is in this table."""

MAX_BYTES = 16 * 1024
"""Bytes of an index up to which it is kept here, some 780 requests: many larger ones would swell the database."""

_insert = sa.insert(small_indexes)
_get = sa.select(small_indexes.c.content).where(small_indexes.c.batch_seq == sa.bindparam("seq"))
_drop = sa.delete(small_indexes).where(small_indexes.c.batch_seq.in_(sa.bindparam("seqs", expanding=True)))


async def insert(connection: AsyncConnection, contents: Mapping[int, bytes]) -> None:
    """Add indexes.

    Args:
        contents: by the `seq` of their batches.
    """
    if contents:
        await connection.execute(_insert, [{"batch_seq": seq, "content": content} for seq, content in contents.items()])


async def get(connection: AsyncConnection, seq: int) -> bytes | None:
    """The index of a batch; None where there is none here."""
    content: bytes | None = (await connection.execute(_get, {"seq": seq})).scalar()
    return content


async def drop(connection: AsyncConnection, seqs: Sequence[int]) -> None:
    """Forget the indexes of some batches, as far as they are here."""
    await connection.execute(_drop, {"seqs": seqs})


def blob_of(result_index: str | None) -> str | None:
    """The blob that a batch's `result_index` names; None where it names none."""
    return None if result_index == HERE else result_index
