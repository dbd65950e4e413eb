"""A real llama.cpp server behind a worker: whole answers, and what its own prefix cache found, by its own counters."""

from __future__ import annotations

import asyncio
import json
import random
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from batchery.engine import worker as worker_module
from batchery.engine.pool import Destination
from batchery.upstreams.http import HttpUpstream
from tests.engine.llama import llama_server
from tests.engine.rig import Rig
from tests.requests import chat_line

PREFIXES, REQUESTS = 50, 450

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def shuffled() -> list[bytes]:
    draw = random.Random(11)
    prefixes = ["".join(draw.choices("abcdefgh ", k=600)) for _ in range(PREFIXES)]
    lines = [
        chat_line(str(i), f"{prefixes[i % PREFIXES]} Question {i}: {draw.random()}?", max_tokens=2, temperature=0)
        for i in range(REQUESTS)
    ]
    draw.shuffle(lines)
    return lines


def cached(lines: list[bytes], url: str, in_flight: int) -> int:
    """The tokens that the server finds in its cache when the requests come in this order, so many at once."""

    def send(line: bytes) -> int:
        body = json.dumps(json.loads(line)["body"]).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", body, headers)) as answer:
            return of_usage(json.load(answer))

    with ThreadPoolExecutor(in_flight) as pool:
        return sum(pool.map(send, lines))


def of_usage(answer: Any) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


@pytest.mark.parametrize("slots", [1, 4])
async def test_shuffled_requests_find_the_cache_as_if_sorted(rig: Rig, tmp_path: Path, slots: int) -> None:
    lines = shuffled()
    order = sorted(lines, key=lambda line: json.loads(line)["body"]["messages"][0]["content"])
    with llama_server(tmp_path, slots=slots) as url:
        best, worst = cached(order, url, slots), cached(lines, url, slots)
    with llama_server(tmp_path, slots=slots) as url:
        async with rig.working(HttpUpstream(url), max_in_flight=slots):
            row = await rig.ended(await rig.create(await rig.upload(lines)))
        assert (row.status, row.completed) == ("completed", REQUESTS)
        answers = [line["response"]["body"] for line in await rig.lines(row.output_file)]
    found = sum(map(of_usage, answers))
    assert worst < 0.5 * best  # so that the order is what matters
    # Of several slots the server chooses by itself, and runs of the same order differ by a tenth.
    assert found >= (0.95 if slots == 1 else 0.85) * best, f"{found} of {best} tokens; {worst} in the order of the file"
    assert all(answer["usage"]["completion_tokens"] == 2 for answer in answers)


SLOTS, IN_FLIGHT, OTHERS = 4, 32, 5


async def wait_of_others(rig: Rig, url: str, share: float) -> float:
    """How long others wait for an answer there on average, while a batch has more in flight than there are slots."""
    body = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    lines = [chat_line(str(i), f"{share} {i}", **body) for i in range(6_000)]
    async with rig.working(HttpUpstream(url), max_in_flight=IN_FLIGHT, yield_share=share, stop_grace=0.0) as worker:
        id = await rig.create(await rig.upload(lines))
        worker.wake()
        await rig.until(id, lambda row: row.completed > 2 * IN_FLIGHT)
        took = []
        for i in range(OTHERS):
            began = time.monotonic()
            await asyncio.to_thread(cached, [chat_line("other", f"somebody else {share} {i}", **body)], url, 1)
            took.append(time.monotonic() - began)
        (upstream,) = worker._pool.snapshots()
        if share:
            assert upstream.running is not None  # the server tells, and is asked
            assert upstream.allowed < IN_FLIGHT
        assert (await rig.batch(id)).status == "in_progress"
    return sum(took) / OTHERS


async def test_batch_work_makes_room_for_others(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what llama.cpp's own metrics say of its queue."""
    monkeypatch.setattr(worker_module, "LOOK", 0.05)
    with llama_server(tmp_path, slots=SLOTS) as url:
        stubborn = await wait_of_others(rig, url, 0.0)
        yielding = await wait_of_others(rig, url, 1.0)
    assert yielding < 0.6 * stubborn, (yielding, stubborn)


REPLICAS, SHARED, EACH = 2, 24, 8


async def computed(rig: Rig, urls: list[str], seed: int) -> int:
    """How often a beginning was not in the cache of the replica that had the request, by the servers' own counters."""
    draw = random.Random(seed)
    prefixes = ["".join(draw.choices("abcdefgh ", k=600)) for _ in range(SHARED)]
    lines = [
        chat_line(str(i), f"{prefixes[i % SHARED]} Question {i}?", max_tokens=1, temperature=0)
        for i in range(SHARED * EACH)
    ]
    draw.shuffle(lines)
    # The names, not the ports, decide which replica has a beginning, so it is the same one in every run.
    replicas = [
        Destination(upstream=HttpUpstream(url), name=f"replica {place}", max_in_flight=16)
        for place, url in enumerate(urls)
    ]
    async with rig.working(replicas):
        row = await rig.ended(await rig.create(await rig.upload(lines)), 60)
    assert (row.status, row.completed) == ("completed", len(lines))
    answers = [line["response"]["body"] for line in await rig.lines(row.output_file)]
    return sum(of_usage(answer) < 300 for answer in answers)


async def test_what_begins_alike_is_computed_by_one_replica(rig: Rig, tmp_path: Path) -> None:
    """About once for each beginning, and not once by each of them; one slot answers in the order in which it is sent
    to, so requests of one beginning that follow one another compute it once."""
    with ExitStack() as stack:
        urls = []
        for place in range(REPLICAS):
            folder = tmp_path / str(place)
            folder.mkdir()
            urls.append(stack.enter_context(llama_server(folder)))
        # Where one replica stands still for a while, the other rightly takes its requests, and computes more.
        tries = []
        for seed in range(4):
            tries.append(await computed(rig, urls, seed))
            if tries[-1] < 0.9 * REPLICAS * SHARED:
                return
    raise AssertionError(f"computed {tries} times for {SHARED} beginnings")
