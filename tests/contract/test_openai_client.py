"""The official `openai` client, unmodified, through the whole flow against the real server and a simulated model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from batchery.upstreams.simulator import expected_text
from tests.processes import Process, server, simulator, wait_for
from tests.requests import by_custom_id, chat_file, chat_line

TERMINAL = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A simulated model of two slots and 20 ms, so that a batch can be watched."""
    with simulator(tmp_path_factory.mktemp("upstream"), "--latency", "20ms", "--concurrency", "4") as process:
        yield process


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, upstream: Process) -> Iterator[Process]:
    """The server."""
    options = ("--max-in-flight", "8", "--completion-windows", "24h,1h,2s", "--cancel-grace", "0.5")
    with server(tmp_path_factory.mktemp("server"), upstream.url, *options) as process:
        yield process


@pytest.fixture(params=["/v1", "/ai/v1"])
def client(request: pytest.FixtureRequest, running: Process) -> openai.OpenAI:
    """The client, at both base paths; it does not retry, so that nothing is papered over."""
    return openai.OpenAI(base_url=running.url + request.param, api_key="any", max_retries=0)


def create(client: openai.OpenAI, data: bytes, **more: Any) -> Any:
    """Upload a file and create a batch over it."""
    file = client.files.create(file=("input.jsonl", data), purpose="batch")
    values: Any = {"endpoint": "/v1/chat/completions", "completion_window": "24h"} | more
    return client.batches.create(input_file_id=file.id, **values)


def ended(client: openai.OpenAI, id: str) -> Any:
    """The batch, once it has ended."""
    return wait_for(lambda: b if (b := client.batches.retrieve(id)).status in TERMINAL else None, 60, "the end")


def test_whole_flow(client: openai.OpenAI) -> None:
    """Upload, create, poll, early results, download, and every answer at its request."""
    data = chat_file(120, mark=client.base_url.path)
    file = client.files.create(file=("my requests.jsonl", data), purpose="batch")
    assert (file.filename, file.bytes, file.status, file.purpose) == (
        "my requests.jsonl",
        len(data),
        "processed",
        "batch",
    )
    assert client.files.wait_for_processing(file.id).id == file.id
    assert client.files.content(file.id).read() == data

    batch = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"job": "whole flow"},
    )
    assert batch.status in ("validating", "in_progress")
    assert (batch.metadata, batch.model, batch.errors) == ({"job": "whole flow"}, "m", None)
    assert batch.output_file_id is not None
    assert batch.error_file_id is None
    assert batch.expires_at == batch.created_at + 86_400
    assert batch.request_counts is not None
    assert batch.request_counts.total == 120

    # Early results, resumed by line.
    early, lines = b"", 0
    while True:
        raw = client.files.with_raw_response.content(batch.output_file_id, extra_query={"offset": lines})
        early += raw.content
        lines = int(raw.headers["x-last-line"])
        assert early.count(b"\n") == lines
        if raw.headers["x-incomplete"] == "false":
            break

    batch = ended(client, batch.id)
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (120, 0)
    assert None not in (batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert [batch.failed_at, batch.expired_at, batch.cancelled_at] == [None, None, None]
    output = client.files.content(batch.output_file_id).read()
    assert output == early
    results = by_custom_id(output.splitlines())
    tokens = 0
    for line in data.splitlines():
        request = json.loads(line)
        response = results[request["custom_id"]]["response"]
        assert response["status_code"] == 200
        assert response["body"]["choices"][0]["message"]["content"] == expected_text(request["body"])
        tokens += response["body"]["usage"]["total_tokens"]
    assert batch.usage.total_tokens == tokens
    assert client.files.retrieve(batch.output_file_id).bytes == len(output)


def test_lists_page_by_themselves(client: openai.OpenAI) -> None:
    """Auto-paging over more pages than one, newest first, each once."""
    made = [create(client, chat_file(1, mark=f"{client.base_url.path} {i}")).id for i in range(5)]
    listed = [batch.id for batch in client.batches.list(limit=2)]
    assert listed[:5] == made[::-1]
    assert len(set(listed)) == len(listed)
    files = [file.id for file in client.files.list(limit=3, order="asc")]
    assert len(set(files)) == len(files)
    assert files == [file.id for file in client.files.list(order="desc")][::-1]


def test_cancel(client: openai.OpenAI) -> None:
    """Finished results stay, what never ran is said so, and a second cancel changes nothing."""
    batch = create(client, chat_file(2000, mark=f"cancel {client.base_url.path}"))
    wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0 or None, what="a first result")  # type: ignore[union-attr]
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch.id)
    assert batch.status == "cancelled"
    assert client.batches.cancel(batch.id).status == "cancelled"
    output = by_custom_id(client.files.content(batch.output_file_id).read().splitlines())
    errors = by_custom_id(client.files.content(batch.error_file_id).read().splitlines())
    assert len(output) == batch.request_counts.completed > 0
    assert len(output) + len(errors) == 2000
    assert {error["error"]["code"] for error in errors.values()} == {"batch_cancelled"}
    assert batch.request_counts.failed == 0
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(ended(client, create(client, chat_file(1)).id).id)


def test_expiry(client: openai.OpenAI) -> None:
    """The window ends first: what is done stays, the rest is said to have expired."""
    batch = create(client, chat_file(3000, mark=f"expire {client.base_url.path}"), completion_window="2s")
    assert batch.expires_at == batch.created_at + 2
    batch = ended(client, batch.id)
    assert batch.status == "expired"
    output = by_custom_id(client.files.content(batch.output_file_id).read().splitlines())
    errors = by_custom_id(client.files.content(batch.error_file_id).read().splitlines())
    assert len(output) == batch.request_counts.completed
    assert len(output) + len(errors) == 3000
    assert {error["error"]["code"] for error in errors.values()} == {"batch_expired"}


def test_some_requests_fail(client: openai.OpenAI) -> None:
    """Each failure is in the error file with the upstream's own answer; the batch completes."""
    lines = [chat_line("good", "hello"), chat_line("bad", "[[simulate status=400]]")]
    batch = ended(client, create(client, b"".join(lines)).id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 1, 1)
    (error,) = by_custom_id(client.files.content(batch.error_file_id).read().splitlines()).values()
    assert error["custom_id"] == "bad"
    assert error["response"]["status_code"] == 400
    assert error["response"]["body"]["error"]["message"] == error["error"]["message"]


def test_all_requests_fail(client: openai.OpenAI) -> None:
    """A batch of which nothing succeeded has failed, and its error file says why."""
    batch = ended(client, create(client, chat_line("bad", "[[simulate status=404]]")).id)
    assert (batch.status, batch.request_counts.failed) == ("failed", 1)
    assert by_custom_id(client.files.content(batch.error_file_id).read().splitlines()).keys() == {"bad"}


def test_invalid_file(client: openai.OpenAI) -> None:
    """A bad line: the upload says so, and the batch has failed from the start with every problem."""
    data = chat_line("same", "hello") + b"{oops\n" + chat_line("same", "again")
    file = client.files.create(file=("input.jsonl", data), purpose="batch")
    assert file.status == "error"
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(e.code, e.line) for e in batch.errors.data] == [("invalid_json_line", 2), ("duplicate_custom_id", 3)]
    assert batch.error_file_id is not None
    lines = [json.loads(line) for line in client.files.content(batch.error_file_id).read().splitlines()]
    assert [line["line"] for line in lines] == [2, 3]
    assert client.files.content(batch.output_file_id or "").read() == b""


def test_delete(client: openai.OpenAI) -> None:
    """A file in use stays; afterwards it goes."""
    batch = create(client, chat_file(400, mark=f"delete {client.base_url.path}"))
    with pytest.raises(openai.ConflictError):
        client.files.delete(batch.input_file_id)
    client.batches.cancel(batch.id)
    ended(client, batch.id)
    assert client.files.delete(batch.input_file_id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(batch.input_file_id)
    assert client.batches.retrieve(batch.id).input_file_id == batch.input_file_id


def test_errors_arrive_as_the_official_exceptions(client: openai.OpenAI) -> None:
    """Bad input is a 400 or a 404 with a message that names it."""
    with pytest.raises(openai.NotFoundError):
        client.batches.create(
            input_file_id="file-" + "0" * 32, endpoint="/v1/chat/completions", completion_window="24h"
        )
    window: Any = "25h"
    file = client.files.create(file=chat_file(1), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="24h, 1h, 2s") as bad:
        client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window=window)
    assert bad.value.param == "completion_window"
    assert bad.value.request_id is not None
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=chat_file(1), purpose="fine-tune")


def test_models(client: openai.OpenAI) -> None:
    """What the upstream serves."""
    assert "simulated" in [model.id for model in client.models.list()]
