"""Cancelling a batch at a server, whatever that says of one that is over already."""

from __future__ import annotations

from batchery.client.errors import ApiError
from batchery.client.http import Api
from batchery.client.objects import Batch, read_batch


def cancelled(api: Api, batch_id: str) -> Batch:
    """Cancel a batch; one that is over already stays as it is.

    Raises:
        ClientError: it could not be cancelled.
    """
    try:
        return api.cancel_batch(batch_id)
    except ApiError as error:
        if error.status not in (400, 409):
            raise
        batch = read_batch(api.get_batch(batch_id).value)
        if not batch.terminal:
            raise
        return batch
