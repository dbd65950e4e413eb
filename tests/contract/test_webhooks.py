"""Webhooks from end to end: real processes, a real receiver, the official SDK, and kills in between."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.processes import Process, serve, server, simulator, wait_for
from tests.receivers import SECRET, Delivery, Receiver, accept, first, hang, receiver, status
from tests.requests import chat_file, chat_line

LOCAL = ("--webhook-networks", "127.0.0.1")
KILLS = int(os.environ.get("KILLS", "4"))


def connect(running: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)


def create(client: openai.OpenAI, data: bytes, found: Receiver, window: str = "24h") -> Any:
    """A batch whose end is told to a receiver."""
    file = client.files.create(file=("input.jsonl", data), purpose="batch")
    anything: Any = window
    return client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window=anything,
        extra_body={"webhook": {"url": found.url, "secret": SECRET}},
        metadata={"job": "nightly"},
    )


def unwrap(delivery: Delivery) -> Any:
    client = openai.OpenAI(api_key="any", webhook_secret=SECRET)
    return client.webhooks.unwrap(delivery.body.decode(), delivery.headers)


def kill(process: Process) -> None:
    """SIGKILL to the server and to its worker, as a power cut does."""
    for child in process.children():
        child.kill()
    children = process.kill()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_each_end_is_told(tmp_path: Path) -> None:
    """Once, as it ended, and within a moment that nobody need poll for."""
    options = ("--completion-windows", "24h,1s", "--cancel-grace", "0.1", *LOCAL)
    with (
        receiver(first(1, status(500))) as found,
        simulator(tmp_path, "--latency", "20ms", "--concurrency", "4") as upstream,
        server(tmp_path, upstream.url, *options) as running,
    ):
        client = connect(running)
        ids = {
            "batch.completed": create(client, chat_file(3), found).id,
            "batch.failed": create(client, chat_line("a", "[[simulate status=400]]"), found).id,
            "batch.expired": create(client, chat_file(2000, mark="late"), found, "1s").id,
        }
        at_once = create(client, b"{oops\n", found)
        assert at_once.status == "failed"
        cancelled = create(client, chat_file(5000, mark="cancelled"), found)
        client.batches.cancel(cancelled.id)
        wait_for(lambda: len(set(found.ids())) == 5, 60, "every event")
        # The one that failed first comes again, and nothing else does.
        wait_for(lambda: len(found.deliveries) == 6, 30, "the retry")
        batches: dict[str, Any] = {batch.id: batch for batch in client.batches.list()}
    events = [unwrap(delivery) for delivery in found.deliveries]
    assert found.ids() == [event.id for event in events]
    assert found.ids()[0] in found.ids()[1:]
    told = {(event.type, event.data.id) for event in events}
    assert told == {*ids.items(), ("batch.failed", at_once.id), ("batch.cancelled", cancelled.id)}
    for event in events:
        batch, data = batches[event.data.id], event.data.to_dict()
        assert event.type == f"batch.{batch.status}"
        for name in ("status", "endpoint", "output_file_id", "error_file_id", "metadata"):
            assert data[name] == getattr(batch, name)
        assert data["request_counts"] == batch.request_counts.to_dict()
        assert data["usage"] == (None if batch.usage is None else batch.usage.to_dict())
        ended_at = batch.completed_at or batch.failed_at or batch.expired_at or batch.cancelled_at
        assert event.created_at == ended_at


def test_by_default_nothing_goes_into_the_own_network(tmp_path: Path) -> None:
    with receiver() as found, simulator(tmp_path) as upstream, server(tmp_path, upstream.url) as running:
        with pytest.raises(openai.BadRequestError, match=r"127\.0\.0\.1 is loopback") as refused:
            create(connect(running), chat_file(1), found)
        assert refused.value.param == "webhook.url"
    assert found.deliveries == []


def test_killed_around_the_end(tmp_path: Path) -> None:
    """Server and worker are killed when the batch is about to end or has just ended; after the restart each batch has
    told its end, with one event."""
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"KILL_SEED={seed}")
    moments = random.Random(seed)
    with receiver() as found, simulator(tmp_path, "--latency", "2ms") as upstream:
        running = serve(tmp_path, upstream.url, *LOCAL)
        try:
            expected = set()
            for round in range(KILLS):
                batch = create(connect(running), chat_file(100, mark=f"round {round}"), found)
                expected.add(batch.id)
                before = upstream.get("/simulator/stats")["received"]
                wait_for(lambda before=before: upstream.get("/simulator/stats")["received"] >= before + 50, 30)  # type: ignore[misc]
                time.sleep(moments.random() * 0.1)  # not to wait for something, but to strike at any moment
                kill(running)
                running = serve(tmp_path, upstream.url, *LOCAL)
            wait_for(lambda: {unwrap(d).data.id for d in list(found.deliveries)} == expected, 60, "every batch's event")
            events = {(unwrap(delivery).id, unwrap(delivery).data.id) for delivery in found.deliveries}
            assert len(events) == len(expected)
        finally:
            assert running.stop() == 0


def test_killed_while_delivering(tmp_path: Path) -> None:
    """The attempt's claim lapses, and the next worker sends the same event."""
    with (
        receiver(first(1, hang(lambda: found), accept)) as found,
        simulator(tmp_path, "--latency", "2ms") as upstream,
    ):
        running = serve(tmp_path, upstream.url, *LOCAL)
        try:
            batch = create(connect(running), chat_file(3), found)
            wait_for(lambda: found.deliveries, 30, "the first attempt")
            kill(running)
            running = serve(tmp_path, upstream.url, *LOCAL)
            wait_for(lambda: len(found.deliveries) == 2, 60, "the next attempt")
            first_try, second_try = map(unwrap, found.deliveries)
            assert first_try == second_try
            assert second_try.data.id == batch.id
        finally:
            assert running.stop() == 0


def test_nobody_there_until_after_a_restart(tmp_path: Path) -> None:
    """A receiver that is down when the batch ends and the server is stopped gets the event from the next server."""
    with receiver() as gone:
        port = gone.port
    with simulator(tmp_path, "--latency", "2ms") as upstream:
        with server(tmp_path, upstream.url, *LOCAL) as running:
            client = connect(running)
            batch = create(client, chat_file(3), gone)
            wait_for(lambda: client.batches.retrieve(batch.id).status == "completed", 30, "the end")
        with receiver(port=port) as found, server(tmp_path, upstream.url, *LOCAL):
            wait_for(lambda: found.deliveries, 60, "the event")
        assert unwrap(found.deliveries[0]).data.id == batch.id
        assert gone.deliveries == []
