"""What became of each row, in the shapes that servers give it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchery.client.index import ResultIndex
from batchery.client.objects import Usage
from batchery.client.results import Tally, judge

RATE = {"message": "slow\ndown", "type": "rate_limit_error", "code": None}


def tally(rows: int, paths: list[Path]) -> Tally:
    with ResultIndex(paths[0].parent / "index", paths) as index:
        return index.tally(rows)


@pytest.mark.parametrize(
    ("record", "verdict"),
    [
        ({"response": {"status_code": 200, "body": {}}, "error": None}, (200, None, "")),
        ({"response": {"status_code": 200, "body": {"error": None}}}, (200, None, "")),
        (
            {"response": {"status_code": 429, "body": {"error": RATE}}, "error": None},
            (429, "rate_limit_error", "slow down"),
        ),
        ({"response": {"status_code": 400, "body": {}}, "error": {"code": "bad", "message": "m"}}, (400, "bad", "m")),
        ({"response": {"status_code": 200, "body": {"error": "oops"}}}, (200, "error", "oops")),
        ({"response": None, "error": {"code": "batch_expired", "message": "m"}}, (None, "batch_expired", "m")),
        ({"response": {"status_code": 0, "body": None}, "error": None}, (None, "error", "")),
        ({"response": {"status_code": 500, "body": {"raw": "<html>"}}, "error": "x"}, (500, "error", "x")),
        ({}, (None, "error", "")),
    ],
)
def test_judge(record: dict[str, Any], verdict: tuple[int | None, str | None, str]) -> None:
    assert judge(record) == verdict


def name(prefix: str, *records: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"custom_id": f"{prefix}{number}", **record} for number, record in enumerate(records)]


def test_tally_counts_rows_tokens_and_reasons(tmp_path: Path) -> None:
    good = {"response": {"status_code": 200, "body": {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}}}
    plain = {"response": {"status_code": 200, "body": {"usage": {"input_tokens": 10, "output_tokens": 20}}}}
    bad = {"response": {"status_code": 429, "body": {"error": RATE}}}
    late = {"response": None, "error": {"code": "batch_expired", "message": "too late"}}
    (tmp_path / "out").write_text("".join(json.dumps(r) + "\n" for r in name("a", good, good, plain)))
    (tmp_path / "err").write_text("".join(json.dumps(r) + "\n" for r in name("b", bad, late, bad)) + "not json\n")
    found = tally(9, [tmp_path / "out", tmp_path / "err", tmp_path / "none"])
    assert (found.rows, found.ok, found.failed, found.not_run) == (9, 3, 3, 3)
    assert found.usage == Usage(16, 28)
    assert [(r.rows, r.text) for r in found.reasons] == [
        (2, "429 rate_limit_error: slow down"),
        (1, "unreadable_result: the server sent a line that is not a result"),
    ]
    assert tally(1, [tmp_path / "none"]).usage is None


def test_answers_that_only_the_grammar_allows_are_counted(tmp_path: Path) -> None:
    """Half of an emoji, and a number beyond any float: a server passes a model's JSON on as it came."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(
        rb'{"custom_id":"a","response":{"status_code":200,"body":{"text":"\ud83d"}},"error":null}' + b"\n"
        rb'{"custom_id":"b","response":{"status_code":200,"body":{"score":1e999}},"error":null}' + b"\n"
    )
    counted = tally(2, [path])
    assert (counted.ok, counted.failed) == (2, 0)
