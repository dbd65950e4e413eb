"""What the handlers work with, and whose request it is."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from litestar import Request

from batchery.store.blobs import BlobStore
from batchery.store.database import Database
from batchery.wire.lines import Limits
from batchery.wire.objects import MAX_EXPIRY, Model


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the handlers work with.

    Attributes:
        database: open, and migrated.
        blobs: where files lie.
        limits: of one input file.
        windows: the completion windows on offer, such as `("24h", "1h")`.
        wake: tells the worker that there is something to do; must not block.
        list_models: what the upstreams serve.
        owner: to whom everything belongs as long as there are no keys.
        file_expiry: after how many seconds an upload expires that did not ask for anything; None for never.
        idle_timeout: seconds without a byte after which a request body is given up.
        clock: Unix seconds.
    """

    database: Database
    blobs: BlobStore
    limits: Limits
    windows: tuple[str, ...]
    wake: Callable[[], None]
    list_models: Callable[[], Awaitable[list[Model]]]
    owner: str = "local"
    file_expiry: int | None = MAX_EXPIRY
    idle_timeout: float = 60.0
    clock: Callable[[], float] = time.time

    def now(self) -> int:
        """Whole Unix seconds, as the API shows times."""
        return int(self.clock())


AnyRequest = Request[Any, Any, Any]


def context_of(request: AnyRequest) -> Context:
    """The context of the app that this request came to."""
    context: Context = request.app.state.context
    return context


def owner_of(request: AnyRequest) -> str:
    """Whose request it is: the owner of everything that it makes, sees or changes."""
    return context_of(request).owner
