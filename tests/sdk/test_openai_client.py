"""The official client's interface, with batches behind it, on a real server."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

import batchery
from batchery.client import gatherer
from batchery.client.gatherer import Gatherer
from batchery.client.retry import Patience
from batchery.client.server import Server
from tests.client.fake_server import FakeServer, Manners


@pytest.fixture
async def client(served: str) -> AsyncIterator[batchery.AsyncOpenAI]:
    async with batchery.AsyncOpenAI(base_url=served, gather_seconds=0.1) as found:
        yield found


def batches(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{url}/v1/batches?limit=100") as response:
        return list(json.load(response)["data"])


def chat(client: openai.AsyncOpenAI, text: str, model: str = "m", **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


async def test_calls_are_gathered_into_one_batch(client: batchery.AsyncOpenAI, served: str) -> None:
    assert isinstance(client, openai.AsyncOpenAI)
    before = {batch["id"] for batch in batches(served)}
    answers = await asyncio.gather(*(chat(client, f"number {number}") for number in range(20)))
    assert len({answer.choices[0].message.content for answer in answers}) == 20
    assert all(answer.usage.total_tokens for answer in answers)
    (made,) = [batch for batch in batches(served) if batch["id"] not in before]
    assert made["request_counts"]["total"] == 20
    # The same prompt has the same answer, whoever else is in the batch: none was given another's.
    assert (await chat(client, "number 7")).choices[0].message.content == answers[7].choices[0].message.content


async def test_each_endpoint_and_model_has_its_own_batch(client: batchery.AsyncOpenAI, served: str) -> None:
    before = {batch["id"] for batch in batches(served)}
    answer, other, response, embedding = await asyncio.gather(
        chat(client, "x"),
        chat(client, "x", model="n"),
        client.responses.create(model="m", input="x"),
        client.embeddings.create(model="m", input=["x", "y"]),
    )
    assert answer.model == "m"
    assert other.model == "n"
    assert response.output_text
    assert [len(item.embedding) for item in embedding.data] == [8, 8]
    assert len([batch for batch in batches(served) if batch["id"] not in before]) == 4


async def test_enough_calls_do_not_wait(served: str) -> None:
    async with batchery.AsyncOpenAI(base_url=served, gather_seconds=3600, gather_requests=3) as client:
        answers = await asyncio.wait_for(asyncio.gather(*(chat(client, f"{n}") for n in range(6))), 30)
    assert len(answers) == 6


async def both(*calls: Any) -> list[Any]:
    """The answers to calls, or their exceptions."""
    return await asyncio.gather(*calls, return_exceptions=True)


async def until(look: Any) -> None:
    async with asyncio.timeout(30):
        while not look():  # noqa: ASYNC110 - it is another process that acts
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (404, openai.NotFoundError),
        (422, openai.UnprocessableEntityError),
    ],
)
async def test_errors_are_the_official_ones(
    client: batchery.AsyncOpenAI, status: int, kind: type[openai.APIStatusError]
) -> None:
    good, bad = await both(chat(client, "fine"), chat(client, f"[[simulate status={status}]]"))
    assert good.choices
    assert type(bad) is kind
    assert bad.status_code == status
    assert isinstance(bad.body, dict)
    assert bad.body["message"]
    assert bad.response.json()["error"] == bad.body


async def test_a_passing_fault_is_run_again_and_told_if_it_stays() -> None:
    for retries in (0, 1):
        with FakeServer(Manners(passing={"gathered-1"}, retries=True)) as server:
            async with batchery.AsyncOpenAI(base_url=server.base_url, gather_seconds=0, max_retries=retries) as client:
                if retries:
                    assert (await chat(client, "x")).echo == "gathered-1"
                    continue
                with pytest.raises(openai.InternalServerError) as caught:
                    await chat(client, "x")
                assert caught.value.status_code == 503


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ('"message": "no gathered-1"', r'"message": "cut \ud83d"', openai.BadRequestError),
        (
            '"error": null}',
            r'"error": {"code": "x", "message": "cut \ud83d"}, "response": null}',
            openai.APIConnectionError,
        ),
        ('"request_id": "gathered-1"', '"request_id": 7', openai.BadRequestError),
    ],
)
async def test_a_result_of_another_form_leaves_nobody_waiting(old: str, new: str, kind: type[Exception]) -> None:
    with FakeServer(Manners(failing={"gathered-1"}, altered={old: new})) as server:
        async with batchery.AsyncOpenAI(base_url=server.base_url, gather_seconds=0) as client:
            with pytest.raises(kind):
                await asyncio.wait_for(chat(client, "x"), 20)


async def test_what_no_batch_takes_is_refused_alone(client: batchery.AsyncOpenAI) -> None:
    good, bad = await both(chat(client, "fine"), chat(client, "x", model=""))
    assert good.choices
    assert type(bad) is openai.BadRequestError
    assert bad.param == "model"


async def test_stream_is_refused(client: batchery.AsyncOpenAI) -> None:
    with pytest.raises(openai.OpenAIError, match="stream=True"):
        await chat(client, "x", stream=True)


async def test_other_calls_go_straight_through(client: batchery.AsyncOpenAI, served: str) -> None:
    assert [batch.id async for batch in client.batches.list()]
    file = await client.files.create(file=("a.jsonl", b"{}\n"), purpose="batch")
    assert (await client.files.retrieve(file.id)).filename == "a.jsonl"
    with pytest.raises(openai.NotFoundError):
        await client.batches.retrieve("batch_" + "0" * 32)


async def test_raw_responses_and_options(client: batchery.AsyncOpenAI) -> None:
    raw = await client.with_options(max_retries=1).chat.completions.with_raw_response.create(
        model="m", messages=[{"role": "user", "content": "x"}]
    )
    assert raw.status_code == 200
    assert (await chat(client, "x")).choices[0].message.content == raw.parse().choices[0].message.content


async def test_a_timeout_is_heeded() -> None:
    with FakeServer(Manners()) as server:
        server.manners.finish.clear()
        async with batchery.AsyncOpenAI(base_url=server.base_url, gather_seconds=0) as client:
            with pytest.raises(openai.APITimeoutError):
                await chat(client, "x", timeout=0.5)


async def test_a_cancelled_call_leaves_its_batch(served: str) -> None:
    async with batchery.AsyncOpenAI(base_url=served, gather_seconds=3600, gather_requests=2) as client:
        gone = asyncio.create_task(chat(client, "gone"))
        gathering = client._batching
        await until(lambda: gathering.gatherer is not None and gathering.gatherer.waiting == 1)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert gathering.gatherer is not None
        assert gathering.gatherer.waiting == 0
        before = {batch["id"] for batch in batches(served)}
        await asyncio.gather(chat(client, "a"), chat(client, "b"))
        (made,) = [batch for batch in batches(served) if batch["id"] not in before]
        assert made["request_counts"]["total"] == 2


async def test_when_nobody_waits_any_more_the_batch_is_cancelled() -> None:
    with FakeServer(Manners()) as server:
        server.manners.finish.clear()
        async with batchery.AsyncOpenAI(base_url=server.base_url, gather_seconds=0) as client:
            asking = asyncio.create_task(chat(client, "x"))
            await until(lambda: server.count("POST", "/v1/batches"))
            asking.cancel()
            await until(lambda: any(call.path.endswith("/cancel") for call in server.calls))


async def test_close_fails_what_waits_and_cancels_what_runs() -> None:
    with FakeServer(Manners()) as server:
        server.manners.finish.clear()
        client = batchery.AsyncOpenAI(base_url=server.base_url, gather_seconds=0)
        asking = asyncio.create_task(chat(client, "x"))
        await until(lambda: server.count("POST", "/v1/batches"))
        await client.close()
        with pytest.raises(openai.APIConnectionError, match="closed"):
            await asking
        assert any(call.path.endswith("/cancel") for call in server.calls)


def test_a_client_can_be_closed_in_another_loop() -> None:
    with FakeServer(Manners()) as server:
        server.manners.finish.clear()
        client = batchery.AsyncOpenAI(base_url=server.base_url, gather_seconds=0)

        async def ask() -> None:
            asking = asyncio.create_task(chat(client, "x"))
            await until(lambda: server.count("POST", "/v1/batches"))
            asking.cancel()

        async def close() -> None:
            await asyncio.wait_for(client.close(), 20)

        asyncio.run(ask())
        asyncio.run(close())
        assert any(call.path.endswith("/cancel") for call in server.calls)


async def test_an_outage_that_outlasts_a_call_loses_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gatherer, "OUTAGE", 0.01)
    with FakeServer(Manners()) as server:
        server.manners.troubles = [("GET", r"/v1/batches/\w+", 503, {}), ("GET", "/v1/files/.*", 502, {})] * 3
        found = Gatherer(Server(f"{server.base_url}/v1"), seconds=0, patience=Patience(total=0.0))
        answer = await found.send("/v1/chat/completions", b'{"model": "m", "messages": []}')
        assert (answer.status, json.loads(answer.body)["echo"]) == (200, "gathered-1")
        assert not server.manners.troubles
        await found.close()


async def test_a_batch_that_cannot_be_followed_is_cancelled() -> None:
    with FakeServer(Manners()) as server:
        server.manners.finish.clear()
        server.manners.troubles = [("GET", r"/v1/batches/\w+", 403, {})]
        async with batchery.AsyncOpenAI(base_url=server.base_url, gather_seconds=0) as client:
            with pytest.raises(openai.PermissionDeniedError):
                await chat(client, "x")
            assert any(call.path.endswith("/cancel") for call in server.calls)


async def test_a_wrong_key_is_told_as_such() -> None:
    with FakeServer(Manners(key="right")) as server:
        async with batchery.AsyncOpenAI(base_url=server.base_url, api_key="wrong", gather_seconds=0) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await chat(client, "x")
            assert caught.value.status_code == 401
