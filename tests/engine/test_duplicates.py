"""Duplicates: which requests are one question, and that each gets its line whatever happens, while one is sent."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.engine import copies, duplicates, reader
from batchery.engine.duplicates import Finder, is_deterministic, regroup, split
from batchery.store.errors import StoreUnavailable
from batchery.upstreams.simulator import Behaviour
from batchery.wire.results import Failure, failure_line, reissued, success_line
from tests.requests import chat_line
from tests.whole import Whole, whole

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("url", "body", "wanted"),
    [
        (CHAT, {"temperature": 0}, True),
        (CHAT, {"temperature": 0.0, "n": 1}, True),
        (CHAT, {"seed": 7, "temperature": 1.2}, True),
        (CHAT, {"temperature": 0, "n": None, "seed": None}, True),
        (CHAT, {}, False),
        (CHAT, {"temperature": 0.1}, False),
        (CHAT, {"temperature": False}, False),
        (CHAT, {"temperature": None}, False),
        (CHAT, {"seed": None}, False),
        (CHAT, {"seed": True}, False),
        (CHAT, {"seed": 1, "n": 2}, False),
        (CHAT, {"temperature": 0, "n": True}, False),
        (CHAT, {"messages": [{"temperature": 0}]}, False),
        ("/v1/embeddings", {"input": "x"}, True),
        ("/v1/messages", {"temperature": 0}, True),
        ("/v1/responses", {"input": "x"}, False),
    ],
)
def test_what_is_left_to_chance(url: str, body: dict[str, Any], wanted: bool) -> None:
    assert is_deterministic(url, json.dumps(body).encode()) is wanted


def test_a_number_that_no_float_can_hold_is_left_to_chance() -> None:
    assert not is_deterministic(CHAT, b'{"temperature":1e999,"seed":1}')


def line(custom_id: str, body: bytes, url: str = CHAT) -> bytes:
    return b'{"custom_id":"%b","method":"POST","url":"%b","body":%b}' % (custom_id.encode(), url.encode(), body)


def test_bytes_and_url_decide() -> None:
    body = b'{"model":"m","temperature":0}'
    lines = [
        line("a", body),
        line("b", b'{"temperature":0,"model":"m"}'),
        line("c", body),
        line("d", b'{"model":"m","temperature":1}'),
        line("e", b'{"model":"m","temperature":1}'),
        line("f", body, "/v1/completions"),
        b'{"body":%b,"url":"%b","custom_id":"g","method":"POST"}' % (body, CHAT.encode()),
    ]
    finder = Finder()
    finder.add(range(3), lines[:3])
    finder.add(range(3, 7), lines[3:])
    assert finder.copies() == {0: [2, 6]}


def test_equal_halves_of_hashes_are_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half:
        def __init__(self, data: bytes, digest_size: int) -> None:
            self._data = data

        def digest(self) -> bytes:
            return bytes(8) + self._data[-9:-1]

    monkeypatch.setattr(duplicates, "blake2b", Half)
    finder = Finder()
    finder.add(range(4), [line(str(i), b'{"seed":%d}' % (1_000_000 + i % 2)) for i in range(4)])
    assert finder.copies() == {0: [2], 1: [3]}


@given(st.lists(st.integers(0, 8), max_size=60), st.randoms(), st.integers(1, 20))
def test_a_regrouped_plan_has_every_request_once_and_duplicates_in_one_shard(
    kinds: list[int], random: Any, size: int
) -> None:
    order = list(range(len(kinds)))
    random.shuffle(order)
    plan = [("m", array("I", order[start : start + size]).tobytes()) for start in range(0, len(order), size)]
    finder = Finder()
    finder.add(range(len(kinds)), [line(str(i), b'{"seed":%d}' % kind) for i, kind in enumerate(kinds)])
    grouped, twins = regroup(plan, finder.copies())
    found = [list(array("I", packed)) for _, packed in grouped]
    assert sorted(request for some in found for request in some) == list(range(len(kinds)))
    sent = 0
    for requests, same in zip(found, twins, strict=True):
        left = list(enumerate(requests))
        if same is None:
            assert len({kinds[request] for request in requests}) == len(requests)
            sent += len(requests)
            continue
        # Some of it may be recorded already.
        sending, following = split(left, same)
        sent += len(sending)
        kept = [item for item in left if random.random() < 0.5]
        again, rest = split(kept, same)
        assert sorted([*again, *(copy for some in rest.values() for copy in some)]) == kept
        assert {kinds[request] for _, request in again} == {kinds[request] for _, request in kept}
        for place, some in following.items():
            assert {kinds[request] for _, request in some} == {kinds[requests[place]]}
    assert sent == len(set(kinds))


@given(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), st.text(st.characters(codec="utf-8"), min_size=1)
)
def test_a_line_reissued_is_the_line_that_the_other_would_have_had(one: str, other: str) -> None:
    good = [success_line(id, custom_id, 200, "r", b'{"a":1}') for id, custom_id in (("1", one), ("22", other))]
    bad = [failure_line(id, custom_id, Failure("c", "m")) for id, custom_id in (("1", one), ("22", other))]
    for first, second in (good, bad):
        assert reissued(first, ("1", one), ("22", other)) == second


def repeated(total: int, kinds: int, **body: Any) -> bytes:
    """Requests of so many kinds, in turn."""
    return b"".join(chat_line(f"request-{i:05}", f"prompt {i % kinds}", **body) for i in range(total))


async def answers_of(server: Whole, batch: dict[str, Any]) -> dict[str, str]:
    lines = [*await server.content(batch["output_file_id"])]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in lines}


async def test_each_is_sent_once_and_answered_for_all(database_url: str, tmp_path: Path) -> None:
    async with whole(database_url, tmp_path, Behaviour(latency=0.01)) as server, server.working():
        data = repeated(1_000, 7, temperature=0) + b"".join(chat_line(f"other-{i}", "prompt 0") for i in range(3))
        plain = await server.until((await server.batch(data))["id"])
        sent = server.simulator.stats().received
        assert sent == 1_003
        assert plain["deduplicated"] is None
        batch = await server.until((await server.batch(data, deduplicate=True))["id"])
        assert batch["status"] == "completed"
        assert server.simulator.stats().received - sent == 7 + 3  # the last three leave it to chance
        assert batch["request_counts"] == {"total": 1_003, "completed": 1_003, "failed": 0}
        assert await answers_of(server, batch) == await answers_of(server, plain)
        saved = batch["deduplicated"]
        assert saved["requests"] == 993
        assert saved["total_tokens"] == saved["input_tokens"] + saved["output_tokens"] > 0
        for name in ("input_tokens", "output_tokens", "total_tokens"):
            assert batch["usage"][name] + saved[name] == plain["usage"][name]
        attempts = Counter(line["attempts"] for line in await server.results(batch["id"]))
        assert attempts == {0: 993, 1: 10}


async def test_without_the_option_every_request_is_sent(tmp_path: Path) -> None:
    async with whole(f"sqlite+aiosqlite:///{tmp_path}/db", tmp_path) as server, server.working():
        for more in ({}, {"deduplicate": False}, {"deduplicate": None}):
            before = server.simulator.stats().received
            batch = await server.until((await server.batch(repeated(20, 2, temperature=0), **more))["id"])
            assert server.simulator.stats().received - before == 20
            assert batch["deduplicated"] is None


async def test_a_failure_and_a_retry_are_those_of_all(tmp_path: Path) -> None:
    behaviour = Behaviour(error_rates={400: 0.5}, seed=3)
    async with whole(f"sqlite+aiosqlite:///{tmp_path}/db", tmp_path, behaviour) as server, server.working():
        batch = await server.until((await server.batch(repeated(600, 12, seed=1), deduplicate=True))["id"])
        failed = {line["custom_id"]: line for line in await server.content(batch["error_file_id"])}
        assert server.simulator.stats().received == 12
        assert 0 < len(failed) < 600
        assert len(failed) % 50 == 0
        kinds = {int(custom_id.removeprefix("request-")) % 12 for custom_id in failed}
        assert len(failed) == 50 * len(kinds)
        assert {line["error"]["code"] for line in failed.values()} == {next(iter(failed.values()))["error"]["code"]}
        assert batch["deduplicated"]["requests"] == (600 - len(failed)) * 49 // 50
        answer = await server.retry(batch["id"])
        assert answer.status == 200, answer
        batch = await server.until(batch["id"])
        assert server.simulator.stats().received == 12 + len(kinds)
        counts = batch["request_counts"]
        assert counts["completed"] + counts["failed"] == 600
        assert batch["deduplicated"]["requests"] == counts["completed"] * 49 // 50


async def test_temporary_failures_are_tried_again_for_all(tmp_path: Path) -> None:
    behaviour = Behaviour(fail_attempts=1)
    async with whole(f"sqlite+aiosqlite:///{tmp_path}/db", tmp_path, behaviour) as server, server.working():
        batch = await server.until((await server.batch(repeated(90, 3, seed=1), deduplicate=True))["id"])
        assert batch["request_counts"] == {"total": 90, "completed": 90, "failed": 0}
        assert server.simulator.stats().received == 6


@pytest.mark.parametrize("window", ["24h", "1s"])
async def test_copies_of_what_never_ran_are_cancelled_or_expire_with_it(tmp_path: Path, window: str) -> None:
    changes = {"windows": ("24h", "1s")}
    behaviour = Behaviour(stall_rate=1)
    url = f"sqlite+aiosqlite:///{tmp_path}/db"
    async with whole(url, tmp_path, behaviour, **changes) as server, server.working(cancel_grace=0.1):
        batch = await server.batch(repeated(100, 4, seed=1), deduplicate=True, completion_window=window)
        await server.until(batch["id"], "in_progress")
        if window == "24h":
            await server.rig.ask("POST", f"/v1/batches/{batch['id']}/cancel")
        batch = await server.until(batch["id"])
        lines = await server.content(batch["error_file_id"])
        assert batch["status"] == ("cancelled" if window == "24h" else "expired")
        assert Counter(line["error"]["code"] for line in lines) == {f"batch_{batch['status']}": 100}
        assert len({line["custom_id"] for line in lines}) == 100


async def test_a_file_that_cannot_be_read_for_a_moment_delays_copies_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0
    read = reader.Reader.custom_ids

    async def failing(self: reader.Reader, batch: str, requests: list[int]) -> list[str]:
        nonlocal failures
        failures += 1
        if failures <= 3:
            raise StoreUnavailable("the store is away")
        return await read(self, batch, requests)

    monkeypatch.setattr(copies, "PAUSE", 0.01)
    monkeypatch.setattr(reader.Reader, "custom_ids", failing)
    async with whole(f"sqlite+aiosqlite:///{tmp_path}/db", tmp_path) as server, server.working():
        batch = await server.until((await server.batch(repeated(700, 2, seed=1), deduplicate=True))["id"])
        assert failures > 3
        assert batch["request_counts"] == {"total": 700, "completed": 700, "failed": 0}
        assert server.simulator.stats().received == 2


@pytest.mark.parametrize("value", [1, "true", []])
async def test_anything_but_true_or_false_is_refused(tmp_path: Path, value: Any) -> None:
    async with whole(f"sqlite+aiosqlite:///{tmp_path}/db", tmp_path) as server:
        file = await server.rig.upload(repeated(2, 1))
        answer = await server.rig.create(file["id"], deduplicate=value)
        assert answer.status == 400
        assert answer.error()["param"] == "deduplicate"
