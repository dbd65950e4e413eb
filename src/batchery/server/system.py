"""The routes about the server itself: the models it offers, whether it lives, and whether it can work."""

from __future__ import annotations

import asyncio
import time

import msgspec
import structlog
from litestar import get

from batchery.server.context import AnyRequest, context_of
from batchery.store import workers
from batchery.store.errors import StoreError
from batchery.wire.errors import Unavailable
from batchery.wire.objects import Model, ModelList

PATIENCE = 5.0
"""Seconds after which a store that has not answered is out of reach."""

LISTED = 60.0
"""Seconds after its last heartbeat for which what a worker's upstreams serve is listed, as workers have it too."""

log = structlog.get_logger()


class Health(msgspec.Struct, kw_only=True):
    """All is well; anything else is an error answer."""

    status: str = "ok"


@get("/models")
async def list_models(request: AnyRequest) -> ModelList:
    """List the models that the upstreams serve: the server's own, and those of workers elsewhere."""
    context = context_of(request)
    models = {model.id: model for model in await context.list_models()}
    async with context.database.read() as connection:
        said = await workers.told(connection, time.time() - LISTED)
    told = {model for _, upstreams in said for upstream in upstreams for model in upstream.served or ()}
    return ModelList(data=[*models.values(), *(Model(id=id) for id in sorted(told) if id not in models)])


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
