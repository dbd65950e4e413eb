"""What the handlers work with, and whose request it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from litestar import Request

from batchery.engine.egress import Network
from batchery.server.forecast import Forecast
from batchery.store.blobs import BlobStore
from batchery.store.database import Database
from batchery.wire.bodies import MAX_EXPIRY
from batchery.wire.lines import Limits
from batchery.wire.objects import Model
from batchery.wire.prices import Prices


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
        may_be_open: whether anybody is let in, without a key, as long as no key was ever made; only for a server that
            nobody but this machine can reach.
        prices: what tokens cost, by model, for estimates.
        file_expiry: after how many seconds an upload expires that did not ask for anything; None for never.
        idle_timeout: seconds without a byte after which a request body is given up.
        min_rate: bytes a second that a request body must come at, on average over `rate_window`.
        rate_window: seconds over which that is measured.
        max_uploads: how many request bodies that are more than small are taken in at a time.
        max_downloads: how many files are sent at a time, results and lines of event streams among them.
        webhook_networks: networks that webhooks may go to although they are not the public internet's.
        stopping: set when the server is told to stop: what waits for batches to change ends then.
        clock: Unix seconds.
        forecast: when batches are expected to be done.
    """

    database: Database
    blobs: BlobStore
    limits: Limits
    windows: tuple[str, ...]
    wake: Callable[[], None]
    list_models: Callable[[], Awaitable[list[Model]]]
    may_be_open: bool = False
    prices: Prices = field(default_factory=dict)
    file_expiry: int | None = MAX_EXPIRY
    idle_timeout: float = 60.0
    min_rate: int = 1024
    rate_window: float = 30.0
    max_uploads: int = 64
    max_downloads: int = 256
    webhook_networks: tuple[Network, ...] = ()
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    clock: Callable[[], float] = time.time
    forecast: Forecast = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forecast", Forecast(self.database, self.clock))

    def now(self) -> int:
        """Whole Unix seconds, as the API shows times."""
        return int(self.clock())


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who sends a request.

    Attributes:
        owner: of everything that the request makes, sees or changes.
        key: the bare id of the key that it came with; None while there are no keys.
        max_queued_requests: how many requests the key may have in live batches; None for any number.
        max_live_batches: how many live batches it may have, likewise.
        max_upload_bytes: how many bytes its uploaded files may have together, likewise.
        webhook_url: where the end of its batches is told; None for nowhere.
        webhook_secret: what that is signed with.
    """

    owner: str
    key: str | None = None
    max_queued_requests: int | None = None
    max_live_batches: int | None = None
    max_upload_bytes: int | None = None
    webhook_url: str | None = None
    webhook_secret: str | None = None


AnyRequest = Request[Any, Any, Any]


def context_of(request: AnyRequest) -> Context:
    """The context of the app that this request came to."""
    context: Context = request.app.state.context
    return context


def caller_of(request: AnyRequest) -> Caller:
    """Who sends this request, as `batchery.server.auth` has found out before the handler was called."""
    caller: Caller = request.state.caller
    return caller


def owner_of(request: AnyRequest) -> str:
    """Whose request it is: the owner of everything that it makes, sees or changes."""
    return caller_of(request).owner
