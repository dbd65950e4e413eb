"""`--deduplicate`: identical requests are sent once where the server does that, and where it does not, that is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from batchery.cli import main
from batchery.client import follow
from tests.client.fake_server import FakeServer, Manners, custom_ids, requests
from tests.processes import Process, server, simulator
from tests.requests import chat_line

PROMPTS = 3
WARNING = "Warning: this server does not do --deduplicate"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Process]]:
    """A real server, and the simulator behind it, which counts the requests that it gets."""
    place = tmp_path_factory.mktemp("server")
    with ExitStack() as stack:
        upstream = stack.enter_context(simulator(place, "--latency", "5ms"))
        yield stack.enter_context(server(place, upstream.url)), upstream


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder, and an environment that names no server."""
    for name in list(os.environ):
        if name.startswith(("BATCHERY_", "OPENAI_", "DOUBLEWORD_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".none"))
    monkeypatch.setattr(follow, "pause_between_polls", lambda *_, **__: 0.02)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main.build([arguments[0]]), list(arguments))


def repetitive(rows: int, models: tuple[str, ...] = ("m",)) -> bytes:
    """Requests that ask the same few things in turn, with nothing left to chance."""
    return b"".join(
        chat_line(f"row-{n}", f"prompt {n % PROMPTS}", temperature=0, model=models[n % len(models)])
        for n in range(rows)
    )


def received(upstream: Process) -> int:
    count: int = upstream.get("/simulator/stats")["received"]
    return count


# On a server that does it


@pytest.mark.parametrize(("most", "batches"), [(120, 1), (40, 3)])
def test_identical_requests_are_sent_once(
    served: tuple[Process, Process], folder: Path, most: int, batches: int
) -> None:
    batch_server, upstream = served
    (folder / "in.jsonl").write_bytes(repetitive(120))
    before = received(upstream)
    arguments = ("run", "in.jsonl", "-o", "out.jsonl", "--base-url", batch_server.url, "--max-requests", str(most))
    result = invoke(*arguments, "--deduplicate", "--json")
    assert result.exit_code == 0, result.stderr
    sent = received(upstream) - before
    assert sent == PROMPTS * batches
    assert WARNING not in result.stderr

    rows = [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]
    assert [row["custom_id"] for row in rows] == [f"row-{n}" for n in range(120)]
    assert all(row["status"] == "ok" and row["output_text"] for row in rows)

    saved = json.loads(result.stdout)["deduplicated"]
    assert saved["requests"] == 120 - sent
    assert saved["input_tokens"] > json.loads(result.stdout)["input_tokens"] > 0
    words = f"Saved: {120 - sent} requests answered by another's answer, {saved['input_tokens']} input and "
    assert words in result.stderr
    assert words in invoke("receipt", "out.jsonl").stdout
    status = invoke("status", "out.jsonl", "--format", "json")
    assert sum(row["deduplicated"] for row in json.loads(status.stdout)) == 120 - sent
    assert words in status.stderr


def test_without_the_option_all_are_sent(served: tuple[Process, Process], folder: Path) -> None:
    batch_server, upstream = served
    (folder / "in.jsonl").write_bytes(repetitive(20))
    before = received(upstream)
    result = invoke("run", "in.jsonl", "-o", "out.jsonl", "--base-url", batch_server.url, "--json")
    assert result.exit_code == 0, result.stderr
    assert received(upstream) - before == 20
    assert json.loads(result.stdout)["deduplicated"] is None
    assert "Saved" not in result.stderr


def test_stream_gives_a_line_for_each(served: tuple[Process, Process], folder: Path) -> None:
    batch_server, upstream = served
    (folder / "in.jsonl").write_bytes(repetitive(30))
    before = received(upstream)
    result = invoke("stream", "in.jsonl", "--base-url", batch_server.url, "--deduplicate")
    assert result.exit_code == 0, result.stderr
    assert sorted(custom_ids(result.stdout_bytes)) == sorted(f"row-{n}" for n in range(30))
    assert received(upstream) - before == PROMPTS


def test_a_batch_is_created_so(served: tuple[Process, Process], folder: Path) -> None:
    at = ("--base-url", served[0].url, "--format", "json")
    (folder / "in.jsonl").write_bytes(repetitive(9))
    (file,) = json.loads(invoke("files", "upload", "in.jsonl", *at).stdout)
    result = invoke("batches", "create", file["id"], *at, "--deduplicate")
    (batch,) = json.loads(result.stdout)
    assert batch["deduplicated"] == 0
    assert result.stderr == ""
    followed = invoke("watch", batch["id"], *at)
    assert json.loads(followed.stdout)[0]["deduplicated"] == 9 - PROMPTS
    assert f"Saved: {9 - PROMPTS} requests answered" in followed.stderr


def test_a_cost_that_would_count_answers_twice_is_not_told(served: tuple[Process, Process], folder: Path) -> None:
    """Where models differ in price, tokens are counted in the result lines, which repeat the answers."""
    (folder / "in.jsonl").write_bytes(repetitive(12, ("m", "n")))
    (folder / "prices.toml").write_text('[prices."m"]\ninput = 1\noutput = 2\n[prices."n"]\ninput = 3\noutput = 4\n')
    for name, options, is_known in (("all", (), True), ("once", ("--deduplicate",), False)):
        arguments = ("in.jsonl", "-o", f"{name}.jsonl", "--base-url", served[0].url, "--prices", "prices.toml")
        result = invoke("run", *arguments, "--json", *options)
        assert result.exit_code == 0, result.stderr
        assert (json.loads(result.stdout)["cost"] is not None) is is_known


# Across interruptions


def test_a_killed_run_goes_on_so(folder: Path) -> None:
    (folder / "in.jsonl").write_bytes(requests(8))
    started = threading.Event()
    processes: list[subprocess.Popen[bytes]] = []
    made: list[int] = []

    def kill(call: int, is_done: bool) -> None:
        if is_done and fake.batches and not made:
            made.append(len(fake.batches))
            assert started.wait(30)
            processes[0].kill()
            processes[0].wait(10)

    with FakeServer(Manners(deduplicates=True, on_call=kill)) as fake:
        arguments = ["run", "in.jsonl", "-o", "out.jsonl", "--base-url", fake.base_url, "--max-requests", "1"]
        processes.append(subprocess.Popen([sys.executable, "-m", "batchery", *arguments, "--deduplicate", "--quiet"]))
        started.set()
        assert processes[0].wait(60) < 0
        assert made == [1]
        result = invoke(*arguments)  # as it began, even if the option is left out
        assert result.exit_code == 0, result.stderr
        assert "begun with --deduplicate, and goes on so" in result.stderr
        assert len(fake.batches) == 8
        assert all(batch["deduplicate"] is True for batch in fake.batches.values())
    assert len(custom_ids((folder / "out.jsonl").read_bytes())) == 8


def test_what_is_run_again_is_run_so(folder: Path) -> None:
    (folder / "in.jsonl").write_bytes(requests(6))
    with FakeServer(Manners(deduplicates=True, passing={"row-2", "row-4"})) as fake:
        result = invoke("run", "in.jsonl", "-o", "out.jsonl", "--base-url", fake.base_url, "--deduplicate")
        assert result.exit_code == 0, result.stderr
        assert [batch["deduplicate"] for batch in fake.batches.values()] == [True, True]
    assert "Saved: 4 requests answered by another's answer, 8 input and 12 output tokens" in result.stderr


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_new_batch_of_what_failed_is_as_the_old_one(folder: Path, is_asked: bool) -> None:
    (folder / "in.jsonl").write_bytes(requests(6))
    with FakeServer(Manners(deduplicates=True, passing={"row-2"})) as fake:
        options = ["--deduplicate"] if is_asked else []
        arguments = ("in.jsonl", "-o", "out.jsonl", "--base-url", fake.base_url, "--retries", "0")
        assert invoke("run", *arguments, *options).exit_code == 3
        result = invoke("retry", "batch_0", "--base-url", fake.base_url)
        assert result.exit_code == 0, result.stderr
        assert ["deduplicate" in batch for batch in fake.batches.values()] == [is_asked, is_asked]


# On servers that do not


@pytest.mark.parametrize("quiet", [False, True])
def test_a_server_that_ignores_it_is_told_once(folder: Path, quiet: bool) -> None:
    (folder / "in.jsonl").write_bytes(requests(12))
    with FakeServer() as fake:
        arguments = ("run", "in.jsonl", "-o", "out.jsonl", "--base-url", fake.base_url, "--max-requests", "3")
        result = invoke(*arguments, "--deduplicate", *(["--quiet"] if quiet else []))
        assert result.exit_code == 0, result.stderr
        assert len(fake.batches) == 4
        created = invoke("batches", "create", "file-0", "--base-url", fake.base_url, "--deduplicate")
    assert result.stderr.count(WARNING) == (0 if quiet else 1)
    assert len(custom_ids((folder / "out.jsonl").read_bytes())) == 12
    assert created.exit_code == 0
    assert created.stderr.startswith(WARNING)


def test_nothing_is_said_of_it_to_a_server_unless_it_is_asked_for(folder: Path) -> None:
    (folder / "in.jsonl").write_bytes(requests(2))
    with FakeServer(Manners(unknown="deduplicate")) as fake:
        assert invoke("run", "in.jsonl", "-o", "out.jsonl", "--base-url", fake.base_url).exit_code == 0
        assert invoke("batches", "create", "file-0", "--base-url", fake.base_url).exit_code == 0
        assert not any("deduplicate" in batch for batch in fake.batches.values())


def test_a_refusal_says_what_to_leave_out_and_the_job_goes_on_without(folder: Path) -> None:
    (folder / "in.jsonl").write_bytes(requests(2))
    with FakeServer(Manners(unknown="deduplicate")) as fake:
        arguments: list[Any] = ["run", "in.jsonl", "-o", "out.jsonl", "--base-url", fake.base_url]
        refused = invoke(*arguments, "--deduplicate")
        assert refused.exit_code == 1
        assert "Unknown parameter: 'deduplicate'. (HTTP 400)" in refused.stderr
        assert "does not take --deduplicate; leave it out" in refused.stderr
        assert not fake.batches
        assert invoke(*arguments, "--deduplicate").exit_code == 1
        result = invoke(*arguments)
        assert result.exit_code == 0, result.stderr
        assert "has begun with" not in result.stderr
        assert len(fake.batches) == len(fake.files) == 1


def test_other_refusals_do_not_speak_of_it(folder: Path) -> None:
    (folder / "in.jsonl").write_bytes(requests(2))
    with FakeServer(Manners(unknown="metadata")) as fake:
        refused = invoke("run", "in.jsonl", "-o", "out.jsonl", "--base-url", fake.base_url, "--deduplicate")
    assert refused.exit_code == 1
    assert "--deduplicate" not in refused.stderr
