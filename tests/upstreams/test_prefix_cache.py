"""The simulator's prefix cache: whole blocks, known by all that is before them, the least recently used making room."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any

from batchery.upstreams.simulator import Behaviour, running_simulator
from batchery.upstreams.simulator.prefix_cache import BLOCK_BYTES, BLOCK_TOKENS, PrefixCache


def prompt(*blocks: str, end: str = "?") -> bytes:
    return b"".join(block.encode() * BLOCK_BYTES for block in blocks) + end.encode()


def test_what_is_the_same_from_the_beginning_is_cached() -> None:
    cache = PrefixCache(100)
    assert cache.use("m", prompt("a", "b", "c")) == 0
    assert cache.use("m", prompt("a", "b", "d")) == 2 * BLOCK_TOKENS
    assert cache.use("m", prompt("a", "b", "c", "d")) == 3 * BLOCK_TOKENS
    assert cache.use("m", prompt("x", "b", "c")) == 0
    assert cache.use("other", prompt("a", "b", "c")) == 0


def test_the_last_token_is_always_computed() -> None:
    cache = PrefixCache(100)
    cache.use("m", prompt("a", "b", end=""))
    assert cache.use("m", prompt("a", "b", end="")) == BLOCK_TOKENS


def test_the_least_recently_used_blocks_make_room_ends_before_beginnings() -> None:
    cache = PrefixCache(4)
    cache.use("m", prompt("a", "b"))
    cache.use("m", prompt("c", "d"))
    cache.use("m", prompt("a", "x"))  # makes room by b, the end of what was used longest ago
    assert cache.use("m", prompt("a", "b")) == BLOCK_TOKENS


def test_no_cache_finds_nothing() -> None:
    cache = PrefixCache(0)
    cache.use("m", prompt("a", "b"))
    assert cache.use("m", prompt("a", "b")) == 0


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


async def test_usage_and_the_counts_report_it() -> None:

    async with running_simulator(Behaviour(prefix_cache=100)) as simulator:
        text = "word " * 100
        chat = {"model": "m", "messages": [{"role": "user", "content": text}]}
        answers = [await asyncio.to_thread(post, simulator.url, "/v1/chat/completions", chat) for _ in range(2)]
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
        assert cached == [0, 8 * BLOCK_TOKENS]
        response = {"model": "m", "input": text}
        answers = [await asyncio.to_thread(post, simulator.url, "/v1/responses", response) for _ in range(2)]
        usages = [answer["usage"] for answer in answers]
        assert [usage["input_tokens_details"]["cached_tokens"] for usage in usages] == [0, 7 * BLOCK_TOKENS]
        stats = simulator.stats()
        assert stats.cached_tokens == 15 * BLOCK_TOKENS
        assert stats.prompt_tokens > stats.cached_tokens
        simulator.reset()
        assert simulator.stats().cached_tokens == 0
