"""Every blob that the database knows of, wherever it is referred to.

A table that gets a column with a blob's key has to be added here, or the sweep of orphans deletes its blobs; a test
holds this to the schema.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.schema import batches, dead_blobs, files, upload_parts

COLUMNS = (
    files.c.blob_key,
    files.c.index_key,
    upload_parts.c.blob_key,
    batches.c.result_index,
    # Their blobs are deleted by the sweep that reads this table, and not before its time.
    dead_blobs.c.key,
)


async def blobs(connection: AsyncConnection, kind: str) -> set[str]:
    """The keys of all blobs of one kind that anything refers to.

    Args:
        kind: what the keys begin with, as in `blobs.KINDS`.
    """
    found = await connection.execute(
        sa.union_all(*(sa.select(column).where(column.like(f"{kind}/%")) for column in COLUMNS))
    )
    return set(found.scalars())
