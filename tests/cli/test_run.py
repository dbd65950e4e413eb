"""`batchery run` as its user meets it: exit codes, words, interruptions; on a fake server and on the real one."""

from __future__ import annotations

import csv
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from batchery.cli import main
from batchery.client import carry_out, follow
from batchery.client.http import Api
from batchery.client.retry import Patience
from tests.client.fake_server import FakeServer, Manners, custom_ids, requests

ROWS = 12
NAMES = [f"row-{number}" for number in range(ROWS)]
EXAMPLE = Path(__file__).parents[2] / "examples" / "requests.jsonl"
SETTINGS = (
    "BATCHERY_CONFIG",
    "BATCHERY_BASE_URL",
    "BATCHERY_API_KEY",
    "DOUBLEWORD_API_KEY",
    "OPENAI_BASE_URL",
    "OPENAI_API_KEY",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder with a good input in it, and an environment that names no server."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".none"))
    monkeypatch.setattr(follow, "pause_between_polls", lambda *_, **__: 0.02)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(requests(ROWS))
    return tmp_path


def invoke(*arguments: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(main.build(["run"]), ["run", *arguments])


def start(*arguments: str) -> subprocess.Popen[str]:
    """Run the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "batchery", "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the awaited condition did not come true"
        time.sleep(0.01)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_results(process: subprocess.Popen[str], path: Path) -> None:
    """Wait for the first result, or fail with what the command had to say."""
    wait_until(lambda: lines(path) > 0 or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]


def leftovers(folder: Path) -> set[str]:
    found = {path.name for path in folder.iterdir()} - {"in.jsonl"}
    kept = folder / ".out.jsonl.batchery"
    if kept.exists() and {path.name for path in kept.iterdir()} == {"receipt.json", "lock"}:
        found.discard(kept.name)
    return found


# How it ends


def test_all_rows_ok(folder: Path) -> None:
    with FakeServer() as server:
        result = invoke("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert custom_ids((folder / "out.jsonl").read_bytes()) == NAMES
    assert "Completed: 12 ok, 0 failed, 0 not run of 12 rows" in result.stderr
    assert "Tokens: 5 in, 7 out\n" in result.stderr
    assert leftovers(folder) == {"out.jsonl"}


def test_json_is_all_there_is_on_stdout_and_quiet_is_quiet(folder: Path) -> None:
    with FakeServer(Manners(failing={"row-1"})) as server:
        result = invoke("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url, "--json", "--quiet")
    summary = json.loads(result.stdout)
    assert (summary["exit_code"], summary["rows"], summary["ok"], summary["failed"]) == (3, 12, 11, 1)
    assert summary["reasons"] == [{"reason": "400 bad_prompt: no row-1", "rows": 1, "cause": "permanent"}]
    assert summary["batches"] == ["batch_0"]
    assert result.stderr == ""


@pytest.mark.parametrize("arguments", [[b"caf\xe9.jsonl"], [b"caf*.jsonl"], [b"in.jsonl", b"-m", b"\xe9"]])
def test_what_is_not_utf8_is_told_in_a_sentence(folder: Path, arguments: list[bytes]) -> None:
    (folder / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(requests(1))
    begin: list[str | bytes] = [sys.executable, "-m", "batchery", "run", "-o", "out", "--base-url", "http://x"]
    ended = subprocess.run([*begin, *arguments], check=False, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ")
    assert "is not UTF-8" in ended.stderr
    assert not list(folder.glob(".out*"))


@pytest.mark.parametrize(
    ("shell", "code"),
    [("exec 2>/dev/full", 0), ("exec <&- >&- 2>&-", 0), ("exec >/dev/full", 6), ("exec 2> >(:); wait $!", 0)],
)
def test_words_that_nobody_hears_do_not_end_a_job(folder: Path, shell: str, code: int) -> None:
    with FakeServer(Manners(steps=1)) as server:
        command = f"{shell}; {sys.executable} -m batchery run in.jsonl -o out.jsonl --json --base-url {server.base_url}"
        ended = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True, timeout=30)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert custom_ids((folder / "out.jsonl").read_bytes()) == NAMES


def test_some_rows_failed_and_the_same_command_again_only_tells_so(folder: Path) -> None:
    with FakeServer(Manners(failing={"row-1", "row-2"})) as server:
        for _ in range(2):
            result = invoke("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url)
            assert result.exit_code == 3
            assert "2 x 400 bad_prompt: no row-1" in result.stderr
        assert len(server.batches) == 1
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]
    assert [row["custom_id"] for row in rows] == NAMES
    assert [row["row"] for row in rows] == list(range(1, ROWS + 1))
    assert [row["custom_id"] for row in rows if row["status"] == "failed"] == ["row-1", "row-2"]
    assert rows[1]["response"]["status_code"] == 400
    assert rows[1]["error"]["code"] == "bad_prompt"


def test_the_raw_format_is_the_two_files_of_the_batch_api(folder: Path) -> None:
    with FakeServer(Manners(failing={"row-1", "row-2"})) as server:
        result = invoke("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url, "--output-format", "raw")
    assert result.exit_code == 3
    assert custom_ids((folder / "out.jsonl").read_bytes()) == [n for n in NAMES if n not in ("row-1", "row-2")]
    assert custom_ids((folder / "out.errors.jsonl").read_bytes()) == ["row-1", "row-2"]


def test_a_job_that_has_ended_well_is_not_run_again(folder: Path) -> None:
    with FakeServer() as server:
        arguments = ("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url)
        assert invoke(*arguments).exit_code == 0
        server.calls.clear()
        result = invoke(*arguments)
        assert result.exit_code == 0
        assert "ended already" in result.stderr
        assert not server.calls
    shown = CliRunner().invoke(main.build(["receipt"]), ["receipt", "out.jsonl", "--json"])
    assert json.loads(shown.stdout)["ok"] == ROWS
    (folder / "in.jsonl").write_bytes(requests(3))
    assert "made of other inputs: in.jsonl differs" in invoke(*arguments).stderr
    (folder / "in.jsonl").write_bytes(requests(ROWS))
    other = invoke(*arguments, "--set", "body.temperature=0")
    assert "made of other inputs: the options" in other.stderr
    assert other.exit_code == 1


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_in_and_a_table_out(folder: Path, suffix: str) -> None:
    (folder / "in.csv").write_text('text,status\nfox,a\n"hen, old",b\n')
    with FakeServer(Manners(failing={"row-2"})) as server:
        arguments = ("in.csv", "-o", f"out.{suffix}", "--base-url", server.base_url)
        result = invoke(*arguments, "--model", "m", "--template", "Say {{text}}")
    assert result.exit_code == 3, result.stderr
    assert b"Say hen, old" in server.files["file-0"]
    out = folder / f"out.{suffix}"
    rows = list(csv.DictReader(out.open())) if suffix == "csv" else pq.read_table(out).to_pylist()
    assert [(r["custom_id"], r["text"], r["input_status"], r["status"], r["error_code"] or None) for r in rows] == [
        ("row-1", "fox", "a", "ok", None),
        ("row-2", "hen, old", "b", "failed", "bad_prompt"),
    ]
    assert str(rows[0]["input_tokens"]) == "2"


def test_a_dry_run_sends_nothing(folder: Path) -> None:
    with FakeServer() as server:
        result = invoke("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url, "--dry-run")
        assert result.exit_code == 0
        assert "12 requests, all good" in result.stderr
        assert not server.calls
    assert not leftovers(folder)


@pytest.mark.parametrize(("limit", "code"), [("1", 0), ("0.0000001", 7)])
def test_more_than_the_most_cost_is_not_sent(folder: Path, limit: str, code: int) -> None:
    (folder / "prices.toml").write_text('[prices."m"]\ninput = 1\noutput = 2\n')
    with FakeServer() as server:
        arguments = ("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url, "--max-cost", limit)
        result = invoke(*arguments, "--prices", "prices.toml", "--json")
        assert result.exit_code == code, result.stderr
        assert bool(server.calls) is (code == 0)
        assert json.loads(result.stdout)["exit_code"] == code
        if code == 0:
            assert json.loads(result.stdout)["cost"] == pytest.approx((5 * 1 + 7 * 2) / 1e6)
            return
        assert "is over --max-cost" in result.stderr
        unknown = invoke(*arguments)
        assert unknown.exit_code == 7
        assert "no price is known for m" in unknown.stderr
        assert not server.calls


def test_large_inputs_are_split_and_run_side_by_side(folder: Path) -> None:
    with FakeServer() as server:
        result = invoke("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url, "--max-requests", "5")
        assert result.exit_code == 0, result.stderr
        assert len(server.batches) == 3
        pieces = sorted(server.files.values(), key=lambda content: NAMES.index(custom_ids(content)[0]))
        assert b"".join(pieces) == (folder / "in.jsonl").read_bytes()
    assert custom_ids((folder / "out.jsonl").read_bytes()) == NAMES


def test_a_deadline_chooses_the_window(folder: Path) -> None:
    with FakeServer() as server:
        result = invoke("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url, "--within", "4h")
        assert server.batches["batch_0"]["completion_window"] == "1h"
    assert "ends before the deadline" in result.stderr
    assert "met" in result.stderr


def test_a_job_whose_deadline_is_over_is_gone_on_with() -> None:
    by = (datetime.now(UTC) + timedelta(seconds=1.5)).isoformat()
    with FakeServer() as server:
        server.manners.troubles = [("GET", "/v1/files/.*/content", 404, {})] * 9
        arguments = ("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url, "--by", by)
        first = invoke(*arguments)
        assert first.exit_code == 1, first.stderr
        wait_until(lambda: datetime.now(UTC).isoformat() > by)
        server.manners.troubles.clear()
        result = invoke(*arguments)
        assert result.exit_code == 0, result.stderr
        assert "missed" in result.stderr
        assert "is over already" in invoke(*arguments[:2], "other.jsonl", *arguments[3:]).stderr


@pytest.mark.parametrize("end", ["expired", "cancelled", "failed"])
def test_the_batch_did_not_complete(end: str) -> None:
    with FakeServer(Manners(end=end, never_run={"row-3"})) as server:
        result = invoke("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url, "--retries", "0")
    assert result.exit_code == 4
    assert end.capitalize() in result.stderr


@pytest.mark.parametrize("status", [401, 402, 403])
def test_the_server_refuses(status: int) -> None:
    with FakeServer() as server:
        server.manners.troubles = [("POST", "/v1/files", status, {})]
        result = invoke("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url)
    assert result.exit_code == 5
    assert f"Error: trouble {status} (HTTP {status})" in result.stderr


def test_no_server_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry_out, "Api", functools.partial(Api, patience=Patience(unanswered=0)))
    result = invoke("in.jsonl", "-o", "out.jsonl", "--base-url", "http://127.0.0.1:1")
    assert result.exit_code == 6
    assert "onnection refused" in result.stderr
    assert "run the same command again" in result.stderr


def test_bad_lines_are_told_with_their_place_and_nothing_is_sent(folder: Path) -> None:
    (folder / "in.jsonl").write_bytes(requests(2) + b"{\n" + requests(1) + b'{"custom_id": "x", "method": "GET"}\n')
    with FakeServer() as server:
        result = invoke("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url)
        assert not server.calls
    assert result.exit_code == 2
    for place in ("in.jsonl:3: ", "in.jsonl:4: ", "in.jsonl:5: "):
        assert place in result.stderr
    assert not leftovers(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one INPUT"),
        (["in.jsonl"], "-o OUT"),
        (["none.jsonl", "-o", "out", "--base-url", "http://x"], "none.jsonl does not exist"),
        ([".", "-o", "out", "--base-url", "http://x"], "is a folder"),
        (["in.jsonl", "-o", "."], "is a folder"),
        (["in.jsonl", "-o", "none/out"], "does not exist"),
        (["in.jsonl", "-o", "./in.jsonl"], "both input and output"),
        (["in.jsonl", "-o", "out", "--window", "soon"], "--window"),
        (["in.jsonl", "-o", "-", "--base-url", "http://x"], "batchery stream"),
        (["in.jsonl", "-o", os.devnull, "--overwrite", "--base-url", "http://x"], "no ordinary file"),
        (["in.jsonl", "-o", "out", "--endpoint", "chat"], "--endpoint"),
        (["in.jsonl", "-o", "out"], "no server to send to"),
        (["in.jsonl", "-o", "out", "--base-url", "x"], "scheme and a host"),
        (["in.jsonl", "-o", "out", "--base-url", "http://x", "--upstream", "http://y"], "say one of them"),
        (["in.jsonl", "-o", "out", "--base-url", "http://x", "--max-in-flight", "3"], "needs --upstream"),
        (["in.jsonl", "-o", "out", "--base-url", "http://x", "--api-key-env", "NONE"], "NONE"),
        (["in.jsonl", "-o", "out", "--upstream", "simulator", "--api-key-env", "NONE"], "--upstream-key-env"),
        (["in.jsonl", "-o", "out", "--upstream", "http://y", "--upstream-key-env", "NONE"], "NONE"),
        (["in.jsonl", "-o", "out", "--upstream", "y"], "scheme and a host"),
    ],
)
def test_a_wrong_command_line_is_told_in_a_sentence(folder: Path, arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not leftovers(folder)


def test_help_has_examples_and_exit_codes() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert "--upstream simulator" in result.stdout
    assert "130  detached" in result.stdout


def test_an_output_that_is_there_is_not_touched_unless_told(folder: Path) -> None:
    (folder / "out.jsonl").write_text("precious\n")
    with FakeServer() as server:
        result = invoke("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url)
        assert result.exit_code == 1
        assert "exists already" in result.stderr
        assert not server.calls
        assert (folder / "out.jsonl").read_text() == "precious\n"
        assert leftovers(folder) == {"out.jsonl"}
        result = invoke("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url, "--overwrite")
    assert result.exit_code == 0
    assert custom_ids((folder / "out.jsonl").read_bytes()) == NAMES


def test_a_key_of_one_server_is_not_sent_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("DOUBLEWORD_API_KEY", "sk-doubleword")
    monkeypatch.setenv("OWN_KEY", "sk-own")
    with FakeServer() as server:
        assert invoke("in.jsonl", "-o", "a.jsonl", "--base-url", server.base_url).exit_code == 0
        assert not any("authorization" in call.headers for call in server.calls)
        server.calls.clear()
        arguments = ("in.jsonl", "-o", "b.jsonl", "--base-url", server.base_url, "--api-key-env", "OWN_KEY")
        assert invoke(*arguments).exit_code == 0
        assert {call.headers["authorization"] for call in server.calls} == {"Bearer sk-own"}


# Interruptions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_detaches_and_the_same_command_goes_on(folder: Path, number: signal.Signals) -> None:
    with FakeServer() as server:
        server.manners.finish.clear()
        arguments = ("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url)
        process = start(*arguments, "--overwrite")
        server.wait_until(lambda: server.count("GET", "/v1/files/.*/content") > 0)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=10)
        assert process.returncode == 130
        # What it says goes on; with --overwrite it would begin anew, and pay again.
        assert f"batchery run in.jsonl -o out.jsonl --base-url {server.base_url}\n" in stderr
        assert "Traceback" not in stderr
        server.manners.finish.set()
        assert invoke(*arguments).exit_code == 0
        assert (server.count("POST", "/v1/files"), len(server.batches)) == (1, 1)
    assert custom_ids((folder / "out.jsonl").read_bytes()) == NAMES


@pytest.mark.parametrize(
    ("method", "path", "count"),
    [("POST", "/v1/files", 1), ("POST", "/v1/batches", 1), ("GET", "/v1/batches/.*", 2), ("GET", "/v1/files/.*", 2)],
)
@pytest.mark.parametrize("idempotent", [True, False])
def test_a_kill_loses_and_doubles_nothing(folder: Path, method: str, path: str, count: int, idempotent: bool) -> None:
    with FakeServer(Manners(idempotent=idempotent)) as server:
        server.manners.finish.clear()
        arguments = ("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url)
        process = start(*arguments)
        server.wait_until(lambda: server.count(method, path) >= count)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        server.manners.finish.set()
        result = invoke(*arguments)
        assert result.exit_code == 0, result.stderr
        assert len(server.batches) == 1
    assert custom_ids((folder / "out.jsonl").read_bytes()) == NAMES


@pytest.mark.parametrize("done", [False, True], ids=["before it is carried out", "before its answer"])
@pytest.mark.parametrize("own_retry", [True, False])
def test_a_kill_at_every_call_of_a_job_is_survived(folder: Path, done: bool, own_retry: bool) -> None:
    """Kill the client at its first call, then another at its second, and so on; each time the same command must finish
    the job, with no second upload or batch.
    """
    number = 0
    while True:
        arguments = ("in.jsonl", "-o", f"out-{number}.jsonl", "--retries", "1", "--base-url")
        processes: list[subprocess.Popen[str]] = []
        known = threading.Event()

        def kill(call: int, is_done: bool, last: int = number, known: Any = known, processes: Any = processes) -> None:
            if (call, is_done) == (last, done):
                assert known.wait(10)
                processes[0].kill()
                processes[0].wait(10)

        with FakeServer(Manners(steps=1, passing={"row-3"}, retries=own_retry, on_call=kill)) as server:
            processes.append(start(*arguments, server.base_url))
            known.set()
            processes[0].communicate(timeout=30)
            if processes[0].returncode == 0:
                break
            assert processes[0].returncode == -signal.SIGKILL
            server.manners.on_call = lambda call, is_done: None
            result = invoke(*arguments, server.base_url)
            assert result.exit_code == 0, result.stderr
            assert len(server.batches) == len(server.files) == (1 if own_retry else 2)
        assert custom_ids((folder / f"out-{number}.jsonl").read_bytes()) == NAMES
        number += 1
    assert number >= 8


def test_a_changed_input_is_not_gone_on_with(folder: Path) -> None:
    with FakeServer(Manners(failing={"row-1"})) as server:
        arguments = ("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url)
        assert invoke(*arguments).exit_code == 3
        (folder / "in.jsonl").write_bytes(requests(ROWS + 1))
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert "was changed since" in result.stderr
        assert "--overwrite" in result.stderr
        assert len(server.batches) == 1


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_answers_are_not_put_beside_rows_that_changed_meanwhile(folder: Path, name: str) -> None:
    table, other = "text\nred\nblue\ngreen\n", "text\ngreen\nred\n"
    (folder / "rows.csv").write_text(table)

    def change(call: int, done: bool) -> None:
        if server.batches:
            (folder / "rows.csv").write_text(other)

    with FakeServer(Manners(on_call=change)) as server:
        arguments = ("rows.csv", "-o", name, "-m", "m", "-t", "{{text}}", "--base-url", server.base_url)
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert "changed while the job ran: rows.csv" in result.stderr
        kept = folder / f".{name}.batchery" / "results.jsonl"
        assert str(kept) in result.stderr
        assert custom_ids(kept.read_bytes()) == ["row-1", "row-2", "row-3"]
        server.manners.on_call = lambda call, done: None
        (folder / "rows.csv").unlink()
        assert invoke(*arguments).exit_code == 1
        (folder / "rows.csv").write_text(table)
        assert invoke(*arguments).exit_code == 0
        assert len(server.batches) == 1
    rows = (folder / name).read_text().split("\n")[-4:-1]
    assert all(text in row for text, row in zip(("red", "blue", "green"), rows, strict=True)), rows


# With a server of its own


def test_the_example_runs_with_the_simulator(folder: Path) -> None:
    process = start(str(EXAMPLE), "-o", "out.jsonl", "--upstream", "simulator", "--json")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "SIMULATED" in stderr
    summary = json.loads(stdout)
    assert summary["simulated"]
    names = [json.loads(line)["custom_id"] for line in EXAMPLE.read_bytes().split(b"\n")[:-1]]
    assert sorted(custom_ids((folder / "out.jsonl").read_bytes())) == sorted(names)
    assert leftovers(folder) == {"out.jsonl"}


SLOW = ("in.jsonl", "-o", "out.jsonl", "--upstream", "simulator", "--max-in-flight", "4")
MANY = 80


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return list(psutil.Process(process.pid).children(recursive=True))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_its_server_ends_with_it_and_the_job_goes_on(folder: Path, number: signal.Signals) -> None:
    (folder / "in.jsonl").write_bytes(requests(MANY))
    process = start(*SLOW)
    wait_for_results(process, folder / "out.jsonl")
    children = family(process)
    assert len(children) >= 2
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == (130 if number == signal.SIGINT else -number), stderr
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    assert lines(folder / "out.jsonl") < MANY
    result = invoke(*SLOW)
    assert result.exit_code == 0, result.stderr
    assert "Resuming" in result.stderr
    assert sorted(custom_ids((folder / "out.jsonl").read_bytes())) == sorted(f"row-{n}" for n in range(MANY))
    assert leftovers(folder) == {"out.jsonl"}


def test_the_death_of_its_server_is_told_with_its_log(folder: Path) -> None:
    (folder / "in.jsonl").write_bytes(requests(MANY))
    process = start(*SLOW)
    wait_for_results(process, folder / "out.jsonl")
    (server,) = [child for child in psutil.Process(process.pid).children() if "serve" in child.cmdline()]
    data = Path(server.cmdline()[server.cmdline().index("--data-dir") + 1])
    assert data.stat().st_mode & 0o077 == 0, "prompts are nobody else's business"
    server.kill()
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 6
    assert "the server ended by itself (killed by signal 9). The last lines of" in stderr
    assert invoke(*SLOW).exit_code == 0
    assert sorted(custom_ids((folder / "out.jsonl").read_bytes())) == sorted(f"row-{n}" for n in range(MANY))


def test_a_server_that_does_not_start_is_told_with_its_log(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "batchery.db").mkdir()
    result = invoke("in.jsonl", "-o", "out.jsonl", "--upstream", "http://127.0.0.1:1", "--data-dir", "data")
    assert result.exit_code == 1
    assert "the server did not start" in result.stderr
    assert "Traceback (most recent call last):\n  File" not in result.stderr.split("The last lines of")[0]


@pytest.mark.parametrize(("answer", "cancels"), [(b"y\n", True), (b"n\n", False)])
def test_a_second_interrupt_asks_whether_to_cancel(answer: bytes, cancels: bool) -> None:
    controller, terminal = os.openpty()
    with FakeServer() as server:
        server.manners.finish.clear()
        process = subprocess.Popen(
            [sys.executable, "-m", "batchery", "run", "in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url],
            stdin=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        server.wait_until(lambda: server.count("GET", "/v1/batches/.*") > 1)
        seen = b""

        def read_until(text: bytes) -> None:
            nonlocal seen
            while text not in seen:
                seen += os.read(controller, 65536)

        process.send_signal(signal.SIGINT)
        read_until(b"Ctrl-C again")
        process.send_signal(signal.SIGINT)
        read_until(b"Cancel the batch batch_0?")
        os.write(controller, answer)
        assert process.wait(timeout=10) == 130
        assert server.count("POST", "/v1/batches/batch_0/cancel") == cancels
    os.close(controller)


def test_on_a_terminal_there_is_a_bar(folder: Path) -> None:
    terminal, stderr = os.openpty()
    with FakeServer() as server:
        arguments = ("in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url)
        process = subprocess.Popen(
            [sys.executable, "-m", "batchery", "run", *arguments],
            stderr=stderr,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        )
        os.close(stderr)
        seen = b""
        while True:
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # how Linux tells the end of a terminal
                break
            if not piece:
                break
            seen += piece
        assert process.wait(timeout=10) == 0
    os.close(terminal)
    assert b"100%" in seen
    assert b"12/12 done" in seen
