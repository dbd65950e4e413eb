"""While the upstream is full: a batch that is cancelled or expires sends nothing more within a second, and the others
go on; and the slots that the last long requests of a batch leave are used by others.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from batchery.store.database import sqlite_url
from batchery.upstreams.http import HttpUpstream
from batchery.upstreams.simulator import Behaviour
from tests.requests import chat_file, chat_line
from tests.server.rig import until
from tests.whole import Whole, whole

PROMPTLY = 2.0
"""Seconds after which nothing more may be sent: one, and one in which this machine may stand still."""

STANDSTILL = 5.0
"""Seconds that an end may be late on a busy machine."""

MARKS = ("first", "second", "third", "fourth")

Sent = dict[str, list[float]]
"""When each request was sent, by the mark of its batch."""


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What is sent from here on."""
    times: Sent = {mark: [] for mark in MARKS}
    send = HttpUpstream.send

    async def watched(self: HttpUpstream, url: str, body: Any) -> Any:
        text = bytes(body[:200])
        next(of_one for mark, of_one in times.items() if mark.encode() in text).append(time.time())
        return await send(self, url, body)

    monkeypatch.setattr(HttpUpstream, "send", watched)
    return times


def after(times: list[float], when: float) -> int:
    """How many were sent later."""
    return sum(one > when for one in times)


async def filled(server: Whole, sent: Sent, in_flight: int, **of_first: Any) -> dict[str, dict[str, Any]]:
    """Batches that keep the upstream full, the first of which gets its share of it; by mark."""
    made = {}
    for mark in MARKS:
        made[mark] = await server.batch(chat_file(20_000, mark=mark), **(of_first if mark == "first" else {}))
    await until(lambda: len(sent["first"]) > 100 and server.simulator.stats().in_flight >= 0.8 * in_flight, 30)
    return made


async def check_end(server: Whole, batch: dict[str, Any], status: str, sent: Sent) -> None:
    """An ended batch is as the contract says, and what is due after it has taken over its slots."""
    assert batch["status"] == status
    counts = batch["request_counts"]
    assert counts["failed"] == 0
    assert 0 < counts["completed"] < counts["total"] == 20_000
    never_ran = await server.content(batch["error_file_id"])
    assert {line["error"]["code"] for line in never_ran} == {f"batch_{status}"}
    assert len(never_ran) + len(await server.content(batch["output_file_id"])) == 20_000
    before = len(sent["second"])
    await until(lambda: len(sent["second"]) > before + 200, 20)


LOADS = [
    pytest.param(1.5, 400, id="hundreds of slow answers"),
    pytest.param(0.05, 128, id="as many a second as it can"),
]


@pytest.mark.parametrize(("latency", "in_flight"), LOADS)
async def test_a_cancelled_batch_sends_nothing_more(tmp_path: Path, sent: Sent, latency: float, in_flight: int) -> None:
    behaviour = Behaviour(latency=latency, concurrency=in_flight)
    async with (
        whole(sqlite_url(tmp_path / "db"), tmp_path, behaviour) as server,
        server.working(max_in_flight=in_flight, cancel_grace=2.0),
    ):
        batch = (await filled(server, sent, in_flight))["first"]
        answer = await server.rig.ask("POST", f"/v1/batches/{batch['id']}/cancel")
        cancelled = time.time()
        assert answer.json["status"] == "cancelling"
        ended = await server.until(batch["id"], timeout=10)
        assert time.time() - cancelled < 2.0 + STANDSTILL
        await check_end(server, ended, "cancelled", sent)
        await until(lambda: time.time() > cancelled + PROMPTLY + 0.5)
        assert after(sent["first"], cancelled + PROMPTLY) == 0
        assert after(sent["second"], cancelled) > 200


@pytest.mark.parametrize(("latency", "in_flight"), LOADS)
async def test_a_batch_whose_window_ends_sends_nothing_more(
    tmp_path: Path, sent: Sent, latency: float, in_flight: int
) -> None:
    behaviour = Behaviour(latency=latency, concurrency=in_flight)
    async with (
        whole(sqlite_url(tmp_path / "db"), tmp_path, behaviour, windows=("24h", "5s")) as server,
        server.working(max_in_flight=in_flight, cancel_grace=2.0),
    ):
        batch = (await filled(server, sent, in_flight, completion_window="5s"))["first"]
        end = batch["expires_at"]
        ended = await server.until(batch["id"], timeout=20)
        assert end <= ended["expired_at"] <= end + 2.0 + STANDSTILL
        await check_end(server, ended, "expired", sent)
        await until(lambda: time.time() > end + PROMPTLY + 0.5)
        assert after(sent["first"], end + PROMPTLY) == 0
        assert after(sent["second"], end) > 200


async def test_what_is_in_flight_longer_than_the_grace_is_broken_off(tmp_path: Path, sent: Sent) -> None:
    behaviour = Behaviour(latency=60, concurrency=300)
    async with (
        whole(sqlite_url(tmp_path / "db"), tmp_path, behaviour) as server,
        server.working(max_in_flight=300, cancel_grace=0.5, stop_grace=0.0),
    ):
        batch = (await filled(server, sent, 300))["first"]
        await server.rig.ask("POST", f"/v1/batches/{batch['id']}/cancel")
        cancelled = time.time()
        ended = await server.until(batch["id"], timeout=10)
        assert time.time() - cancelled < 0.5 + STANDSTILL
        assert ended["status"] == "cancelled"
        assert ended["request_counts"] == {"total": 20_000, "completed": 0, "failed": 0}
        await until(lambda: time.time() > cancelled + PROMPTLY + 0.5)
        assert after(sent["first"], cancelled + PROMPTLY) == 0
        # Its slots are free again, and the next batch has them.
        await until(lambda: len(sent["second"]) >= 300, 10)


@pytest.mark.parametrize("window", ["24h", "1h"])
async def test_the_last_long_requests_of_a_batch_leave_no_slot_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: str
) -> None:
    slots, long, each = 32, 24, 0.05
    finished: dict[str, list[float]] = {"first": [], "second": []}
    send = HttpUpstream.send

    async def watched(self: HttpUpstream, url: str, body: Any) -> Any:
        mark = "first" if b"first" in bytes(body[:200]) else "second"
        answer = await send(self, url, body)
        finished[mark].append(time.time())
        return answer

    monkeypatch.setattr(HttpUpstream, "send", watched)
    # The tokens of its answer make a request long: 4 s for each of the last ones of the first batch.
    head = b"".join(chat_line(f"short-{i}", f"first {i}", max_tokens=1) for i in range(200))
    tail = b"".join(chat_line(f"long-{i}", f"first and long {i}", max_tokens=80) for i in range(long))
    others = b"".join(chat_line(f"request-{i}", f"second {i}", max_tokens=1) for i in range(1_200))
    behaviour = Behaviour(token_latency=each, tokens=80, concurrency=slots)
    async with (
        whole(sqlite_url(tmp_path / "db"), tmp_path, behaviour) as server,
        server.working(max_in_flight=slots),
    ):
        first = await server.batch(head + tail, completion_window=window)
        second = await server.batch(others)
        await until(lambda: len(finished["first"]) == 200, 20)
        await until(lambda: server.simulator.stats().in_flight == slots, 5)
        alone = time.time()
        await until(lambda: len(finished["first"]) > 200, 20)
        over = time.time()
        assert over - alone > 2
        # While the long ones hold their slots, the others work for the second batch without a pause.
        done = [when for when in finished["second"] if alone <= when <= over]
        assert len(done) >= 0.6 * (slots - long) / each * (over - alone)
        assert max(later - when for when, later in pairwise(done)) < 0.5 * (over - alone)
        for batch in (first, second):
            assert (await server.until(batch["id"], timeout=40))["status"] == "completed"
