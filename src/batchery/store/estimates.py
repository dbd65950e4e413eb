"""Queries over `batches` from which it is estimated what a new batch will take; none looks at more than the live or
the newest of them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.schema import ENDED, LIVE_SQL, api_keys, batches

LOOK_BACK = 1_000
"""Of so many newest batches those are looked for that say something."""

ENOUGH = 20
"""So many that do are enough."""

NAMED = 10_000
"""Batches that one query names at most; databases take some 32 000 parameters."""


async def queued_requests(connection: AsyncConnection, due: int) -> int:
    """The requests without a result in live batches, whoever owns them, that are due no later than a time.

    Args:
        due: Unix seconds.
    """
    running = ("validating", "in_progress")
    bad = sa.case((batches.c.failed < batches.c.invalid, batches.c.invalid), else_=batches.c.failed)
    found = await connection.execute(
        sa.select(sa.func.coalesce(sa.func.sum(batches.c.total - batches.c.completed - bad), 0)).where(
            batches.c.status.in_(LIVE_SQL), batches.c.status.in_(running), batches.c.expires_at <= due
        )
    )
    return int(found.scalar_one())


_bad = sa.case((batches.c.failed < batches.c.invalid, batches.c.invalid), else_=batches.c.failed)
_planned = batches.c.status == "in_progress"
_results = batches.c.completed + batches.c.failed - batches.c.run_done


_running = (
    sa.select(
        batches.c.id,
        batches.c.owner,
        sa.func.coalesce(api_keys.c.weight, 1).label("weight"),
        batches.c.expires_at.label("deadline"),
        (batches.c.total - batches.c.completed - _bad).label("left"),
        sa.case((_planned, _results), else_=0).label("done"),
        sa.case((_planned, batches.c.run_started_at), else_=None).label("since"),
        batches.c.model,
    )
    .select_from(batches.outerjoin(api_keys, batches.c.api_key == api_keys.c.id))
    .where(batches.c.status.in_(LIVE_SQL), batches.c.status.in_(("validating", "in_progress")))
    .order_by(batches.c.expires_at, batches.c.seq)
)


async def running(connection: AsyncConnection) -> Sequence[Sequence[Any]]:
    """How far every batch is that runs or waits for its plan, in order of deadline and creation: the fields of
    `engine.forecast.Progress`, in their order.
    """
    return (await connection.execute(_running)).all()


async def done_of(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, int]:
    """The results of these batches in their last runs."""
    done: dict[str, int] = {}
    for start in range(0, len(ids), NAMED):
        some = batches.c.id.in_(ids[start : start + NAMED])
        found = await connection.execute(sa.select(batches.c.id, _results).where(some))
        done |= {row[0]: row[1] for row in found}
    return done


async def done_since(connection: AsyncConnection, since: float, models: Collection[str] | None = None) -> int:
    """The results of batches whose run began no earlier than a time (Unix seconds), and is over.

    Args:
        models: only of those that ask for one of these alone; None for all.
    """
    recent = (
        sa.select(_results.label("results"), batches.c.status, batches.c.run_started_at, batches.c.model)
        .order_by(batches.c.seq.desc())
        .limit(LOOK_BACK)
        .subquery()
    )
    found = await connection.execute(
        sa.select(recent.c.model, sa.func.sum(recent.c.results))
        .where(recent.c.run_started_at >= since, recent.c.status.in_(("finalizing", "cancelling", *ENDED)))
        .group_by(recent.c.model)
    )
    return sum(int(results) for model, results in found if models is None or model in models)


async def output_tokens(connection: AsyncConnection, owner: str) -> dict[str, float]:
    """Output tokens for each completed request, by model, as far as recent batches of an owner tell: the mean over the
    last `ENOUGH` completed ones that asked for that model alone and whose upstream counted tokens.
    """
    recent = (
        sa.select(batches.c.seq, batches.c.model, batches.c.status, batches.c.completed, batches.c.output_tokens)
        .where(batches.c.owner == owner)
        .order_by(batches.c.seq.desc())
        .limit(LOOK_BACK)
        .subquery()
    )
    found = await connection.execute(
        sa.select(recent.c.model, recent.c.completed, recent.c.output_tokens)
        .where(
            recent.c.status == "completed",
            recent.c.model.is_not(None),
            recent.c.completed > 0,
            recent.c.output_tokens > 0,
        )
        .order_by(recent.c.seq.desc())
    )
    by_model: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for model, completed, tokens in found:
        if len(by_model[model]) < ENOUGH:
            by_model[model].append((completed, tokens))
    return {
        model: sum(tokens for _, tokens in rows) / sum(completed for completed, _ in rows)
        for model, rows in by_model.items()
    }


async def recent_rate(connection: AsyncConnection) -> float | None:
    """Results a second of the batches that ran last, whoever owns them: the median, since a batch that was retried
    seems to have done all its requests in the time of the last few. None if no batch has run.
    """
    columns = batches.c
    recent = (
        sa.select(
            (columns.completed + columns.failed - columns.invalid).label("results"),
            columns.status,
            columns.in_progress_at,
            columns.finalizing_at,
        )
        .order_by(columns.seq.desc())
        .limit(LOOK_BACK)
        .subquery()
    )
    found = await connection.execute(
        sa.select(recent.c.results, recent.c.finalizing_at - recent.c.in_progress_at)
        .where(
            recent.c.results > 0,
            recent.c.status.in_(("completed", "failed", "expired")),
            recent.c.in_progress_at.is_not(None),
            recent.c.finalizing_at.is_not(None),
        )
        .order_by(recent.c.finalizing_at.desc())
        .limit(ENOUGH)
    )
    rates = [results / max(1, seconds) for results, seconds in found]
    return statistics.median(rates) if rates else None
