"""The deliverer: every event reaches a receiver that wants it, in the time and as often as the schedule says, and none
reaches what the guard keeps it from."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import Any

import openai
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from batchery import __version__
from batchery.engine import webhooks as module
from batchery.engine.egress import parse_networks
from batchery.engine.post import Reply
from batchery.engine.webhooks import DELAYS, Deliverer, Outcome, judge, next_attempt
from batchery.store import batches, webhooks
from batchery.store.database import Database
from batchery.store.errors import StoreUnavailable
from batchery.store.schema import webhooks as table
from batchery.store.webhooks import WebhookRow
from batchery.upstreams.http import HttpUpstream
from batchery.upstreams.simulator import Behaviour, running_simulator
from tests.engine.rig import Rig
from tests.receivers import SECRET, Receiver, accept, first, hang, receiver, status
from tests.requests import chat_line
from tests.store.examples import add_batch

LOCAL = parse_networks("127.0.0.1")


async def told(rig: Rig, url: str, count: int = 1, **values: Any) -> list[str]:
    """Batches that have just ended, and whose ends are to be told at a URL; the ids of the events."""
    before = {row.id for row in await outbox(rig)}
    async with rig.database.write() as connection:
        for _ in range(count):
            batch = await add_batch(
                connection, **{"status": "completed", "webhook_url": url, "webhook_secret": SECRET} | values
            )
            await webhooks.tell(connection, batch, int(time.time()))
    return [row.id for row in await outbox(rig) if row.id not in before]


async def outbox(rig: Rig) -> list[WebhookRow]:
    async with rig.database.read() as connection:
        found = await connection.execute(sa.select(table).order_by(table.c.id))
        return [WebhookRow(**row._mapping) for row in found]


async def make_due(rig: Rig) -> None:
    """Let the time pass until everything that waits is due."""
    async with rig.database.write() as connection:
        await connection.execute(sa.update(table).where(table.c.next_at.is_not(None)).values(next_at=0.0))


async def until(rig: Rig, reached: Callable[[list[WebhookRow]], bool]) -> list[WebhookRow]:
    deadline = time.monotonic() + 20
    while not reached(rows := await outbox(rig)):
        assert time.monotonic() < deadline, rows
        await asyncio.sleep(0.01)
    return rows


async def received(found: Receiver) -> None:
    """Wait for the first delivery."""
    deadline = time.monotonic() + 20
    while not found.deliveries:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def all_delivered(rows: list[WebhookRow]) -> bool:
    return all(row.delivered_at is not None for row in rows)


class Delivering:
    """A deliverer, and its steps as a worker takes them."""

    def __init__(self, database: Database, allowed: str = "127.0.0.1", **options: Any) -> None:
        self.freed = asyncio.Event()
        self.deliverer = Deliverer(database, parse_networks(allowed), self.freed.set, **options)

    async def start(self) -> int:
        """Begin to send whatever there is room for; in how many steps that had something."""
        steps = 0
        while await self.deliverer.deliver_some():
            steps += 1
        return steps

    async def settle(self) -> None:
        """Send everything that is due, and wait for what comes of it."""
        await self.start()
        await self.deliverer.close(30)


@asynccontextmanager
async def delivering(database: Database) -> AsyncIterator[None]:
    """A deliverer that goes on for the length of a block, as in a worker."""
    running = Delivering(database)

    async def role() -> None:
        while True:
            running.freed.clear()
            if not await running.deliverer.deliver_some():
                try:
                    async with asyncio.timeout(0.05):
                        await running.freed.wait()
                except TimeoutError:
                    pass

    task = asyncio.create_task(role())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        await running.deliverer.close(5)


# What is decided, without a clock.


def test_the_schedule() -> None:
    """Eleven attempts, the last about a day after the first; jitter and the receiver change that within bounds."""
    assert len(DELAYS) == 10
    assert list(DELAYS) == sorted(DELAYS)
    assert 23 * 3600 < sum(DELAYS) < 25 * 3600
    assert [next_attempt(n, None, 0.5) for n in range(1, 11)] == list(DELAYS)
    assert next_attempt(11, None, 0.5) is None
    assert next_attempt(12, 5.0, 0.5) is None
    assert next_attempt(1, None, 0.0) == pytest.approx(4.5)
    assert next_attempt(1, None, 1.0) == pytest.approx(5.5)
    assert next_attempt(1, 60.0, 0.5) == 60
    assert next_attempt(1, 86_400.0, 0.5) == 3600
    assert next_attempt(9, 60.0, 0.5) == DELAYS[8]


@given(st.integers(1, 20), st.none() | st.floats(0, 1e6), st.floats(0, 1))
def test_the_schedule_is_bounded(attempts: int, wait: float | None, draw: float) -> None:
    delay = next_attempt(attempts, wait, draw)
    assert (delay is None) == (attempts >= 11)
    if delay is not None:
        assert 0.9 * DELAYS[attempts - 1] <= delay <= max(1.1 * DELAYS[attempts - 1], 3600)


@given(st.integers(200, 999))
def test_judging(code: int) -> None:
    """Only a 2xx accepts; only 410 ends it otherwise; every failure says why."""
    outcome = judge(Reply(code, None), 0)
    assert (outcome.error is None) == (200 <= code < 300)
    assert outcome.final == (code == 410)
    assert outcome.wait is None
    assert outcome.error is None or f"HTTP {code}" in outcome.error
    assert outcome.error is None or ("redirects are not followed" in outcome.error) == (300 <= code < 400)


def test_retry_after() -> None:
    now = 1_700_000_000.0
    assert judge(Reply(503, "120"), now).wait == 120
    assert judge(Reply(429, formatdate(now + 90, usegmt=True)), now).wait == 90
    for nonsense in ("", "soon", "-5", "nan", "\ufffd"):
        assert judge(Reply(503, nonsense), now).wait in (None, 0)
    assert judge(Reply(200, "120"), now) == Outcome(error=None)


# What is done.


async def test_delivered(rig: Rig) -> None:
    """Once, with headers that the official SDK accepts, and then no more."""
    with receiver() as found:
        (id,) = await told(rig, found.url, metadata=b"\x81\xa3job\xa1x")
        await Delivering(rig.database).settle()
        (row,) = await outbox(rig)
        assert (row.attempts, row.next_at, row.error) == (1, None, None)
        assert row.delivered_at is not None
        await make_due(rig)
        assert not await Delivering(rig.database).deliverer.deliver_some()
    (delivery,) = found.deliveries
    assert delivery.path == "/hooks/batch?token=a-token"
    assert delivery.headers["content-type"] == "application/json"
    assert delivery.headers["user-agent"] == f"batchery/{__version__}"
    assert delivery.headers["webhook-id"] == f"evt_{id}"
    assert delivery.headers["webhook-signature"].startswith("v1,")
    event = openai.OpenAI(api_key="any").webhooks.unwrap(delivery.body.decode(), delivery.headers, secret=SECRET)
    assert (event.type, event.id, event.data.id) == ("batch.completed", f"evt_{id}", f"batch_{row.batch_id}")  # type: ignore[union-attr]


async def test_failures_and_then_success(rig: Rig) -> None:
    """The same event again and again, signed anew, each failure with its reason and the schedule's next moment."""
    with receiver(first(1, status(500), first(2, status(503, Retry_After="100")))) as found:
        (id,) = await told(rig, found.url)
        for attempt, (error, low, high) in enumerate([("HTTP 500", 4.5, 5.5), ("HTTP 503", 99.9, 100)], 1):
            before = time.time()
            await Delivering(rig.database).settle()
            (row,) = await outbox(rig)
            assert (row.attempts, row.error, row.delivered_at) == (attempt, error, None)
            assert row.next_at is not None
            assert before + low <= row.next_at <= time.time() + high
            await make_due(rig)
        await Delivering(rig.database).settle()
        (row,) = await outbox(rig)
        assert (row.attempts, row.error, row.next_at) == (3, None, None)
    assert found.ids() == [f"evt_{id}"] * 3
    assert len({delivery.body for delivery in found.deliveries}) == 1
    for delivery in found.deliveries:
        openai.OpenAI(api_key="any").webhooks.unwrap(delivery.body.decode(), delivery.headers, secret=SECRET)


async def test_given_up(rig: Rig) -> None:
    """After the last attempt, with a line in the log."""
    with receiver(status(500)) as found, capture_logs() as logs:
        await told(rig, found.url)
        for _ in range(13):
            await Delivering(rig.database).settle()
            await make_due(rig)
        (row,) = await outbox(rig)
    assert (row.attempts, row.next_at, row.delivered_at, row.error) == (11, None, None, "HTTP 500")
    assert len(found.deliveries) == 11
    assert [line["log_level"] for line in logs if line["event"] == "webhook given up"] == ["warning"]


async def test_gone(rig: Rig) -> None:
    with receiver(status(410)) as found:
        await told(rig, found.url)
        await Delivering(rig.database).settle()
        await make_due(rig)
        await Delivering(rig.database).settle()
        (row,) = await outbox(rig)
    assert (row.attempts, row.next_at, row.delivered_at) == (1, None, None)
    assert row.error == "HTTP 410: the receiver wants no more"


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_redirected(rig: Rig, code: int) -> None:
    """Whoever it is redirected to hears nothing, also on a host that may be reached."""
    with receiver() as other, receiver(status(code, Location=other.url)) as found:
        await told(rig, found.url)
        await Delivering(rig.database, allowed="127.0.0.0/8").settle()
        (row,) = await outbox(rig)
        assert other.deliveries == []
    assert row.error == f"HTTP {code}: redirects are not followed; name the final URL"
    assert row.next_at is not None


async def test_hanging(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    with receiver(hang(lambda: found)) as found:
        await told(rig, found.url)
        await Delivering(rig.database).settle()
        (row,) = await outbox(rig)
    assert (row.error, row.attempts) == ("no answer within 0.3 s", 1)
    assert row.next_at is not None


async def test_a_lookup_that_hangs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.1)

    async def lookup(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        raise AssertionError

    await told(rig, "https://hooks.invalid/")
    await Delivering(rig.database, lookup=lookup).settle()
    (row,) = await outbox(rig)
    assert row.error == "no answer within 0.1 s"


async def test_an_endless_body(rig: Rig) -> None:
    def endless(handler: Any, _: int) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" * 65536)

    with receiver(endless) as found:
        await told(rig, found.url)
        await Delivering(rig.database).settle()
        (row,) = await outbox(rig)
    assert row.delivered_at is not None


async def test_nobody_there(rig: Rig) -> None:
    with receiver() as found:
        url = found.url
    await told(rig, url)
    await told(rig, "https://nothing.invalid/")

    async def lookup(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    await Delivering(rig.database, lookup=lookup).settle()
    errors = sorted(row.error or "" for row in await outbox(rig))
    assert errors[0] == f"no connection to 127.0.0.1, port {found.port}: connection refused"
    assert errors[1] == "nothing.invalid has no address: name or service not known"


# What it is kept from.


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "[::1]", "169.254.169.254", "0"]
)
async def test_not_allowed(rig: Rig, host: str) -> None:
    """A row in the outbox, however it came there, is checked again at each attempt."""
    with receiver() as found:
        await told(rig, found.url.replace("127.0.0.1", host))
        await Delivering(rig.database, allowed="").settle()
        (row,) = await outbox(rig)
    assert found.deliveries == []
    assert row.error is not None
    assert row.error.startswith("not sent: ")
    assert row.next_at is not None


class Names:
    """A name server that gives each answer once, and then the last one for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = itertools.chain(answers, itertools.repeat(answers[-1]))
        self.asked = 0

    async def lookup(self, host: str, port: int) -> Sequence[str]:
        assert host == "hooks.invalid"
        self.asked += 1
        return next(self._answers)


@pytest.mark.parametrize("answer", [["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.1"], ["127.0.0.2"]])
async def test_a_name_with_one_bad_address(rig: Rig, answer: list[str]) -> None:
    with receiver() as found:
        await told(rig, f"http://hooks.invalid:{found.port}/")
        await Delivering(rig.database, lookup=Names(answer).lookup).settle()
        (row,) = await outbox(rig)
    assert found.deliveries == []
    assert row.error == "not sent: hooks.invalid has the address 127.0.0.2, which is loopback"


async def test_a_name_that_changes(rig: Rig) -> None:
    """It is asked for once in an attempt, and what it said then is where the event goes: a name server that says
    something good to the check and something bad to whoever connects gets nothing. The name exists nowhere else, so
    nothing but the answer can lead to the receiver."""
    with receiver() as good, receiver(host="127.0.0.2", port=good.port) as bad:
        names = Names(["127.0.0.1"], ["127.0.0.2"])
        await told(rig, f"http://hooks.invalid:{good.port}/x")
        deliverer = Delivering(rig.database, lookup=names.lookup)
        await deliverer.settle()
        assert names.asked == 1
        (row,) = await outbox(rig)
        assert row.delivered_at is not None
        assert good.deliveries[0].headers["host"] == f"hooks.invalid:{good.port}"
        await told(rig, f"http://hooks.invalid:{good.port}/x")
        await deliverer.settle()
        assert names.asked == 2
    assert len(good.deliveries) == 1
    assert bad.deliveries == []


async def test_nothing_secret_is_logged_or_kept(rig: Rig) -> None:
    """Neither the secret nor what of the URL may hold one; where it failed is said."""
    with receiver(first(1, status(500), first(2, status(302, Location="/?token=a-token")))) as found:
        with capture_logs() as logs:
            await told(rig, found.url)
            for _ in range(3):
                await Delivering(rig.database).settle()
                errors = [row.error for row in await outbox(rig)]
                await make_due(rig)
                assert "token" not in str(errors)
        await told(rig, f"http://hooks.invalid/token?{SECRET}")
        with capture_logs() as more:
            await Delivering(rig.database, lookup=Names(["127.0.0.2"]).lookup).settle()
    assert [line["event"] for line in logs] == ["webhook not delivered yet"] * 2 + ["webhook delivered"]
    assert {line["to"] for line in logs} == {f"http://127.0.0.1:{found.port}"}
    for text in ("token", SECRET, "hooks/"):
        assert text not in str(logs + more)


# Several at once.


async def test_a_slow_receiver_holds_up_no_other(rig: Rig) -> None:
    """However much waits for it."""
    with receiver(hang(lambda: slow)) as slow, receiver() as quick:
        await told(rig, slow.url.replace("127.0.0.1", "slow.invalid"), count=module.AT_ONCE + 10)
        late = await told(rig, quick.url)

        async def lookup(host: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        deliverer = Delivering(rig.database, lookup=lookup)
        await deliverer.start()
        rows = await until(rig, lambda rows: any(row.delivered_at is not None for row in rows))
        assert [row.id for row in rows if row.delivered_at is not None] == late
        await deliverer.start()
        assert sum(row.attempts for row in rows) == module.AT_ONCE_PER_HOST + 1
        assert len(slow.deliveries) <= module.AT_ONCE_PER_HOST
        slow.released.set()
        await deliverer.deliverer.close(20)


async def test_an_owner_whose_receivers_hang_holds_up_no_other(rig: Rig) -> None:
    """However many hosts they have: a name server may make up any."""
    with receiver(hang(lambda: slow)) as slow, receiver() as quick:
        for number in range(module.AT_ONCE + 1):
            await told(rig, slow.url.replace("127.0.0.1", f"slow-{number}.invalid"), owner="ann")
        late = await told(rig, quick.url, owner="ben")

        async def lookup(host: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        deliverer = Delivering(rig.database, lookup=lookup)
        await deliverer.start()
        rows = await until(rig, lambda rows: any(row.delivered_at is not None for row in rows))
        assert [row.id for row in rows if row.delivered_at is not None] == late
        await deliverer.start()
        assert sum(row.attempts for row in await outbox(rig)) == module.AT_ONCE_PER_OWNER + 1
        slow.released.set()
        await deliverer.deliverer.close(20)


async def test_no_more_at_once_than_there_is_room_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 3)
    with receiver(hang(lambda: found)) as found:
        await told(rig, found.url, count=5)
        deliverer = Delivering(rig.database)
        await deliverer.start()
        assert not await deliverer.deliverer.deliver_some()
        assert sum(row.attempts for row in await outbox(rig)) == 3
        found.released.set()
        async with asyncio.timeout(10):
            while sum(row.attempts for row in await outbox(rig)) < 5:
                await deliverer.freed.wait()  # room comes one by one
                deliverer.freed.clear()
                await deliverer.start()
        await deliverer.settle()
        assert sum(row.attempts for row in await outbox(rig)) == 5


async def test_two_workers_deliver_each_event_once(rig: Rig, database_url: str) -> None:
    other = Database(database_url)
    try:
        with receiver() as found:
            ids = await told(rig, found.url, count=40)
            async with delivering(rig.database), delivering(other):
                await until(rig, all_delivered)
            assert sorted(found.ids()) == sorted(f"evt_{id}" for id in ids)
    finally:
        await other.close()


async def test_a_dead_worker_s_event(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is sent by another once the claim has lapsed, and not before."""
    monkeypatch.setattr(module, "CLAIM", 1.0)
    with receiver() as found:
        (id,) = await told(rig, found.url)
        async with rig.database.write() as connection:
            now = time.time()
            await webhooks.claim(connection, now, now + 1.0, limit=1, per_host=1, per_owner=1, busy=())
        async with delivering(rig.database):
            (row,) = await until(rig, all_delivered)
        assert time.time() >= now + 1.0
        assert row.attempts == 2
    assert found.ids() == [f"evt_{id}"]


async def test_stopped(rig: Rig) -> None:
    """What hangs is broken off and due again at once, for whoever comes next."""
    with receiver(hang(lambda: found)) as found:
        await told(rig, found.url)
        deliverer = Delivering(rig.database)
        await deliverer.start()
        await received(found)
        await deliverer.deliverer.close(0.05)
        (row,) = await outbox(rig)
        assert row.error == "broken off: the worker was stopped"
        assert row.next_at is not None
        assert row.next_at <= time.time()
        found.released.set()
    with receiver() as next_one:
        async with rig.database.write() as connection:
            await connection.execute(sa.update(table).values(url=next_one.url))
        await Delivering(rig.database).settle()
    assert next_one.ids() == found.ids()


async def test_a_defect_is_one_event_s_own(rig: Rig) -> None:
    """An event that cannot be sent, by no fault of its receiver, is tried as any other and stops nothing."""
    with receiver() as found, capture_logs() as logs:
        await told(rig, found.url, webhook_secret="whsec_*")
        good = await told(rig, found.url)
        await Delivering(rig.database).settle()
        rows = {row.id: row for row in await outbox(rig)}
        assert rows.pop(good[0]).delivered_at is not None
        (bad,) = rows.values()
    assert (bad.error, bad.attempts) == ("a defect of this server, which its log shows", 1)
    assert bad.next_at is not None
    assert [line["log_level"] for line in logs if line["event"] == "a webhook could not be sent"] == ["error"]


async def test_what_came_of_it_is_lost(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database fails after the delivery: the event comes again, with the same id."""

    async def failing(*_: Any) -> None:
        raise StoreUnavailable("gone")

    with receiver() as found:
        await told(rig, found.url)
        with monkeypatch.context() as patched:
            patched.setattr(webhooks, "delivered", failing)
            await Delivering(rig.database).settle()
        (row,) = await outbox(rig)
        assert (row.delivered_at, row.attempts) == (None, 1)
        await make_due(rig)
        await Delivering(rig.database).settle()
        assert all_delivered(await outbox(rig))
    assert len(found.deliveries) == 2
    assert len(set(found.ids())) == 1


# In a worker.


async def give_webhook(rig: Rig, batch: str, found: Receiver) -> None:
    async with rig.database.write() as connection:
        await batches.change_many(connection, [{"id": batch, "webhook_url": found.url, "webhook_secret": SECRET}])


async def test_a_worker_tells(rig: Rig) -> None:
    """Each end, once, and with the batch's final counts and files."""
    with receiver() as found:
        good = await rig.create(await rig.upload([chat_line("a", "hello"), chat_line("b", "[[simulate status=400]]")]))
        bad = await rig.create(await rig.upload([chat_line("a", "[[simulate status=400]]")]))
        late = await rig.create(await rig.upload([chat_line("a", "hello")]), window=-1)
        untold = await rig.create(await rig.upload([chat_line("a", "hello")]))
        for batch in (good, bad, late):
            await give_webhook(rig, batch, found)
        async with (
            running_simulator(Behaviour()) as simulator,
            rig.working(HttpUpstream(simulator.url), webhook_networks=LOCAL),
        ):
            rows = {id: await rig.ended(id) for id in (good, bad, late, untold)}
            await until(rig, lambda outbox: len(outbox) == 3 and all_delivered(outbox))
    events = [
        openai.OpenAI(api_key="any").webhooks.unwrap(d.body.decode(), d.headers, secret=SECRET).to_dict()
        for d in found.deliveries
    ]
    assert sorted(event["data"]["id"] for event in events) == sorted(f"batch_{id}" for id in (good, bad, late))  # type: ignore[index]
    for event in events:
        data: Any = event["data"]
        row = rows[data["id"].removeprefix("batch_")]
        assert event["type"] == f"batch.{row.status}"
        assert data["status"] == row.status
        assert data["request_counts"] == {"total": row.total, "completed": row.completed, "failed": row.failed}
        assert data["output_file_id"] == f"file-{row.output_file}"
        assert data["error_file_id"] == (row.error_file and f"file-{row.error_file}")
    assert sorted(str(event["type"]) for event in events) == ["batch.completed", "batch.expired", "batch.failed"]


async def test_accepting(rig: Rig) -> None:
    """Any 2xx will do."""
    with receiver(first(1, accept, first(2, status(202), status(299)))) as found:
        await told(rig, found.url, count=3)
        await Delivering(rig.database).settle()
        assert all_delivered(await outbox(rig))
