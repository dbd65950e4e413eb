"""The routes about the server itself: the models it offers, whether it lives, and whether it can work."""

from __future__ import annotations

import asyncio

import msgspec
import structlog
from litestar import get

from batchery.server.context import AnyRequest, context_of
from batchery.store.errors import StoreError
from batchery.wire.errors import Unavailable
from batchery.wire.objects import ModelList

PATIENCE = 5.0
"""Seconds after which a store that has not answered is out of reach."""

log = structlog.get_logger()


class Health(msgspec.Struct, kw_only=True):
    """All is well; anything else is an error answer."""

    status: str = "ok"


@get("/models")
async def list_models(request: AnyRequest) -> ModelList:
    """List the models that the upstreams serve."""
    return ModelList(data=await context_of(request).list_models())


@get("/healthz")
async def healthz() -> Health:
    """The server is alive."""
    return Health()


@get("/readyz")
async def readyz(request: AnyRequest) -> Health:
    """The database and the file store answer."""
    context = context_of(request)
    for name, ping in (("database", context.database.ping), ("file store", context.blobs.ping)):
        try:
            async with asyncio.timeout(PATIENCE):
                await ping()
        except (StoreError, TimeoutError) as error:
            log.warning("not ready", part=name, cause=str(error) or "no answer")
            raise Unavailable(f"The {name} does not answer.", code="not_ready") from error
    return Health()
