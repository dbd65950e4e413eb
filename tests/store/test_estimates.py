"""The queries that estimates are made from, on both databases."""

from __future__ import annotations

from batchery.store import estimates
from batchery.store.database import Database


async def test_more_batches_can_be_asked_for_than_a_query_takes_parameters(database: Database) -> None:
    """As many may have ended since the last estimate."""
    async with database.read() as connection:
        assert await estimates.done_of(connection, [f"{number:032x}" for number in range(40_000)]) == {}
