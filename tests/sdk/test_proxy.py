"""`batchery proxy` as a process between the official client and a real server."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.client.fake_server import FakeServer, Manners
from tests.processes import Process, wait_for
from tests.sdk.test_openai_client import batches, both, chat

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]})


def proxy(folder: Path, url: str, *options: str) -> Process:
    return Process(["proxy", "--port", "0", "--base-url", url, *options], folder / "proxy.log")


@pytest.fixture(scope="module")
def proxied(served: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = proxy(tmp_path_factory.mktemp("proxy"), served, "--gather-seconds", "0.1")
    yield process
    assert process.stop() == 0, process.log.read_text()


def ask(url: str, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content) if content else None


async def test_requests_are_gathered_and_answered(proxied: Process, served: str) -> None:
    before = {batch["id"] for batch in batches(served)}
    async with openai.AsyncOpenAI(base_url=f"{proxied.url}/v1", api_key="any") as client:
        answers = await asyncio.gather(*(chat(client, f"number {number}") for number in range(12)))
        assert len({answer.choices[0].message.content for answer in answers}) == 12
        (made,) = [batch for batch in batches(served) if batch["id"] not in before]
        assert made["request_counts"]["total"] == 12
        response, embedding, models = await asyncio.gather(
            client.responses.create(model="m", input="x"),
            client.embeddings.create(model="m", input="x"),
            client.models.list(),
        )
        assert response.output_text
        assert len(embedding.data[0].embedding) == 8
        assert models.data is not None


async def test_errors_have_the_real_status_and_are_not_tried_again(proxied: Process, served: str) -> None:
    before = len(batches(served))
    async with openai.AsyncOpenAI(base_url=f"{proxied.url}/v1", api_key="any") as client:
        good, bad, streamed = await both(
            chat(client, "fine"), chat(client, "[[simulate status=422]]"), chat(client, "x", stream=True)
        )
    assert good.choices
    assert type(bad) is openai.UnprocessableEntityError
    assert isinstance(bad.body, dict)
    assert bad.body["message"]
    assert type(streamed) is openai.BadRequestError
    assert "stream" in streamed.message
    assert len(batches(served)) == before + 1


def test_pages_in_a_browser_are_refused(proxied: Process) -> None:
    path, kind = "/v1/chat/completions", "application/json"
    assert ask(proxied.url, "POST", path, BODY, Content_Type="text/plain")[0] == 415
    assert ask(proxied.url, "POST", path, BODY, Content_Type=kind, Origin="http://evil.example")[0] == 403
    assert ask(proxied.url, "POST", path, BODY, Content_Type=kind, Host="evil.example")[0] == 403
    status, answer = ask(proxied.url, "POST", path, "{", Content_Type=kind)
    assert (status, answer["error"]["code"]) == (400, "invalid_json_line")


def test_what_it_does_not_take_is_named(proxied: Process) -> None:
    status, answer = ask(proxied.url, "GET", "/v1/files")
    assert status == 404
    assert "/v1/chat/completions" in answer["error"]["message"]
    assert ask(proxied.url, "GET", "/v1/chat/completions")[0] == 405


def test_a_client_that_goes_away_takes_its_batch_with_it(tmp_path: Path) -> None:
    with FakeServer(Manners()) as server:
        server.manners.finish.clear()
        process = proxy(tmp_path, server.base_url, "--gather-seconds", "0")
        try:
            connection = http.client.HTTPConnection(process.url.removeprefix("http://"), timeout=30)
            connection.request("POST", "/v1/chat/completions", BODY, {"Content-Type": "application/json"})
            wait_for(lambda: server.count("POST", "/v1/batches"))
            connection.close()
            wait_for(lambda: any(call.path.endswith("/cancel") for call in server.calls))
        finally:
            assert process.stop() == 0


def test_when_it_stops_whoever_waits_is_told(tmp_path: Path) -> None:
    with FakeServer(Manners()) as server:
        server.manners.finish.clear()
        process = proxy(tmp_path, server.base_url, "--gather-seconds", "0")
        connection = http.client.HTTPConnection(process.url.removeprefix("http://"), timeout=30)
        connection.request("POST", "/v1/chat/completions", BODY, {"Content-Type": "application/json"})
        wait_for(lambda: server.count("POST", "/v1/batches"))
        assert process.stop() == 0
        response = connection.getresponse()
        assert response.status == 503
        assert json.loads(response.read())["error"]["code"] == "closed"
        connection.close()
        assert any(call.path.endswith("/cancel") for call in server.calls)
