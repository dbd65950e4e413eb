"""What the exit codes of the client commands mean, and which one an error has; `docs/client.md` has the same table.

That of a job which came to its end is in its receipt.
"""

from __future__ import annotations

from batchery.client import errors
from batchery.client.errors import ClientError

OK, USAGE, INVALID, SOME_FAILED, BATCH_FAILED, REFUSED, LOST, OVER_COST, DETACHED = 0, 1, 2, 3, 4, 5, 6, 7, 130


def exit_code_of_error(error: ClientError) -> int:
    """The exit code of a job, or a call, that could not come to its end."""
    if isinstance(error, errors.InputError):
        return INVALID
    if isinstance(error, errors.AuthError | errors.QuotaError):
        return REFUSED
    if isinstance(error, errors.ConnectionLostError | errors.ServerError):
        return LOST
    return OVER_COST if isinstance(error, errors.OverCostError) else USAGE
