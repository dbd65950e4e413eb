"""Places for what holds megabytes and an open file while a client takes its time: there is an end to them."""

from __future__ import annotations

from typing import ClassVar

from batchery.wire.errors import TooManyRequests

RETRY_AFTER = 5


class Places:
    """So many at a time.

    Args:
        most: how many there are.
    """

    doing: ClassVar[str]
    code: ClassVar[str]

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0

    def check(self) -> None:
        """Raises TooManyRequests if there is no place."""
        if self._taken >= self._most:
            raise TooManyRequests(
                f"This server is {self.doing}, {self._taken} of them, the most that it does at a time. Try again in "
                "a moment.",
                retry_after=RETRY_AFTER,
                code=self.code,
            )

    def take(self) -> None:
        """Take a place; raises TooManyRequests if there is none."""
        self.check()
        self._taken += 1

    def give_back(self) -> None:
        """Give a place back."""
        self._taken -= 1


class Uploads(Places):
    """Request bodies that are more than small."""

    doing = "taking in uploads"
    code = "too_many_uploads"


class Downloads(Places):
    """Files that are being sent."""

    doing = "sending files"
    code = "too_many_downloads"
