"""The leases on batches that are being planned or finalised.

The worker's heartbeat renews it for as long as the work goes on. When the work fails, the batch is put off for a
moment, so that others go first; if not even that can be written down, the lease lapses by itself.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from batchery.store import batches
from batchery.store.database import Database
from batchery.store.errors import StoreError

PUT_OFF = 1.0
"""Seconds before a batch is tried again whose planning or finishing has failed."""


class BatchLeases:
    """The leases that one role of a worker has on batches.

    Args:
        database: the tables.
        worker: its id.

    Attributes:
        batches: what is worked on now; these leases are to be renewed.
    """

    def __init__(self, database: Database, worker: str) -> None:
        self._database = database
        self._worker = worker
        self.batches: set[str] = set()

    @asynccontextmanager
    async def held(self, *ids: str) -> AsyncIterator[None]:
        """Work on batches that were just claimed."""
        self.batches.update(ids)
        try:
            yield
        except StoreError:
            with suppress(StoreError):
                async with self._database.write() as connection:
                    await batches.renew(connection, self._worker, ids, time.time() + PUT_OFF)
            raise
        finally:
            self.batches.difference_update(ids)
