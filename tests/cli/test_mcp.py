"""`batchery mcp`, spoken to by the official client over stdio, against a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

from batchery.cli.mcp import rows_of
from tests.processes import server, simulator
from tests.requests import chat_line


async def test_a_job_by_its_tools(tmp_path: Path) -> None:
    job = tmp_path / "job.jsonl"
    job.write_bytes(chat_line("good", "x") + chat_line("bad", "[[simulate status=400]]"))
    slow = tmp_path / "slow.jsonl"
    slow.write_bytes(chat_line("slow", "[[simulate latency=60s]]"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text("nonsense\n")
    with simulator(tmp_path) as upstream, server(tmp_path, upstream.url, "--cancel-grace", "1") as process:
        parameters = StdioServerParameters(
            command=sys.executable,
            args=["-m", "batchery", "mcp", "--base-url", process.url],
            env={"PATH": os.environ["PATH"]},
            cwd=tmp_path,
        )
        async with stdio_client(parameters) as (read, write), ClientSession(read, write) as session:
            await session.initialize()

            async def ask(name: str, **arguments: Any) -> Any:
                answer = await session.call_tool(name, arguments)
                text = getattr(answer.content[0], "text", "")
                assert not answer.is_error, text
                return json.loads(text)

            async def refused(name: str, **arguments: Any) -> str:
                answer = await session.call_tool(name, arguments)
                assert answer.is_error, answer
                return str(getattr(answer.content[0], "text", ""))

            names = {tool.name for tool in (await session.list_tools()).tools}
            assert names == {
                *("validate", "submit", "status", "list_batches", "results", "cancel", "retry", "list_models")
            }
            assert (await ask("list_models"))["data"]
            assert (await ask("validate", file=str(job)))["requests"] == 2
            found = await ask("validate", file=str(broken))
            assert (found["outcome"], found["problems"][0]["line"]) == ("invalid", 1)
            assert "nothing was sent" in await refused("submit", file=str(broken))
            assert "has not been submitted" in await refused("results", batch=str(job))

            first = await ask("submit", file=str(job))
            assert (await ask("submit", file=str(job)))["batch_id"] == first["batch_id"]
            done = await ask("results", batch=str(job), wait_seconds=30)
            assert (done["status"], done["outcome"]) == ("completed", "some requests failed")
            assert [row["custom_id"] for row in done["rows"]] == ["good"]
            assert [row["custom_id"] for row in done["error_rows"]] == ["bad"]
            assert (await ask("status", batch=first["batch_id"]))["request_counts"]["failed"] == 1
            assert (await ask("retry", file=str(job)))["left_out"] == 1
            assert (await ask("retry", file=str(job), permanent=True))["requests"] == 1

            assert "another batch" in await refused("submit", file=str(job), deduplicate=True)
            once = await ask("submit", file=str(job), deduplicate=True, new=True)
            assert (await ask("status", batch=once["batch_id"]))["deduplicated"] is not None

            await ask("submit", file=str(slow))
            assert (await ask("results", batch=str(slow)))["outcome"] == "still running"
            assert (await ask("cancel", batch=str(slow)))["status"] == "cancelling"
            assert (await ask("results", batch=str(slow), wait_seconds=30))["status"] == "cancelled"
            assert (await ask("list_batches", limit=1))["data"]
            # A name that looks like an option is a name.
            assert "--help" in await refused("submit", file="--help")


def test_what_no_agent_could_be_told_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(rb'{"a": "cut \ud83d", "b": "\ud83d\ude00", "c": NaN, "d": 1e999}' + b"\n")
    assert rows_of(path, 0, 1) == [{"a": "cut \ufffd", "b": "\U0001f600", "c": None, "d": None}]


def test_no_server_is_a_clear_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "batchery", "mcp"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 1
    assert "--base-url" in done.stderr
