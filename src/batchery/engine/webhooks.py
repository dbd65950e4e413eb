"""The deliverer: tells the ends of batches to the URLs that were named for it.

It takes events from the outbox (`batchery.store.webhooks`), sends each in a task of its own, and writes down what came
of it. An event is sent until a receiver has accepted it or the schedule is used up, so it may arrive twice, with the
same id; a 2xx accepts it. Secrets, paths and queries are never logged.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Callable, Sequence
from functools import cached_property

import msgspec
import structlog

from batchery import __version__
from batchery.engine import egress
from batchery.engine.egress import Lookup, Network, RefusedError, Target
from batchery.engine.post import PostError, Reply, post
from batchery.store import webhooks
from batchery.store.database import Database
from batchery.store.errors import StoreError
from batchery.store.webhooks import WebhookRow
from batchery.upstreams.http import retry_after
from batchery.wire.webhooks import event_id, sign

log = structlog.get_logger()

DELAYS = (5.0, 30.0, 120.0, 600.0, 1_800.0, 3_600.0, 7_200.0, 14_400.0, 28_800.0, 28_800.0)
"""Seconds from each failed attempt to the next: with the first, eleven attempts within about a day."""

JITTER = 0.1
"""A delay is longer or shorter by up to this part of it, so that what failed together does not come back together."""

MAX_RETRY_AFTER = 3_600.0
"""Seconds to which a receiver can put off the next attempt."""

TIMEOUT = 15.0
"""Seconds that an attempt may take, from looking up the name to the head of the answer."""

CLAIM = 20.0
"""Seconds after which an event is due again whose sender has died: longer than an attempt."""

AT_ONCE = 64
AT_ONCE_PER_HOST = 4
AT_ONCE_PER_OWNER = 16

GONE = 410


def next_attempt(attempts: int, wait: float | None, draw: float) -> float | None:
    """How many seconds after a failure to try again; None to give up.

    Args:
        attempts: made so far, at least one.
        wait: what the receiver asks for, in seconds.
        draw: at random, from 0 to 1.
    """
    if attempts > len(DELAYS):
        return None
    delay = DELAYS[attempts - 1] * (1 + JITTER * (2 * draw - 1))
    return max(delay, min(wait or 0.0, MAX_RETRY_AFTER))


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of an attempt.

    Attributes:
        error: why it failed; None when the event was accepted.
        wait: the seconds that the receiver asks to wait.
        final: whether it wants no further attempt.
    """

    error: str | None
    wait: float | None = None
    final: bool = False


def judge(reply: Reply, now: float) -> Outcome:
    """What an answer means.

    Args:
        now: Unix seconds.
    """
    if 200 <= reply.status < 300:
        return Outcome(error=None)
    if 300 <= reply.status < 400:
        return Outcome(error=f"HTTP {reply.status}: redirects are not followed; name the final URL")
    if reply.status == GONE:
        return Outcome(error=f"HTTP {reply.status}: the receiver wants no more", final=True)
    return Outcome(error=f"HTTP {reply.status}", wait=retry_after(reply.retry_after, None, now))


class Deliverer:
    """Delivers events for one worker.

    Args:
        database: the tables.
        allowed: networks that events may go to although they are not the public internet's.
        freed: called when a delivery has ended, so that there is room for another.
        lookup: gives the addresses of a host name.
    """

    def __init__(
        self,
        database: Database,
        allowed: Sequence[Network],
        freed: Callable[[], None],
        lookup: Lookup = egress.lookup,
    ) -> None:
        self._database = database
        self._allowed = allowed
        self._freed = freed
        self._lookup = lookup
        self._sending: dict[asyncio.Task[None], WebhookRow] = {}

    async def deliver_some(self) -> bool:
        """Begin to send what is due, as far as there is room.

        Returns:
            Whether there was something, so that there may be more.

        Raises:
            StoreError: the database failed.
        """
        room = AT_ONCE - len(self._sending)
        if room <= 0:
            return False
        now = time.time()
        async with self._database.read() as connection:
            if not await webhooks.is_due(connection, now):
                return False
        async with self._database.write() as connection:
            rows = await webhooks.claim(
                connection,
                now,
                now + CLAIM,
                limit=room,
                per_host=AT_ONCE_PER_HOST,
                per_owner=AT_ONCE_PER_OWNER,
                busy=tuple(self._sending.values()),
            )
        for row in rows:
            task = asyncio.create_task(self._deliver(row))
            self._sending[task] = row
            task.add_done_callback(self._ended)
        return bool(rows)

    async def close(self, grace: float) -> None:
        """Let what is being sent end, break off what takes too long, and give that back at once.

        Args:
            grace: seconds.
        """
        if not self._sending:
            return
        _, late = await asyncio.wait(self._sending, timeout=grace)
        rows = [self._sending[task] for task in late]
        for task in late:
            task.cancel()
        if rows:
            await asyncio.wait(late)
            try:
                async with self._database.write() as connection:
                    for row in rows:
                        await webhooks.failed(connection, row, "broken off: the worker was stopped", time.time())
            except StoreError as error:
                log.warning("webhooks could not be given back; they are due again soon", reason=str(error))

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._sending[task]
        self._freed()

    async def _deliver(self, row: WebhookRow) -> None:
        """Make one attempt, and write down what came of it."""
        to, outcome = "", Outcome(error="a defect of this server, which its log shows")
        try:
            target = egress.parse_target(row.url)
            to = target.origin
            outcome = await self._attempt(row, target)
        except RefusedError as refused:
            outcome = Outcome(error=f"not sent: {refused}")
        except Exception:  # one event must not stop the worker, nor be tried without end
            log.exception("a webhook could not be sent", event_id=event_id(row.id))
        now = time.time()
        delay = None if outcome.final else next_attempt(row.attempts, outcome.wait, random.random())  # noqa: S311
        told = log.bind(event_id=event_id(row.id), batch=row.batch_id, type=row.type, to=to, attempts=row.attempts)
        try:
            async with self._database.write() as connection:
                if outcome.error is None:
                    await webhooks.delivered(connection, row.id, int(now))
                    held = True
                else:
                    next_at = None if delay is None else now + delay
                    held = await webhooks.failed(connection, row, outcome.error, next_at)
        except StoreError as error:
            told.warning("what came of a webhook could not be recorded; it is sent again", reason=str(error))
            return
        if outcome.error is None:
            told.info("webhook delivered")
        elif held and delay is None:
            told.warning("webhook given up", reason=outcome.error)
        elif held:
            told.info("webhook not delivered yet", reason=outcome.error, again_in_s=round(delay or 0))

    async def _attempt(self, row: WebhookRow, target: Target) -> Outcome:
        """Send it once.

        Raises:
            RefusedError: its host may not be reached.
        """
        now = int(time.time())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"batchery/{__version__}",
            "webhook-id": event_id(row.id),
            "webhook-timestamp": str(now),
            "webhook-signature": sign(row.secret, event_id(row.id), now, row.body),
        }
        try:
            async with asyncio.timeout(TIMEOUT):
                try:
                    addresses = await egress.addresses(target, self._allowed, self._lookup)
                except OSError as error:
                    return Outcome(error=f"{target.host} has no address: {(error.strerror or str(error)).lower()}")
                reply = await post(target, addresses, headers, row.body, self._tls)
        except TimeoutError:
            return Outcome(error=f"no answer within {TIMEOUT:g} s")
        except PostError as error:
            return Outcome(error=str(error))
        return judge(reply, time.time())

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """Trusts the authorities that this system trusts. Made late: that takes some 20 ms."""
        return ssl.create_default_context()
