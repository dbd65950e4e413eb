"""Queries over `identity`: which database this is, for whoever has to tell two of them apart."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.ids import new_id
from batchery.store.schema import identity


async def get(connection: AsyncConnection) -> str:
    """The database's id, 32 hex digits; made when it is asked for first, so the transaction must be one that writes."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    await connection.execute(insert(identity).values(only=1, id=new_id()).on_conflict_do_nothing())
    return str((await connection.execute(sa.select(identity.c.id))).scalar_one())
