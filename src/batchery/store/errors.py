"""What can go wrong below: two cases that callers treat differently from a defect.

StoreError
├── StoreUnavailable   the database or the blob store does not answer, or is locked for too long; try again later
└── StoreFull          no room left on the device; goes on once there is room
"""

from __future__ import annotations

import errno


class StoreError(Exception):
    """The durable side failed; nothing half-written is visible."""


class StoreUnavailable(StoreError):
    """The database or the blob store does not answer."""


class StoreFull(StoreError):
    """There is no room left."""


_FULL_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXT = (
    "disk is full",
    "no space left",
    "quota exceeded",
    "disk quota",
    "could not extend file",
    "file too large",
)


def classify(error: BaseException) -> StoreError:
    """The store's own error for one of a library's: full when it says so, else unavailable."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL_ERRNO:
            return StoreFull(str(error))
        if any(text in str(seen).lower() for text in _FULL_TEXT):
            return StoreFull(str(error))
        seen = seen.__cause__ or seen.__context__
    return StoreUnavailable(str(error))
