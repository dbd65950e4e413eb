"""The offline commands as their user meets them: what they print where, and their exit codes."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from batchery.cli import main
from tests.client.fake_server import requests
from tests.client.results import answer, failure

OFFLINE = ("check", "estimate", "prepare", "split", "merge", "sample", "diff", "stats")
CLASSIFY = ("-m", "gpt-4o-mini", "-t", "Classify: {{text}}")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(requests(4))
    (tmp_path / "reviews.csv").write_text("id,text\na,good\nb,bad\n")
    return tmp_path


def invoke(*arguments: str, input: bytes | None = None) -> Result:
    return CliRunner().invoke(main.build(OFFLINE), list(arguments), input=input)


def test_check_counts_and_prices() -> None:
    done = invoke("check", "reviews.csv", *CLASSIFY, "--max-tokens", "10", "--format", "json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    (group,) = report["groups"]
    assert (report["requests"], group["model"], group["endpoint"]) == (2, "gpt-4o-mini", "/v1/chat/completions")
    assert (group["output_tokens"], group["prices"], group["cost"]) == (20, "OpenAI", group["most_cost"])
    assert report["windows"][0]["prices"][0].startswith("OpenAI of 20")
    assert "no tokenizer" in done.stderr


@pytest.mark.parametrize("format", ["table", "csv", "jsonl", "json"])
def test_every_format_has_the_same_records(format: str) -> None:
    done = invoke("check", "reviews.csv", *CLASSIFY, "--format", format)
    assert done.exit_code == 0
    if format == "table":
        assert done.stdout.splitlines()[1].split()[:3] == ["gpt-4o-mini", "/v1/chat/completions", "2"]
    elif format == "csv":
        assert next(csv.DictReader(io.StringIO(done.stdout)))["requests"] == "2"
    else:
        value = json.loads(done.stdout)
        assert (value["groups"][0] if format == "json" else value)["requests"] == 2


def test_check_tells_every_problem_and_sends_nothing_to_stdout(folder: Path) -> None:
    (folder / "bad.csv").write_text("id,text\na,x,y\nb,ok\nb,again\n")
    done = invoke("check", "bad.csv", *CLASSIFY)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "bad.csv:2: Line 2 (row 1) has 3 columns, the header has 2." in done.stderr
    done = invoke("check", "bad.csv", "-m", "m", "-t", "{{txt}}", "--input-format", "csv")
    assert "bad.csv:2:" in done.stderr
    (folder / "bad.csv").write_text("id,text\nb,ok\nb,again\n")
    done = invoke("check", "bad.csv", *CLASSIFY, "--id-column", "id")
    assert (done.exit_code, "was already used in row 1" in done.stderr) == (2, True)
    done = invoke("check", "bad.csv", *CLASSIFY, "--id-column", "no")
    assert (done.exit_code, "The columns are: 'id', 'text'." in done.stderr) == (2, True)


def test_max_cost() -> None:
    assert invoke("check", "reviews.csv", *CLASSIFY, "--max-cost", "1").exit_code == 0
    over = invoke("check", "reviews.csv", *CLASSIFY, "--max-cost", "0.00001")
    assert (over.exit_code, "is over --max-cost" in over.stderr) == (7, True)
    unknown = invoke("check", "in.jsonl", "--max-cost", "1000")
    assert (unknown.exit_code, "no price is known" in unknown.stderr) == (7, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("check",),
        ("check", "none.jsonl"),
        ("check", "in.jsonl", "--window", "tomorrow"),
        ("check", "in.jsonl", "--server", "other"),
        ("check", "in.jsonl", "--prices", "none.toml"),
        ("check", "reviews.csv", "-m", "m", "-t", "{{text"),
        ("check", "reviews.csv", "-m", "m", "-t", "@none.txt"),
        ("check", "reviews.csv", "-m", "m", "--schema", "label: text"),
        ("check", "reviews.csv", "-m", "m", "--set", "temperature=0"),
        ("check", "reviews.csv", "-m", "m", "--image-root", "none"),
        ("prepare", "in.jsonl", "-o", "in.jsonl"),
        ("split", "-"),
        ("sample", "*.jsonl", "-o", "in.jsonl"),
        ("diff", "in.jsonl", "none.jsonl"),
        ("merge", "in.jsonl", "none.jsonl"),
        ("stats", "."),
    ],
)
def test_wrong_usage_is_told_without_a_traceback(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "batchery", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 1, done
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_estimate_has_both_windows(folder: Path) -> None:
    (folder / "prices.toml").write_text(
        '[prices.m."24h"]\ninput = 1\noutput = 1\n[prices.m."1h"]\ninput = 2\noutput = 2\n'
    )
    done = invoke(
        "estimate", "reviews.csv", "-m", "m", "-t", "{{text}}", "--prices", "prices.toml", "--format", "jsonl"
    )
    day, hour = map(json.loads, done.stdout.splitlines())
    assert (day["window"], hour["window"]) == ("24h", "1h")
    assert hour["cost"] == pytest.approx(2 * day["cost"])


def test_prepare_makes_and_changes_requests(folder: Path) -> None:
    (folder / "system.txt").write_text("Be brief.\n")
    options = ("--id-column", "id", "--system", "@system.txt", "--schema", "label: good|bad")
    done = invoke("prepare", "reviews.csv", *CLASSIFY, *options, "-o", "made.jsonl")
    assert (done.exit_code, done.stdout) == (0, "")
    first = json.loads((folder / "made.jsonl").read_text().splitlines()[0])
    assert first["custom_id"] == "a"
    assert [message["content"] for message in first["body"]["messages"]] == ["Be brief.", "Classify: good"]
    assert first["body"]["response_format"]["json_schema"]["strict"] is True
    changed = invoke("prepare", "made.jsonl", "--model", "other", "--set", "body.temperature=0")
    assert [json.loads(line)["body"]["model"] for line in changed.stdout.splitlines()] == ["other", "other"]
    (folder / "changed.jsonl").write_text(changed.stdout)
    compared = invoke("diff", "made.jsonl", "changed.jsonl", "--format", "json")
    assert [found["change"] for found in json.loads(compared.stdout)] == ["changed", "changed"]
    assert "2 changed, 0 added, 0 removed." in compared.stderr


def test_stdin_in_and_out() -> None:
    done = invoke("prepare", "-", *CLASSIFY, input=b"text\nx\n")
    assert json.loads(done.stdout)["body"]["messages"][0]["content"] == "Classify: x"


def test_split_and_merge_undo_each_other(folder: Path) -> None:
    done = invoke("split", "in.jsonl", "--requests", "3", "-o", "parts", "--format", "jsonl")
    assert [json.loads(line)["requests"] for line in done.stdout.splitlines()] == [3, 1]
    assert b"".join(path.read_bytes() for path in sorted((folder / "parts").iterdir())) == requests(4)
    (folder / "a.jsonl").write_text(answer("a") + failure("b"))
    (folder / "b.jsonl").write_text(answer("b") + answer("a", "no"))
    done = invoke("merge", "a.jsonl", "b.jsonl", "-o", "out.jsonl", "--format", "json")
    assert json.loads(done.stdout)[0]["rows"] == 2
    assert "1 lines say other" in done.stderr
    assert invoke("merge", "a.jsonl", "b.jsonl", "-o", "out.jsonl", "--strict").exit_code == 1


def test_sample_and_stats(folder: Path) -> None:
    assert invoke("sample", "in.jsonl", "-n", "2", "--first").stdout.encode() == b"".join(
        requests(4).splitlines(True)[:2]
    )
    found = json.loads(invoke("stats", "in.jsonl", "--format", "json").stdout)
    assert found[0]["requests"] == 4
    (folder / "results.jsonl").write_text(answer("a") + failure("b"))
    found = json.loads(invoke("stats", "results.jsonl", "--format", "json").stdout)
    assert (found["ok"], found["failed"], found["reason"]) == (1, 1, {"500 server_error: broken": 1})
    assert invoke("stats", "results.jsonl", "in.jsonl").exit_code == 1


def test_a_reader_that_leaves_is_no_error(folder: Path) -> None:
    (folder / "big.csv").write_text("text\n" + "x\n" * 20_000)
    command = f"{sys.executable} -m batchery prepare big.csv -m m -t '{{{{text}}}}' | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_has_examples_for_each() -> None:
    for name in OFFLINE:
        shown = re.sub(r"\s+", " ", invoke(name, "--help").output)
        assert f"batchery {name} " in shown.split("Examples:")[1]
        assert "Exit codes:" in shown
