"""The simulator, from its options to its sockets: the official client on the happy path, raw sockets for the rest."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchery.upstreams.simulator import (
    Behaviour,
    LogNormal,
    RunningSimulator,
    Uniform,
    expected_text,
    expected_vectors,
    fingerprint,
    options,
    running_simulator,
)
from batchery.upstreams.simulator.outcomes import Dice, Directive, Fault, Outcome, read_directive
from batchery.upstreams.simulator.requests import Endpoint, read_request
from batchery.upstreams.simulator.slots import Slots
from batchery.wire.errors import BadRequest

DEADLINE = 10.0


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, at most `DEADLINE` seconds."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 — counts have no event to wait for
            await asyncio.sleep(0.002)


class Answer:
    """An HTTP answer as it came over the socket."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """A raw connection to a simulator."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def post(self, body: Any, path: str = "/v1/chat/completions", headers: str = "") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send(f"POST {path} HTTP/1.1\r\nHost: s\r\n{headers}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    async def answer(self, *, bodiless: bool = False) -> Answer:
        async with asyncio.timeout(DEADLINE):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            status = int(head[0].split()[1])
            length = 0 if bodiless or status == 100 else int(headers["content-length"])
            return Answer(status, headers, await self.reader.readexactly(length))

    async def ask(self, body: Any, path: str = "/v1/chat/completions", headers: str = "") -> Answer:
        self.post(body, path, headers)
        return await self.answer()

    async def get(self, path: str, method: str = "GET") -> Answer:
        self.send(f"{method} {path} HTTP/1.1\r\nHost: s\r\n\r\n".encode())
        return await self.answer(bodiless=method == "HEAD")

    async def closed(self) -> bytes:
        """What is left to read, once the server has closed."""
        async with asyncio.timeout(DEADLINE):
            return await self.reader.read()


async def connect(simulator: RunningSimulator) -> Wire:
    host, port = simulator.url.removeprefix("http://").split(":")
    return Wire(*await asyncio.open_connection(host, int(port)))


@asynccontextmanager
async def wired(behaviour: Behaviour | None = None) -> AsyncIterator[tuple[RunningSimulator, Wire]]:
    async with running_simulator(behaviour) as simulator:
        wire = await connect(simulator)
        try:
            yield simulator, wire
        finally:
            wire.writer.close()


# Options.


@given(st.integers(0, 10**6), st.sampled_from(["ms", "s", "m", "h"]))
def test_durations_are_read_in_their_unit(number: int, unit: str) -> None:
    seconds = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit]
    assert options.parse_duration(f"{number}{unit}") == pytest.approx(number * seconds)


@pytest.mark.parametrize(
    "parse",
    [
        options.parse_duration,
        options.parse_latency,
        options.parse_tokens,
        options.parse_retry_after,
        options.parse_models,
        lambda text: options.parse_rates([text]),
        lambda text: options.parse_outages([text]),
    ],
)
@given(text=st.one_of(st.text(), st.from_regex(r"(uniform:|lognormal:)?[0-9.,=\-]{0,9}(ms|s|sigma)?[0-9.\-=s]{0,5}")))
@settings(max_examples=60)
def test_whatever_the_text_it_is_read_or_a_value_error(parse: Callable[[str], object], text: str) -> None:
    with suppress(ValueError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "latency"),
    [
        ("0", 0.0),
        ("50ms", 0.05),
        ("0.05s", 0.05),
        (".5s", 0.5),
        ("uniform:10ms-90ms", Uniform(0.01, 0.09)),
        ("lognormal:1s", LogNormal(1.0)),
        ("lognormal:1s,sigma=0.8", LogNormal(1.0, 0.8)),
    ],
)
def test_latencies(text: str, latency: object) -> None:
    assert options.parse_latency(text) == latency


@pytest.mark.parametrize("text", ["50", "-1s", "1 day", "", "uniform:90ms-10ms", "lognormal:0", "normal:1s", "1e3s"])
def test_latencies_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        options.parse_latency(text)


def test_other_options() -> None:
    assert options.parse_tokens("16") == 16
    assert options.parse_tokens("8-64") == (8, 64)
    assert options.parse_rates(["500=0.01", "429=.5"]) == {500: 0.01, 429: 0.5}
    assert options.parse_outages(["5s-8s"]) == ((5.0, 8.0),)
    assert options.parse_retry_after("none") is None
    assert options.parse_models("a, b,a") == ("a", "b")


@pytest.mark.parametrize(
    "fields",
    [
        {"latency": -1.0},
        {"tokens": 0},
        {"tokens": (9, 8)},
        {"error_rates": {200: 0.1}},
        {"error_rates": {500: 0.7}, "stall_rate": 0.7},
        {"reset_rate": 1.5},
        {"html_rates": {204: 0.1}},
        {"concurrency": -1},
        {"outages": ((2.0, 1.0),)},
        {"dimensions": 0},
        {"api_key": ""},
    ],
)
def test_behaviours_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Behaviour(**fields)


# What becomes of a request.


@given(st.integers(0, 2**64 - 1), st.integers(1, 5), st.integers())
def test_draws_repeat_and_stay_in_range(number: int, attempt: int, seed: int) -> None:
    behaviour = Behaviour(latency=Uniform(0.01, 0.09), tokens=(8, 64), seed=seed, error_rates={500: 0.3})
    dice, again = Dice(behaviour), Dice(behaviour)
    assert dice.outcome(number, attempt, 8) == again.outcome(number, attempt, 8)
    assert dice.tokens(number) == again.tokens(number)
    assert 8 <= dice.tokens(number) <= 64
    assert 0.01 <= dice.outcome(number, attempt, 8).delay <= 0.09


def test_rates_hold_over_many_prompts_and_over_many_attempts() -> None:
    dice = Dice(Behaviour(error_rates={500: 0.1, 429: 0.2}, reset_rate=0.1))
    for draws in (
        [dice.outcome(number * 0x9E3779B97F4A7C15 % 2**64, 1, 1) for number in range(4000)],
        [dice.outcome(7, attempt, 1) for attempt in range(1, 4001)],
    ):
        shares = {kind: sum(draw[1:] == kind for draw in draws) / len(draws) for kind in {draw[1:] for draw in draws}}
        assert shares.keys() == {(None, 200), (Fault.STATUS, 500), (Fault.STATUS, 429), (Fault.RESET, 200)}
        assert shares[Fault.STATUS, 500] == pytest.approx(0.1, abs=0.03)
        assert shares[Fault.STATUS, 429] == pytest.approx(0.2, abs=0.03)


def test_seeds_differ() -> None:
    first, second = (Dice(Behaviour(tokens=(1, 1000), seed=seed)) for seed in (1, 2))
    assert [first.tokens(number) for number in range(20)] != [second.tokens(number) for number in range(20)]


def test_lognormal_latency_has_its_median_and_sigma() -> None:
    dice = Dice(Behaviour(latency=LogNormal(2.0, 0.7)))
    logs = [math.log(dice.outcome(number, 1, 1).delay) for number in range(4000)]
    assert math.exp(statistics.median(logs)) == pytest.approx(2.0, rel=0.1)
    assert statistics.stdev(logs) == pytest.approx(0.7, rel=0.1)


def test_token_latency_counts_for_answers_and_not_for_errors() -> None:
    slow = Behaviour(latency=1.0, token_latency=0.1)
    assert Dice(slow).outcome(1, 1, 10) == Outcome(2.0)
    failing = Behaviour(latency=1.0, token_latency=0.1, error_rates={500: 1.0})
    assert Dice(failing).outcome(1, 1, 10) == Outcome(1.0, Fault.STATUS, 500)


@pytest.mark.parametrize("rates", [{}, {503: 0.001}, {503: 1.0}])
def test_the_first_attempts_fail_and_no_others(rates: dict[int, float]) -> None:
    dice = Dice(Behaviour(fail_attempts=2, error_rates=rates))
    failure = next(iter(rates), 500)
    for number in range(50):
        statuses = [dice.outcome(number, attempt, 1).status for attempt in (1, 2, 3, 4)]
        assert statuses == [failure, failure, 200, 200]


@pytest.mark.parametrize(
    ("text", "directive"),
    [
        ("no directive", None),
        ("[[simulate status=400]]", Directive(Fault.STATUS, 400)),
        ("a [[simulate stall]] b", Directive(Fault.STALL)),
        ("[[simulate html]]", Directive(Fault.HTML, 502)),
        ("[[simulate html=200]]", Directive(Fault.HTML, 200)),
        ("[[simulate latency=2s status=500 times=2]]", Directive(Fault.STATUS, 500, 2.0, 2)),
        ("[[simulate reset]] [[simulate latency=1ms]]", Directive(Fault.RESET, 200, 0.001)),
    ],
)
def test_directives(text: str, directive: Directive | None) -> None:
    assert read_directive(text.encode()) == directive


@pytest.mark.parametrize("order", ["status=200", "explode", "stall=3", "latency=2", "times=x", ""])
def test_directives_not_understood_are_refused(order: str) -> None:
    with pytest.raises(ValueError, match=r"directive|duration"):
        read_directive(f"[[simulate {order}]]".encode())


def test_a_directive_holds_for_its_number_of_attempts() -> None:
    directive = Directive(Fault.STATUS, 500, latency=3.0, times=2)
    assert [directive.override(Outcome(1.0), attempt).status for attempt in (1, 2, 3)] == [500, 500, 200]
    assert directive.override(Outcome(1.0), 3).delay == 1.0


# Prompts.

_text = st.text(st.characters(codec="utf-8"))
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(_json, min_size=1, max_size=3), st.booleans(), st.sampled_from([None, 1, 4]))
def test_a_fingerprint_is_of_the_prompt_and_not_of_its_spelling(
    messages: list[Any], ascii_only: bool, indent: int | None
) -> None:
    body = {"temperature": 0.5, "model": "m", "messages": messages}
    spelled = json.dumps(body, ensure_ascii=ascii_only, indent=indent, sort_keys=indent is None).encode()
    request, _ = read_request(spelled, Endpoint.CHAT)
    assert f"{request.fingerprint:016x}" == fingerprint(body) == fingerprint({**body, "model": "other"})


@given(st.binary() | st.text().map(str.encode), st.sampled_from(Endpoint))
def test_any_bytes_are_a_request_or_refused(data: bytes, endpoint: Endpoint) -> None:
    with pytest.raises(BadRequest):
        read_request(data, endpoint)


# Slots.


def test_slots_are_given_in_order_and_not_to_who_has_gone() -> None:
    started: list[str] = []
    slots: Slots[str] = Slots(2, started.append)
    for name in "abcde":
        slots.enter(name)
    assert (started, slots.waiting, slots.full) == (["a", "b"], 3, True)
    assert slots.withdraw("c")
    assert not slots.withdraw("a")
    slots.leave()
    slots.leave()
    assert (started, slots.waiting, slots.in_flight, slots.peak) == (["a", "b", "d", "e"], 0, 2, 2)


def test_a_long_queue_of_instant_requests_needs_no_stack() -> None:
    started: list[int] = []

    def start(number: int) -> None:
        started.append(number)
        if number:
            slots.leave()

    slots: Slots[int] = Slots(1, start)
    for number in range(5000):
        slots.enter(number)
    slots.leave()
    assert started == list(range(5000))
    assert slots.in_flight == 0


# The official client.


async def test_the_official_client_reads_every_answer() -> None:
    async with running_simulator(Behaviour(tokens=(8, 64))) as simulator:
        behaviour = Behaviour(tokens=(8, 64))
        async with openai.AsyncOpenAI(base_url=simulator.url + "/v1", api_key="k", max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "Grüße \u2028"}]
            answer = await client.chat.completions.create(model="m", messages=messages, n=2)
            assert [choice.message.content for choice in answer.choices] == [
                expected_text({"messages": messages}, behaviour)
            ] * 2
            content = answer.choices[0].message.content
            assert content is not None
            assert content.startswith(f"simulated answer {fingerprint({'messages': messages})}: ")
            assert answer.choices[0].finish_reason == "stop"
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 2 * len(content.split())
            assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens == 0
            assert answer.usage.completion_tokens_details is not None
            assert answer.usage.completion_tokens_details.reasoning_tokens == 0

            completion = await client.completions.create(model="m", prompt=["a", "b"], max_tokens=5)
            text = expected_text({"prompt": ["a", "b"], "max_tokens": 5}, behaviour)
            assert [choice.text for choice in completion.choices] == [text, text]
            assert completion.choices[0].finish_reason == "length"

            response = await client.responses.create(model="m", input="hello")
            assert response.output_text == expected_text({"input": "hello"}, behaviour)
            assert response.status == "completed"
            assert response.usage is not None
            assert response.usage.output_tokens == len(response.output_text.split())
            assert response.usage.input_tokens_details.cached_tokens == 0
            cut = await client.responses.create(model="m", input="hello", max_output_tokens=4)
            assert cut.status == "incomplete"
            assert cut.incomplete_details is not None
            assert cut.incomplete_details.reason == "max_output_tokens"

            models = await client.models.list()
            assert [(model.id, model.owned_by) for model in models.data] == [("simulated", "batchery-simulator")]


async def test_the_official_client_reads_embeddings_in_both_encodings() -> None:
    body: dict[str, Any] = {"model": "m", "input": ["one", "two", "one"]}
    async with (
        running_simulator() as simulator,
        openai.AsyncOpenAI(base_url=simulator.url, api_key="k", max_retries=0) as client,
    ):
        packed = await client.embeddings.create(**body)
        plain = await client.embeddings.create(**body, encoding_format="float", dimensions=32)
        tokens = await client.embeddings.create(model="m", input=[1, 2, 3])
    vectors = [item.embedding for item in packed.data]
    assert vectors == [pytest.approx(vector) for vector in expected_vectors(body)]
    assert vectors[0] == vectors[2] != vectors[1]
    assert {len(item.embedding) for item in plain.data} == {32}
    assert math.fsum(value * value for value in plain.data[0].embedding) == pytest.approx(1)
    assert len(tokens.data) == 1
    assert packed.usage.total_tokens > 0


async def test_the_official_client_retries_what_fails_first() -> None:
    behaviour = Behaviour(fail_attempts=2, retry_after=0)
    async with (
        running_simulator(behaviour) as simulator,
        openai.AsyncOpenAI(base_url=simulator.url, api_key="k", max_retries=0) as client,
    ):
        messages: Any = [{"role": "user", "content": "again"}]
        for _ in range(2):
            with pytest.raises(openai.InternalServerError) as caught:
                await client.chat.completions.create(model="m", messages=messages)
            assert caught.value.type == "server_error"
        answer = await client.chat.completions.create(model="m", messages=messages)
        assert answer.choices[0].message.content == expected_text({"messages": messages})
        stats = simulator.stats()
    assert (stats.by_status, stats.distinct_prompts, stats.repeated_prompts) == ({200: 1, 500: 2}, 1, 2)
    assert (stats.answered_ok_distinct, stats.answered_ok_repeated) == (1, 0)


# Refusals.


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/v1/chat/completions", b"{", 400, "invalid_json", None),
        ("/v1/chat/completions", b'"\xff"', 400, None, None),
        ("/v1/chat/completions", b'{"model":"m","messages":' + b"[" * 100_000, 400, "invalid_json", None),
        ("/v1/chat/completions", {"messages": [{}]}, 400, "missing_required_parameter", "model"),
        ("/v1/chat/completions", {"model": "m"}, 400, "missing_required_parameter", "messages"),
        ("/v1/chat/completions", {"model": "m", "messages": []}, 400, "invalid_type", "messages"),
        ("/v1/chat/completions", chat("x", stream=True), 400, "streaming_unsupported", "stream"),
        ("/v1/chat/completions", chat("x", max_tokens="9"), 400, "invalid_type", "max_tokens"),
        ("/v1/chat/completions", chat("x", n=0), 400, "invalid_value", "n"),
        ("/v1/chat/completions", chat("[[simulate nothing]]"), 400, "invalid_directive", "messages"),
        ("/v1/chat/completions", chat("x", model="other"), 404, "model_not_found", "model"),
        ("/v1/completions", {"model": "m", "input": "x"}, 400, "missing_required_parameter", "prompt"),
        ("/v1/embeddings", {"model": "m", "input": "x", "dimensions": 9999}, 400, "invalid_value", "dimensions"),
        ("/v1/embeddings", {"model": "m", "input": 3}, 400, "invalid_type", "input"),
        ("/v1/nowhere?x=1", chat("x"), 404, "not_found", None),
        ("/v1/models", chat("x"), 405, "method_not_allowed", None),
    ],
)
async def test_refusals_have_the_shape_of_openai(
    path: str, body: Any, status: int, code: str | None, param: str | None
) -> None:
    async with wired(Behaviour(models=("m",))) as (simulator, wire):
        answer = await wire.ask(body, path)
        assert answer.status == status
        error = answer.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["type"] == "invalid_request_error"
        assert code is None or error["code"] == code
        assert error["param"] == param
        # The connection goes on.
        assert (await wire.ask(chat("fine"))).status == 200
        counted = path.rsplit("/", maxsplit=1)[-1] in ("completions", "embeddings")
        assert simulator.stats().by_status == ({200: 1, status: 1} if counted else {200: 1})


async def test_the_key_is_asked_for() -> None:
    async with wired(Behaviour(api_key="sk-1")) as (_, wire):
        for headers in ("", "Authorization: Bearer sk-2\r\n", "Authorization: sk-1\r\n"):
            answer = await wire.ask(chat("x"), headers=headers)
            assert (answer.status, answer.json["error"]["code"]) == (401, "invalid_api_key")
        assert (await wire.ask(chat("x"), headers="authorization: bearer sk-1\r\n")).status == 200
        assert (await wire.get("/v1/models")).status == 401
        assert (await wire.get("/healthz")).status == 200


async def test_the_pages_besides_inference() -> None:
    async with wired() as (simulator, wire):
        await wire.ask(chat("x"))
        stats = await wire.get("/simulator/stats")
        assert stats.json["by_status"] == {"200": 1}
        assert stats.headers["server"] == "batchery-simulator"
        head = await wire.get("/simulator/stats", "HEAD")
        assert (head.status, head.body) == (200, b"")
        wrong = await wire.get("/v1/chat/completions")
        assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
        reset = await wire.ask(b"", "/simulator/reset")
        assert reset.json["received"] == reset.json["distinct_prompts"] == 0
        assert simulator.stats().received == 0


# Faults on the wire.


async def test_a_status_with_its_body_and_retry_after() -> None:
    async with wired(Behaviour(retry_after=7)) as (simulator, wire):
        limited = await wire.ask(chat("[[simulate status=429]]"))
        assert (limited.status, limited.headers["retry-after"]) == (429, "7")
        assert limited.json["error"]["code"] == "rate_limit_exceeded"
        poison = await wire.ask(chat("[[simulate status=400]]"))
        assert poison.json["error"]["type"] == "invalid_request_error"
        assert "retry-after" not in poison.headers
        unknown = await wire.ask(chat("[[simulate status=599]]"))
        assert (unknown.status, unknown.json["error"]["type"]) == (599, "server_error")
        assert simulator.stats().by_status == {400: 1, 429: 1, 599: 1}


async def test_a_reset_comes_before_any_byte() -> None:
    async with wired() as (simulator, wire):
        wire.post(chat("[[simulate reset]]"))
        with pytest.raises(ConnectionResetError):
            await wire.closed()
        assert (simulator.stats().reset, simulator.stats().answered) == (1, 0)


async def test_a_truncated_body_is_shorter_than_promised() -> None:
    async with wired() as (simulator, wire):
        wire.post(chat("[[simulate truncate]]"))
        head, _, body = (await wire.closed()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        promised = int(head.partition(b"Content-Length: ")[2].split()[0])
        assert promised // 2 - 1 <= len(body) <= promised // 2 + 1
        assert (simulator.stats().truncated, simulator.stats().answered_ok_distinct) == (1, 0)


async def test_malformed_and_html_answers() -> None:
    async with wired(Behaviour(html_rates={502: 1.0})) as (simulator, wire):
        page = await wire.ask(chat("drawn"))
        assert (page.status, page.headers["content-type"]) == (502, "text/html; charset=utf-8")
        assert b"<html>" in page.body
        assert (await wire.ask(chat("[[simulate html=200]]"))).body.startswith(b"<!DOCTYPE html>")
        broken = await wire.ask(chat("[[simulate malformed]]"))
        assert (broken.status, broken.headers["content-type"]) == (200, "application/json")
        with pytest.raises(json.JSONDecodeError):
            _ = broken.json
        stats = simulator.stats()
        assert (stats.malformed, stats.answered_ok_distinct, stats.by_status) == (1, 0, {200: 2, 502: 1})


async def test_a_stall_holds_its_slot_until_the_client_gives_up() -> None:
    async with wired(Behaviour(concurrency=1)) as (simulator, wire):
        wire.post(chat("[[simulate stall]]"))
        await until(lambda: simulator.stats().stalled == 1)
        second = await connect(simulator)
        second.post(chat("patient"))
        await until(lambda: simulator.stats().waiting == 1)
        wire.writer.close()
        assert (await second.answer()).status == 200
        stats = simulator.stats()
        assert (stats.aborted, stats.in_flight, stats.peak_in_flight) == (1, 0, 1)
        second.writer.close()


async def test_separators_are_inside_answers_and_newlines_between_them() -> None:
    behaviour = Behaviour(line_separator=True)
    async with wired(behaviour) as (_, wire):
        answer = await wire.ask(chat("x"))
        text = answer.json["choices"][0]["message"]["content"]
        assert text == expected_text(chat("x"), behaviour)
        assert b"\n" in answer.body
        for separator in ("\u2028", "\u2029", "\u0085"):
            assert separator.encode() in answer.body


async def test_an_outage_ends() -> None:
    async with wired(Behaviour(outages=((0.0, 0.3),))) as (simulator, wire):
        simulator.reset()
        first = await wire.ask(chat("x"))
        assert (first.status, first.headers["retry-after"]) == (503, "1")

        async def statuses() -> int:
            return (await wire.ask(chat("x"))).status

        async with asyncio.timeout(DEADLINE):
            while await statuses() != 200:
                pass
        assert simulator.stats().distinct_prompts == 1
        simulator.reset()
        assert (await wire.get("/healthz")).status == 503


# Slots and queues over real connections.


async def test_requests_beyond_the_slots_wait_and_beyond_the_queue_are_refused() -> None:
    async with running_simulator(Behaviour(concurrency=1, max_queue=1)) as simulator:
        wires = [await connect(simulator) for _ in range(3)]
        wires[0].post(chat("[[simulate stall]]"))
        await until(lambda: simulator.stats().in_flight == 1)
        wires[1].post(chat("waits"))
        await until(lambda: simulator.stats().waiting == 1)
        refused = await wires[2].ask(chat("too many"))
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        # Who leaves the queue makes room in it.
        wires[1].writer.close()
        await until(lambda: simulator.stats().waiting == 0)
        wires[2].post(chat("too many"))
        await until(lambda: simulator.stats().waiting == 1)
        wires[0].writer.close()
        # A refused request was no attempt: this one is the first.
        assert (await wires[2].answer()).headers["x-request-id"].endswith("-1")
        stats = simulator.stats()
        assert (stats.received, stats.answered, stats.aborted) == (4, 2, 2)
        wires[2].writer.close()


async def test_a_client_that_leaves_is_not_answered_later() -> None:
    async with wired() as (simulator, wire):
        leaving = await connect(simulator)
        leaving.post(chat("[[simulate latency=200ms]]"))
        await until(lambda: simulator.stats().in_flight == 1)
        leaving.writer.close()
        await until(lambda: simulator.stats().aborted == 1)
        assert simulator.stats().in_flight == 0
        # This one is answered after the other would have been.
        assert (await wire.ask(chat("[[simulate latency=250ms]]"))).status == 200
        stats = simulator.stats()
        assert (stats.received, stats.answered, stats.aborted, stats.in_flight) == (2, 1, 1, 0)


async def test_the_counts_add_up_and_what_was_paid_twice_shows() -> None:
    behaviour = Behaviour(
        latency=Uniform(0.0, 0.01),
        concurrency=8,
        tokens=(8, 64),
        error_rates={500: 0.2, 429: 0.1},
        reset_rate=0.1,
        truncate_rate=0.1,
        malformed_rate=0.1,
    )

    async def run(order: list[int]) -> tuple[dict[int, int], Any]:
        async with running_simulator(behaviour) as simulator:

            async def one(number: int) -> tuple[int, int]:
                wire = await connect(simulator)
                try:
                    return number, (await wire.ask(chat(f"prompt {number}"))).status
                except (ConnectionResetError, asyncio.IncompleteReadError):
                    return number, 0
                finally:
                    wire.writer.close()

            outcomes = dict(await asyncio.gather(*map(one, order)))
            return outcomes, simulator.stats()

    forth, stats = await run(list(range(100)))
    back, _ = await run(list(range(99, -1, -1)))
    assert forth == back
    assert stats.received == 100 == stats.answered + stats.reset + stats.truncated
    assert stats.peak_in_flight <= 8
    assert {500, 429, 200, 0} == set(forth.values())


async def test_an_answer_given_twice_is_counted() -> None:
    async with wired() as (simulator, wire):
        for _ in range(3):
            await wire.ask(chat("same"))
        await wire.ask(chat("other"))
        stats = simulator.stats()
        assert (stats.distinct_prompts, stats.repeated_prompts) == (2, 2)
        assert (stats.answered_ok_distinct, stats.answered_ok_repeated) == (2, 2)
        assert stats.tokens == 4 * 16


# HTTP.


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with wired(Behaviour(latency=Uniform(0.0, 0.002))) as (_, wire):
        # More than one read of the server's, so that it has to stop reading and go on.
        bodies = [chat(f"number {number} {'x' * 4000}") for number in range(200)]
        for body in bodies:
            wire.post(body)
        for body in bodies:
            assert (await wire.answer()).json["choices"][0]["message"]["content"] == expected_text(body)


async def test_thousands_of_pipelined_instant_requests() -> None:
    async with wired() as (simulator, wire):
        wire.send(b"GET /healthz HTTP/1.1\r\nHost: s\r\n\r\n" * 3000)
        for _ in range(3000):
            assert (await wire.answer()).status == 200
        assert simulator.stats().received == 0


async def test_a_chunked_body_in_single_bytes() -> None:
    async with wired() as (_, wire):
        data = json.dumps(chat("chunks")).encode()
        wire.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n")
        wire.send(b"".join(b"1\r\n%c\r\n" % byte for byte in data) + b"0\r\n\r\n")
        assert (await wire.answer()).json["choices"][0]["message"]["content"] == expected_text(chat("chunks"))


async def test_a_client_that_asks_is_told_to_continue() -> None:
    async with wired() as (_, wire):
        data = json.dumps(chat("expected")).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: s\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        wire.post(chat("earlier [[simulate latency=10ms]]"))
        wire.send(head % len(data))
        assert (await wire.answer()).status == 200
        assert (await wire.answer()).status == 100
        wire.send(data)
        assert (await wire.answer()).status == 200


@pytest.mark.parametrize(
    ("version", "headers", "connection"),
    [
        ("1.1", "Connection: close\r\n", "close"),
        ("1.0", "", "close"),
        ("1.0", "Connection: keep-alive\r\n", "keep-alive"),
        ("1.1", "Connection: Upgrade\r\nUpgrade: websocket\r\n", "close"),
    ],
)
async def test_connections_close_when_they_should(version: str, headers: str, connection: str) -> None:
    async with wired() as (_, wire):
        wire.send(f"GET http://s/healthz HTTP/{version}\r\n{headers}\r\n".encode())
        answer = await wire.answer()
        assert (answer.status, answer.headers["connection"]) == (200, connection)
        if connection == "close":
            assert await wire.closed() == b""


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"POST /v1/embeddings HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST /v1/embeddings HTTP/1.1\r\nContent-Length: 33554433\r\n\r\n", 413),
        (b"POST /v1/embeddings HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2000001\r\n" + b"x" * 0x2000001, 413),
        (b"GET / HTTP/1.1\r\n" + b"a: bcdefghijklmn\r\n" * 5000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 1_000_000, 431),
    ],
    ids=["no request", "bad length", "large", "large in chunks", "many headers", "endless header"],
)
async def test_what_http_forbids_is_refused_and_closed(data: bytes, status: int) -> None:
    async with wired() as (_, wire):
        wire.send(b"GET /healthz HTTP/1.1\r\n\r\n" + data)
        assert (await wire.answer()).status == 200
        answer = await wire.answer()
        assert (answer.status, answer.headers["connection"]) == (status, "close")
        assert answer.json["error"]["message"]
        assert await wire.closed() == b""


async def test_leaving_closes_connections_and_counts_what_it_cut_off() -> None:
    async with running_simulator(Behaviour(latency=60.0)) as simulator:
        wire = await connect(simulator)
        wire.post(chat("x"))
        await until(lambda: simulator.stats().in_flight == 1)
    assert (simulator.stats().aborted, simulator.stats().in_flight) == (1, 0)
    with pytest.raises(OSError, match=r"."):
        await connect(simulator)
    wire.writer.close()


# The command.

_COMMAND = "import typer; from batchery.cli.simulate import simulate; typer.run(simulate)"


@contextmanager
def command(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _get(url: str, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(url + path, timeout=DEADLINE) as response:
        found: dict[str, Any] = json.load(response)
    return found


def _post(url: str, body: dict[str, Any], key: str, path: str = "/v1/chat/completions") -> bytes:
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.0\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as client:
        client.sendall(head.encode() + data)
        received = b""
        while piece := client.recv(65536):
            received += piece
    return received


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_says_where_it_listens_and_stops_when_told(number: signal.Signals) -> None:
    with command("--port", "0", "--latency", "1ms", "--api-key-env", "SIMULATOR_KEY", SIMULATOR_KEY="k") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("batchery simulator listening on http://127.0.0.1:")
        url = line.split()[-1]
        assert expected_text(chat("x")).encode() in _post(url, chat("x"), "k")
        assert b" 401 " in _post(url, chat("x"), "wrong")
        with pytest.raises(ConnectionResetError):
            _post(url, chat("[[simulate reset]]"), "k")
        process.send_signal(number)
        rest, notice = process.communicate(timeout=DEADLINE)
        assert (process.returncode, rest) == (0, "")
        assert "no model" in notice


@pytest.mark.parametrize(
    "arguments",
    [("--latency", "50"), ("--error-rate", "500"), ("--stall-rate", "2"), ("--api-key-env", "NO_SUCH_VARIABLE")],
)
def test_the_command_refuses_bad_values(arguments: tuple[str, str]) -> None:
    with command("--port", "0", *arguments) as process:
        out, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, out) == (2, "")
        assert "Invalid value" in err
        assert "Traceback" not in err


def test_the_command_says_that_its_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, command("--port", str(taken.getsockname()[1])) as process:
        out, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, out) == (1, "")
        assert "cannot listen on 127.0.0.1 port" in err
        assert "Traceback" not in err


def test_the_command_lets_others_come_and_go() -> None:
    """On the event loop that the command has, which is not the tests'."""
    options = ("--interactive", "200,0@60s", "--concurrency", "1@0s,2@0.1s", "--slowdown", "1", "--latency", "1ms")
    with command("--port", "0", *options) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        for _ in range(2):
            deadline = time.monotonic() + DEADLINE
            while _get(url, "/simulator/stats")["interactive"] < 50:
                assert time.monotonic() < deadline
            _post(url, {}, "k", path="/simulator/reset")
        process.terminate()
        _, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, "Traceback" in err) == (0, False)


# Load that changes.


async def ask_each(simulator: RunningSimulator, count: int, mark: str = "") -> list[Wire]:
    """Ask over a connection each."""
    wires = [await connect(simulator) for _ in range(count)]
    for number, one in enumerate(wires):
        one.post(chat(f"{mark} {number}"))
    return wires


def hang_up(wires: list[Wire]) -> None:
    for one in wires:
        one.writer.close()


async def test_slots_change_by_schedule() -> None:
    behaviour = Behaviour(latency=0.3, concurrency=((0.0, 2), (0.1, 6), (0.2, 1)))
    async with running_simulator(behaviour) as simulator:
        simulator.reset()
        wires = await ask_each(simulator, 20)
        seen: set[int] = set()

        def look() -> bool:
            seen.add(simulator.stats().in_flight)
            return simulator.stats().answered > 7

        await until(look)
        await until(lambda: simulator.stats().in_flight == 1)
        hang_up(wires)
    assert max(seen) == 6
    assert 2 in seen


async def test_a_full_house_slows_down() -> None:
    async with running_simulator(Behaviour(latency=0.1, concurrency=2, slowdown=4.0)) as simulator:
        loop = asyncio.get_running_loop()
        started = loop.time()
        for one in await ask_each(simulator, 2):
            await one.answer()
            one.writer.close()
        assert loop.time() - started >= 0.49


async def test_others_take_slots_and_wait_for_them() -> None:
    behaviour = Behaviour(latency=0.05, concurrency=1, interactive=((0.0, 200.0), (0.2, 0.0)))
    async with running_simulator(behaviour) as simulator:
        await until(lambda: simulator.stats().interactive >= 10)
        stats = simulator.stats()
        assert stats.interactive_longest_wait >= stats.interactive_wait > 0.05
        assert (stats.received, stats.in_flight, stats.waiting) == (0, 0, 0)


async def test_engine_metrics_in_vllm_s_names() -> None:
    async with wired(Behaviour(latency=5.0, concurrency=2)) as (simulator, wire):
        wires = await ask_each(simulator, 5)
        await until(lambda: simulator.stats().waiting == 3)
        text = (await wire.get("/metrics")).body.decode()
        hang_up(wires)
    assert 'vllm:num_requests_waiting{model_name="simulated"} 3.0' in text
    assert 'vllm:num_requests_running{model_name="simulated"} 2.0' in text
    assert 'vllm:kv_cache_usage_perc{model_name="simulated"} 0.9' in text


@pytest.mark.parametrize("text", ["", "x", "5@", "5@3", "5@0s,6@0s", "5@1s", "1@0s,2@3s,3@2s", "-1"])
def test_a_schedule_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Behaviour(concurrency=options.parse_concurrency(text))
