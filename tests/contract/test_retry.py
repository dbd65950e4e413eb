"""Contract: `POST /batches/{id}/retry`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.requests import chat_file, chat_line
from tests.server.rig import until
from tests.whole import whole

GOOD = b"".join(chat_line(f"good-{i}", f"prompt {i}") for i in range(5))
MENDED = b"".join(chat_line(f"mended-{i}", f"[[simulate status=400 times=1]] {i}") for i in range(3))
BROKEN = chat_line("broken", "[[simulate status=422]]")


def ids(lines: list[dict[str, Any]]) -> list[str]:
    return sorted(line["custom_id"] for line in lines)


async def test_what_failed_runs_again_under_the_same_id(database_url: str, tmp_path: Path) -> None:
    async with whole(database_url, tmp_path) as one, one.working():
        created = await one.batch(GOOD + MENDED + BROKEN, completion_window="1h")
        first = await one.until(created["id"])
        assert first["status"] == "completed"
        assert first["request_counts"] == {"total": 9, "completed": 5, "failed": 4}
        output = await one.content(first["output_file_id"])
        errors = await one.content(first["error_file_id"])
        assert ids(errors) == ["broken", "mended-0", "mended-1", "mended-2"]

        again = await one.retry(created["id"])
        assert again.status == 200, again
        assert again.json["id"] == created["id"]
        assert again.json["status"] == "validating"
        assert again.json["request_counts"] == {"total": 9, "completed": 5, "failed": 0}
        assert again.json["error_file_id"] is None
        assert again.json["expires_at"] >= first["completed_at"] + 3600
        stamps = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelled_at")
        assert [again.json[stamp] for stamp in stamps] == [None] * 6

        second = await one.until(created["id"])
        assert second["status"] == "completed"
        assert second["request_counts"] == {"total": 9, "completed": 8, "failed": 1}
        assert second["output_file_id"] == first["output_file_id"]
        assert second["error_file_id"] not in (None, first["error_file_id"])
        grown = await one.content(second["output_file_id"])
        assert grown[: len(output)] == output  # no line has changed its place
        assert ids(grown[len(output) :]) == ["mended-0", "mended-1", "mended-2"]
        assert ids(await one.content(second["error_file_id"])) == ["broken"]
        assert await one.content(first["error_file_id"]) == errors  # the old one stays readable
        assert [line["status"] for line in await one.results(created["id"])] == ["completed"] * 8 + ["failed"]


async def test_a_retry_is_refused_where_it_makes_no_sense(database_url: str, tmp_path: Path) -> None:
    async with whole(database_url, tmp_path) as one:
        created = await one.batch(GOOD)
        live = await one.retry(created["id"])
        assert live.status == 409
        assert live.headers["x-should-retry"] == "false"
        assert live.error()["code"] == "batch_not_retryable"
        async with one.working():
            await one.until(created["id"])
        nothing = await one.retry(created["id"])
        assert nothing.status == 400
        assert nothing.error()["code"] == "nothing_to_retry"
        assert (await one.retry("batch_" + "0" * 32)).status == 404
        bad = await one.batch(b"not json\n")
        assert bad["status"] == "failed"
        assert (await one.retry(bad["id"])).status == 400


async def test_expired_and_cancelled_requests_run_again(database_url: str, tmp_path: Path) -> None:
    async with whole(database_url, tmp_path, windows=("24h", "1s")) as one:
        cancelled = await one.batch(chat_file(40))
        assert (await one.rig.ask("POST", f"/v1/batches/{cancelled['id']}/cancel")).status == 200
        expired = await one.batch(chat_file(30), completion_window="1s")
        await until(lambda: one.rig.context.now() > expired["expires_at"])
        async with one.working():
            for batch, status, code in (
                (cancelled, "cancelled", "batch_cancelled"),
                (expired, "expired", "batch_expired"),
            ):
                ended = await one.until(batch["id"])
                assert ended["status"] == status
                assert ended["request_counts"]["failed"] == 0
                errors = await one.content(ended["error_file_id"])
                assert {line["error"]["code"] for line in errors} == {code}
                assert len(errors) == ended["request_counts"]["total"]
                assert {line["status"] for line in await one.results(batch["id"])} == {status}
            await one.rig.set_batch(expired["id"], window="24h")
            for batch, count in ((cancelled, 40), (expired, 30)):
                assert (await one.retry(batch["id"])).status == 200
                ended = await one.until(batch["id"])
                assert ended["status"] == "completed"
                assert ended["request_counts"] == {"total": count, "completed": count, "failed": 0}
                assert ended["error_file_id"] is None
                assert ids(await one.content(ended["output_file_id"])) == [f"request-{i:05}" for i in range(count)]


async def test_a_retry_that_is_cancelled_before_it_is_planned_keeps_what_was_done(
    database_url: str, tmp_path: Path
) -> None:
    async with whole(database_url, tmp_path) as one:
        created = await one.batch(GOOD + MENDED)
        async with one.working():
            await one.until(created["id"])
        assert (await one.retry(created["id"])).status == 200
        assert (await one.rig.ask("POST", f"/v1/batches/{created['id']}/cancel")).status == 200
        async with one.working():
            ended = await one.until(created["id"])
        assert ended["status"] == "cancelled"
        assert ended["request_counts"] == {"total": 8, "completed": 5, "failed": 0}
        assert len(await one.content(ended["output_file_id"])) == 5
        assert ids(await one.content(ended["error_file_id"])) == ["mended-0", "mended-1", "mended-2"]
        async with one.working():
            assert (await one.retry(created["id"])).status == 200
            ended = await one.until(created["id"])
        assert ended["request_counts"] == {"total": 8, "completed": 8, "failed": 0}
        assert len(await one.content(ended["output_file_id"])) == 8


async def test_two_retries_at_once_are_one(database_url: str, tmp_path: Path) -> None:
    async with whole(database_url, tmp_path) as one, one.working():
        created = await one.batch(GOOD + MENDED)
        await one.until(created["id"])
        answers = await asyncio.gather(*(one.retry(created["id"]) for _ in range(5)))
        statuses = sorted(answer.status for answer in answers)
        assert statuses[0] == 200
        assert set(statuses) <= {200, 400, 409}
        ended = await one.until(created["id"])
        assert ended["request_counts"] == {"total": 8, "completed": 8, "failed": 0}
        assert len(await one.content(ended["output_file_id"])) == 8
        assert one.simulator.stats().received == 11


async def test_the_grown_output_reads_as_one_file_while_it_grows(database_url: str, tmp_path: Path) -> None:
    slow = b"".join(
        chat_line(f"slow-{i}", f"[[simulate status=400 times=1]][[simulate latency=0.5s]] {i}") for i in range(2)
    )
    async with whole(database_url, tmp_path) as one, one.working():
        created = await one.batch(GOOD + MENDED + slow)
        first = await one.until(created["id"])
        output = await one.content(first["output_file_id"])
        assert (await one.retry(created["id"])).status == 200
        seen: list[dict[str, Any]] = []
        while True:
            answer = await one.rig.ask("GET", f"/v1/files/{first['output_file_id']}/content?offset={len(seen)}")
            assert answer.status == 200
            seen += [json.loads(line) for line in answer.body.split(b"\n")[:-1]]
            assert answer.headers["x-last-line"] == str(len(seen))
            if answer.headers["x-incomplete"] == "false":
                break
            await asyncio.sleep(0.01)
        assert seen[:5] == output
        assert len({line["custom_id"] for line in seen}) == len(seen) == 10


@pytest.mark.parametrize("which", ["input_file_id", "output_file_id"])
async def test_a_retry_needs_its_files(database_url: str, tmp_path: Path, which: str) -> None:
    async with whole(database_url, tmp_path) as one, one.working():
        created = await one.batch(GOOD + BROKEN)
        await one.until(created["id"])
        assert (await one.rig.ask("DELETE", f"/v1/files/{created[which]}")).status == 200
        answer = await one.retry(created["id"])
        assert answer.status == 409
        assert "deleted" in answer.error()["message"]
        assert (await one.get(created["id"]))["status"] == "completed"
