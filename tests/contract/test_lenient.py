"""Contract: `on_invalid_line: "skip"`: the good lines run, and the bad ones are error lines with their line numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchery.engine import reader
from tests.requests import chat_line
from tests.whole import whole

FILE = (
    b"not json\n"
    + chat_line("a", "one")
    + b"\n"
    + chat_line("a", "the same custom_id again")
    + b'{"custom_id":"url","method":"POST","url":"/v2/chat","body":{"model":"m"}}\n'
    + chat_line("b", "two")
    + b"\xff\xfe\n"
    + chat_line("c", "[[simulate status=400 times=1]]")
)
CODES = {1: "invalid_json_line", 4: "duplicate_custom_id", 5: "invalid_url", 7: "invalid_utf8"}


async def test_good_lines_run_and_bad_ones_are_error_lines(database_url: str, tmp_path: Path) -> None:
    async with whole(database_url, tmp_path) as one:
        file = await one.rig.upload(FILE)
        assert file["status"] == "error"
        strict = await one.rig.create(file["id"])
        assert (strict.json["status"], len(strict.json["errors"]["data"])) == ("failed", 4)
        told = {error["line"]: error["message"] for error in strict.json["errors"]["data"]}
        created = await one.rig.create(file["id"], on_invalid_line="skip")
        assert (created.status, created.json["status"], created.json["errors"]) == (200, "validating", None)
        assert created.json["request_counts"] == {"total": 7, "completed": 0, "failed": 0}
        async with one.working():
            ended = await one.until(created.json["id"])
        assert ended["status"] == "completed"
        assert ended["request_counts"] == {"total": 7, "completed": 2, "failed": 5}
        output = await one.content(ended["output_file_id"])
        assert sorted(line["custom_id"] for line in output) == ["a", "b"]
        errors = await one.content(ended["error_file_id"])
        bad = {line["line"]: line for line in errors if "line" in line}
        assert {number: line["error"]["code"] for number, line in bad.items()} == CODES
        assert {number: line["error"]["message"] for number, line in bad.items()} == told
        assert all(line["response"] is None for line in bad.values())
        assert (bad[1]["custom_id"], bad[4]["custom_id"], bad[5]["custom_id"]) == (None, "a", "url")
        assert [line["custom_id"] for line in errors if "line" not in line] == ["c"]
        assert len({line["id"] for line in errors + output}) == 7

        lines = await one.results(ended["id"])
        assert [(line["line"], line["status"]) for line in lines] == [
            (1, "failed"),
            (2, "completed"),
            (4, "failed"),
            (5, "failed"),
            (6, "completed"),
            (7, "failed"),
            (8, "failed"),
        ]
        async with one.working():  # bad lines are not run again, and are said again in the new error file
            assert (await one.retry(ended["id"])).status == 200
            again = await one.until(ended["id"])
        assert again["request_counts"] == {"total": 7, "completed": 3, "failed": 4}
        errors = await one.content(again["error_file_id"])
        assert {line["line"]: line["error"]["code"] for line in errors} == CODES
        assert (await one.retry(ended["id"])).status == 400


async def test_a_file_of_nothing_but_bad_lines(database_url: str, tmp_path: Path) -> None:
    async with whole(database_url, tmp_path) as one, one.working():
        created = await one.batch(b"bad\nworse\n", on_invalid_line="skip")
        ended = await one.until(created["id"])
        assert ended["status"] == "failed"
        assert ended["request_counts"] == {"total": 2, "completed": 0, "failed": 2}
        assert [line["line"] for line in await one.content(ended["error_file_id"])] == [1, 2]


async def test_a_file_without_lines_cannot_be_lenient(database_url: str, tmp_path: Path) -> None:
    async with whole(database_url, tmp_path) as one:
        created = await one.batch(b"\n\n", on_invalid_line="skip")
        assert created["status"] == "failed"
        assert [error["code"] for error in created["errors"]["data"]] == ["empty_file"]


async def test_more_bad_lines_than_can_be_told_at_once(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "INVALID_PIECE", 100)
    data = b"".join(b"bad\n" if i % 3 else chat_line(f"r{i}", "go") for i in range(3_000))
    async with whole(database_url, tmp_path) as one, one.working():
        created = await one.batch(data, on_invalid_line="skip")
        ended = await one.until(created["id"])
        assert ended["request_counts"] == {"total": 3_000, "completed": 1_000, "failed": 2_000}
        errors = await one.content(ended["error_file_id"])
        assert [line["line"] for line in errors] == [i + 1 for i in range(3_000) if i % 3]


async def test_a_lenient_batch_that_is_cancelled_before_it_begins(database_url: str, tmp_path: Path) -> None:
    async with whole(database_url, tmp_path) as one:
        created = await one.batch(FILE, on_invalid_line="skip")
        await one.rig.ask("POST", f"/v1/batches/{created['id']}/cancel")
        async with one.working():
            ended = await one.until(created["id"])
            assert ended["status"] == "cancelled"
            assert ended["request_counts"] == {"total": 7, "completed": 0, "failed": 4}
            errors = await one.content(ended["error_file_id"])
            assert {line["line"]: line["error"]["code"] for line in errors if "line" in line} == CODES
            never = [line["custom_id"] for line in errors if line["error"]["code"] == "batch_cancelled"]
            assert never == ["a", "b", "c"]
            await one.retry(ended["id"])
            assert (await one.until(ended["id"]))["request_counts"] == {"total": 7, "completed": 2, "failed": 5}


@pytest.mark.parametrize("value", ["ignore", "", 1, True, [], {}])
async def test_other_ways_do_not_exist(database_url: str, tmp_path: Path, value: object) -> None:
    async with whole(database_url, tmp_path) as one:
        file = await one.rig.upload(FILE)
        refused = await one.rig.create(file["id"], on_invalid_line=value)
        assert refused.status == 400
        assert refused.error()["param"] == "on_invalid_line"
