"""Engines' own metrics, as each engine writes them."""

from __future__ import annotations

import asyncio

import pytest

from batchery.upstreams.base import Load
from batchery.upstreams.engine_metrics import read_load
from batchery.upstreams.http import HttpUpstream, InvalidUpstreamError
from batchery.upstreams.simulator import running_simulator

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 12.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="1",model_name="m"} 4.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
"""
SGLANG = """\
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{model_name="m"} 2.0
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m"} 40.0
# TYPE sglang:token_usage gauge
sglang:token_usage{model_name="m"} 0.5
"""
LLAMA = """\
# HELP llamacpp:requests_deferred Number of requests deferred.
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 9
# HELP llamacpp:requests_processing Number of requests processing.
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 4
"""


@pytest.mark.parametrize(
    ("text", "load"),
    [
        (VLLM, Load(7, 12, 0.75)),
        (VLLM.replace("kv_cache", "gpu_cache"), Load(7, 12, 0.75)),
        (SGLANG, Load(2, 40, 0.5)),
        (LLAMA, Load(9, 4, None)),
        (LLAMA.replace("requests_processing", "requests_else"), Load(9, None, None)),
        (VLLM.replace("3.0", "NaN"), Load(4, 12, 0.75)),
        ("# TYPE http_requests_total counter\nhttp_requests_total 3\n", None),
        ("", None),
        ("<html>vllm:num_requests_waiting</html>", None),
        ("vllm:num_requests_waiting{ 3\n", None),
        ("vllm:num_requests_waiting many\n", None),
    ],
)
def test_what_engines_say(text: str, load: Load | None) -> None:
    assert read_load(text) == load


async def test_a_server_is_asked_and_one_without_metrics_says_nothing() -> None:
    async with running_simulator() as simulator:
        asked = {
            "auto": HttpUpstream(simulator.url + "/v1"),
            "url": HttpUpstream("http://127.0.0.1:1", metrics=simulator.url + "/metrics"),
            "off": HttpUpstream(simulator.url, metrics="off"),
            "nowhere": HttpUpstream(simulator.url + "/nowhere"),
            "no metrics": HttpUpstream(simulator.url, metrics=simulator.url + "/healthz"),
        }
        try:
            found = {name: await upstream.load() for name, upstream in asked.items()}
        finally:
            for upstream in asked.values():
                await upstream.close()
        away = HttpUpstream(simulator.url)
    idle = Load(0, 0, 0.0)
    assert found == {"auto": idle, "url": idle, "off": None, "nowhere": None, "no metrics": None}
    assert await away.load() is None
    await away.close()


async def test_the_key_goes_to_the_upstream_and_nowhere_else() -> None:
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        own = HttpUpstream(f"http://127.0.0.1:{port}/v1", key="sk-secret")
        other = HttpUpstream("http://127.0.0.1:1/v1", key="sk-secret", metrics=f"http://127.0.0.1:{port}/metrics")
        for upstream in (own, other):
            assert await upstream.load() is None
            await upstream.close()
    assert [b"sk-secret" in head for head in heads] == [True, False]
    assert all(head.startswith(b"GET /metrics ") for head in heads)


@pytest.mark.parametrize("text", ["", "on", "/metrics", "ftp://host/metrics", "http://", "http://u:sk-1@host/metrics"])
def test_where_the_metrics_are_must_be_said_well(text: str) -> None:
    with pytest.raises(InvalidUpstreamError, match="auto, off, or a URL") as caught:
        HttpUpstream("http://127.0.0.1:1", metrics=text)
    assert "sk-1" not in str(caught.value)
