"""Workers before servers of different models, on one database, one of which is killed and comes back."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from batchery.engine.breaker import ROW
from batchery.store import shards
from batchery.store.database import Database, async_url
from tests.databases import create_postgres
from tests.processes import Process, server, simulator, wait_for
from tests.requests import by_custom_id, chat_line

COUNT, MORE = 400, 50
IN_FLIGHT = 8
UNRECORDED = 128
"""Answers that may lie between two commits: 8 slots of 20 ms give one in 2.5 ms, and a commit may take 300 ms."""

TERMINAL = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def upstreams(tmp_path: Path) -> Iterator[dict[str, Process]]:
    """A server for each of two models, which refuses all others."""
    with ExitStack() as stack:
        found = {}
        for model in ("left", "right"):
            (tmp_path / model).mkdir()
            options = ("--models", model, "--latency", "20ms", "--concurrency", "64")
            found[model] = stack.enter_context(simulator(tmp_path / model, *options))
        yield found


def stats(upstream: Process) -> dict[str, Any]:
    """What an upstream has got; of the statuses only how many requests it refused."""
    found: dict[str, Any] = upstream.get("/simulator/stats")
    return {"received": found["received"], "refused": found["by_status"].get("404", 0)}


def test_each_model_waits_for_the_worker_that_serves_it(
    tmp_path: Path, postgres_server: str, upstreams: dict[str, Process]
) -> None:
    database = asyncio.run(create_postgres(postgres_server)).replace("+asyncpg", "")
    shared = ("--database", database, "--store", f"file://{tmp_path}/blobs", "--max-in-flight", str(IN_FLIGHT))
    command = [sys.executable, "-m", "batchery", "worker", "--upstream", upstreams["right"].url, *shared]
    with ExitStack() as stack:
        log = stack.enter_context((tmp_path / "worker.log").open("w"))

        def start() -> subprocess.Popen[bytes]:
            process = subprocess.Popen(command, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        running = stack.enter_context(server(tmp_path, upstreams["left"].url, *shared))
        second = start()
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)

        def create(data: bytes) -> str:
            file = client.files.create(file=("input.jsonl", data), purpose="batch").id
            return client.batches.create(
                input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
            ).id

        def lines(model: str, count: int, mark: str = "") -> bytes:
            return b"".join(chat_line(f"{mark}{model}{i}", f"{mark} {model} {i}", model=model) for i in range(count))

        def ended(batch: str) -> Any:
            found = client.batches.retrieve(batch)
            return found if found.status in TERMINAL else None

        # They have only just started, and may not know yet what the other serves.
        wait_for(lambda: "batchery_workers 2.0" in metrics(running), 20, "both workers")
        batches = {model: create(lines(model, COUNT)) for model in upstreams}
        batches["both"] = create(lines("left", MORE, "both") + lines("right", MORE, "both"))
        wait_for(lambda: stats(upstreams["right"])["received"] > 50, 20, "work for the second worker")
        second.kill()
        second.wait()
        assert wait_for(lambda: ended(batches["left"]), 20, "the end of the first batch").status == "completed"
        wait_for(lambda: "batchery_workers 1.0" in metrics(running), 20, "the second worker's burial")
        # Now the first has nothing to do but what it does not serve, and goes on with what it does.
        batches |= {f"late {model}": create(lines(model, MORE, "late")) for model in ("right", "left")}
        assert wait_for(lambda: ended(batches["late left"]), 20, "the end of a late batch").status == "completed"
        assert asyncio.run(leases(database, batches["late right"])) == 0
        wrong = {model: stats(upstream)["refused"] for model, upstream in upstreams.items()}
        assert max(wrong.values()) <= IN_FLIGHT + ROW
        start()
        for batch in batches.values():
            found = wait_for(lambda batch=batch: ended(batch), 20, "a batch's end")  # type: ignore[misc]
            assert (found.status, found.request_counts.failed) == ("completed", 0)
            results = by_custom_id(client.files.content(found.output_file_id).read().splitlines())
            assert len(results) == found.request_counts.total
        for model, upstream in upstreams.items():
            found = stats(upstream)
            assert found["refused"] == wrong[model]
            repeated = found["received"] - found["refused"] - COUNT - 2 * MORE
            assert repeated <= (IN_FLIGHT + UNRECORDED if model == "right" else 0)


async def leases(url: str, batch: str) -> int:
    """How often a shard of a batch was leased, at most."""
    database = Database(async_url(url))
    async with database.read() as connection:
        found = await shards.of_batch(connection, batch.removeprefix("batch_"))
    await database.close()
    return max(shard.epoch for shard in found)


def metrics(process: Process) -> str:
    """What the server tells Prometheus."""
    return openai.OpenAI(base_url=process.url, api_key="any").get("/metrics", cast_to=str)
