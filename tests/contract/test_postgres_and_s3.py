"""The same server on PostgreSQL and the S3 protocol, with a second worker process, one of which is killed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import openai
import pytest
from moto.server import ThreadedMotoServer

from tests.databases import create_postgres
from tests.processes import server, simulator, wait_for
from tests.requests import by_custom_id, chat_file

COUNT = 1500
TERMINAL = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket's URL; processes started later find it through their environment."""
    running = ThreadedMotoServer("127.0.0.1", 0)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="batches")
    yield "s3://batches/here"
    running.stop()


def test_two_workers_and_one_dies(tmp_path: Path, postgres_server: str, s3: str) -> None:
    """Both send; when one is killed the other goes on with its requests; every request has exactly one line."""
    database = asyncio.run(create_postgres(postgres_server)).replace("+asyncpg", "")
    shared = ("--database", database, "--store", s3, "--max-in-flight", "8")
    with (
        simulator(tmp_path, "--latency", "20ms", "--concurrency", "32") as upstream,
        server(tmp_path, upstream.url, *shared) as running,
        (tmp_path / "worker.log").open("w") as log,
    ):
        command = [sys.executable, "-m", "batchery", "worker", "--upstream", upstream.url, *shared]
        second = subprocess.Popen(command, stderr=log, env=dict(os.environ))
        try:
            client = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)
            file = client.files.create(file=("input.jsonl", chat_file(COUNT)), purpose="batch")
            batch = client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            wait_for(lambda: upstream.get("/simulator/stats")["in_flight"] > 8, 20, "work for both workers")
            second.kill()
        finally:
            second.kill()
            second.wait()

        def look() -> bool:
            return client.batches.retrieve(batch.id).status in TERMINAL

        wait_for(look, 60, "the batch's end")
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed"
        assert len(by_custom_id(client.files.content(batch.output_file_id or "").read().splitlines())) == COUNT
        assert client.files.content(file.id).read() == chat_file(COUNT)
        stats = upstream.get("/simulator/stats")
        assert stats["received"] <= COUNT + 8 + 32, "more was sent twice than was in flight and unrecorded"
