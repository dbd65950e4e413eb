"""The routes of batches that exist: list, get, which may wait for news, and cancel."""

from __future__ import annotations

import asyncio
import math

from litestar import Response, get, post
from litestar.params import FromPath
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.engine import lifecycle
from batchery.server.context import AnyRequest, context_of, owner_of
from batchery.server.parameters import Parameters, parameters_of
from batchery.server.prefer import wait_of
from batchery.server.render import batch_object, batch_page
from batchery.server.watch import check_key, gone, hub_of
from batchery.store import batches
from batchery.store.batches import BatchRow, Wanted
from batchery.store.schema import ENDED, LIVE
from batchery.wire import ids
from batchery.wire.errors import BadRequest, NotFound
from batchery.wire.objects import BatchList, BatchObject
from batchery.wire.windows import window_seconds

MAX_PAGE = 100
DEFAULT_PAGE = 20


def no_such_batch(id: str) -> NotFound:
    """The answer for a batch that does not exist, was deleted, or is somebody else's."""
    return NotFound(f"No batch found with id '{id[:100]}'.", param="id")


async def owned_batch(connection: AsyncConnection, id: str, owner: str, *, lock: bool = False) -> BatchRow:
    """A batch by the id that a caller sent.

    Args:
        lock: hold it until the end of the transaction.

    Raises:
        NotFound: there is none, or none of the caller's.
    """
    key = ids.parse("batch", id)
    row = await batches.get(connection, key, lock=lock) if key is not None else None
    if row is None or row.owner != owner or row.deleted_at is not None:
        raise no_such_batch(id)
    return row


@get("/batches")
async def list_batches(request: AnyRequest) -> BatchList:
    """List the batches, newest first."""
    parameters = parameters_of(request)
    limit = parameters.whole("limit", 1, MAX_PAGE) or DEFAULT_PAGE
    wanted = read_filters(parameters)
    live_first = parameters.flag("active_first")
    after = parameters.text("after")
    owner, context = owner_of(request), context_of(request)
    async with context.database.read() as connection:
        last = None if after is None else await _cursor(connection, after, owner)
        if live_first:
            rows = await batches.live_first_page(connection, owner, limit=limit + 1, after=last, wanted=wanted)
        else:
            seq = None if last is None else last.seq
            rows = await batches.page(connection, owner, limit=limit + 1, after=seq, wanted=wanted)
    return batch_page(rows, limit, await context.forecast.of_all(rows[:limit]))


def read_filters(parameters: Parameters) -> Wanted:
    """Which batches a list is to have.

    Raises:
        BadRequest: names the parameter that is wrong, and what it accepts.
    """
    return Wanted(
        statuses=parameters.words("status", LIVE + ENDED) or LIVE + ENDED,
        windows=parameters.several("completion_window", _is_window, "one or several windows such as 24h or 30m"),
        created_after=parameters.moment("created_after", math.ceil),
        created_before=parameters.moment("created_before", math.floor),
    )


def _is_window(text: str) -> bool:
    try:
        window_seconds(text)
    except ValueError:
        return False
    return True


async def _cursor(connection: AsyncConnection, after: str, owner: str) -> BatchRow:
    """The last batch of the page before; it may have been deleted since, as when somebody lists in order to delete."""
    key = ids.parse("batch", after)
    row = await batches.get(connection, key) if key is not None else None
    if row is None or row.owner != owner:
        raise BadRequest(
            f"after must be the id of one of your batches, not {after[:100]!r}.", param="after", code="not_found"
        )
    return row


@get("/batches/{id:str}")
async def get_batch(request: AnyRequest, id: FromPath[str]) -> Response[BatchObject]:
    """Get a batch, now or, with `Prefer: wait=N`, once it has changed or N seconds have passed."""
    context, owner = context_of(request), owner_of(request)
    row = await context.database.look(lambda connection: owned_batch(connection, id, owner))
    headers = {"Vary": "Prefer"}
    seconds = wait_of(request.headers.getall("prefer", []))
    if seconds is not None and not hub_of(request).is_full:
        headers["Preference-Applied"] = f"wait={seconds}"
        if row.status in LIVE:
            row = await _when_changed(request, row, seconds)
    return Response(batch_object(row, await context.forecast.of(row)), headers=headers)


async def _when_changed(request: AnyRequest, row: BatchRow, seconds: int) -> BatchRow:
    """The batch once it is not as it was, or after so many seconds, or when the server stops.

    Raises:
        NotFound: it has been deleted.
        Unauthorized: the caller's key has been revoked.
        StoreUnavailable, StoreFull: the database has failed for too long.
    """
    hub = hub_of(request)
    async with hub.watch(row) as watch:
        waits = [asyncio.ensure_future(watch.changed(seconds)), asyncio.ensure_future(gone(request.receive))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if watch.row is None:
            raise no_such_batch(ids.show("batch", row.id))
        if hub.trouble is not None and not hub.stopping:
            raise hub.trouble
        await check_key(request)
        return watch.row


@post("/batches/{id:str}/cancel", status_code=200)
async def cancel_batch(request: AnyRequest, id: FromPath[str]) -> BatchObject:
    """Cancel a batch; what has finished stays."""
    context, owner = context_of(request), owner_of(request)
    async with context.database.write() as connection:
        row = await owned_batch(connection, id, owner, lock=True)
        changes = lifecycle.cancelled_by_caller(row.status, now=context.now())
        if changes is not None:
            await batches.change(connection, row.id, expect=row.status, changes=changes)
            row = await owned_batch(connection, id, owner)
    if changes is not None:
        context.wake()
    return batch_object(row, await context.forecast.of_committed(row))
