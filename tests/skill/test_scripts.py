"""The skill's scripts through a whole job: against a real server, killed at any point, and against other servers."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client.fake_server import FakeServer, Manners, custom_ids
from tests.client.fake_server import requests as fake_requests
from tests.processes import Process, server, simulator, wait_for
from tests.requests import chat_file, chat_line
from tests.skill.doubleword_like import DoublewordLike
from tests.skill.scripts import KEY, command, environment, run

FAST = ("--interval", "0.05")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Process]]:
    """An open server, and its upstream."""
    folder = tmp_path_factory.mktemp("skill")
    with (
        simulator(folder) as upstream,
        server(
            folder, upstream.url, "--completion-windows", "24h,1h,2s", "--cancel-grace", "1", "--stop-grace", "1"
        ) as process,
    ):
        yield process, upstream


def batches(process: Process) -> list[Any]:
    found: list[Any] = process.get("/v1/batches?limit=100")["data"]
    return found


def kill_when(arguments: list[str], base_url: str, look: Any) -> None:
    """Start a command, and SIGKILL it as soon as there is something to see."""
    process = subprocess.Popen(arguments, env=environment(base_url), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_for(look, 30, "the moment to kill")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_a_job_from_a_table_to_its_results(served: tuple[Process, Process], tmp_path: Path) -> None:
    url = f"{served[0].url}/v1"
    table = tmp_path / "reviews.csv"
    table.write_text('id,text\na,"two\nlines, one comma"\nb,Grüße\nc,[[simulate status=400]]\nd,x\n')
    job = tmp_path / "job.jsonl"
    made = run(
        "create_batch_file.py",
        job,
        *("--input", table, "--id-column", "id", "--template", "Is it good? {{text}}", "--model", "m"),
        *("--set", "temperature=0", "--system", "Be brief."),
    )
    assert made.json == {"file": str(job), "requests": 4, "bytes": job.stat().st_size}
    first = json.loads(job.read_text().splitlines()[0])
    assert first["custom_id"] == "a"
    assert first["body"]["temperature"] == 0
    assert [message["content"] for message in first["body"]["messages"]] == [
        "Be brief.",
        "Is it good? two\nlines, one comma",
    ]
    assert run("validate_batch_file.py", job).code == 0

    before = len(batches(served[0]))
    submitted = run("submit_batch.py", job, "--base-url", url, "--metadata", "job=reviews", "--window", "1h")
    assert submitted.code == 0, submitted.stderr
    again = run("submit_batch.py", job, "--base-url", url, "--metadata", "job=reviews", "--window", "1h")
    assert again.json == submitted.json
    assert len(batches(served[0])) == before + 1
    batch = served[0].get(f"/v1/batches/{submitted.json['batch_id']}")
    assert (batch["metadata"], batch["completion_window"]) == ({"job": "reviews"}, "1h")
    assert batch["deduplicated"] is None

    once = run("submit_batch.py", job, "--base-url", url, "--new", "--deduplicate", "--state", tmp_path / "once.json")
    assert once.code == 0, once.stderr
    assert "warning" not in once.stderr
    assert served[0].get(f"/v1/batches/{once.json['batch_id']}")["deduplicated"] is not None

    other = run("submit_batch.py", job, "--base-url", url, "--window", "24h")
    assert other.code == 1
    assert "--new" in other.stderr


def test_failed_requests_run_again_and_the_hopeless_are_named(served: tuple[Process, Process], tmp_path: Path) -> None:
    url = f"{served[0].url}/v1"
    job = tmp_path / "job.jsonl"
    job.write_bytes(
        chat_line("good", "x")
        + chat_line("bad", "[[simulate status=400]]")
        + chat_line("slow", "[[simulate latency=8s]]")
    )
    submitted = run("submit_batch.py", job, "--window", "2s", base_url=url)
    watched = run("watch_batch.py", job, *FAST, base_url=url)
    assert watched.code == 4, watched.stderr
    assert watched.json["status"] == "expired"
    assert watched.json["batch_id"] == submitted.json["batch_id"]
    assert custom_ids((tmp_path / "job.results.jsonl").read_bytes()) == ["good"]
    assert sorted(custom_ids((tmp_path / "job.errors.jsonl").read_bytes())) == ["bad", "slow"]

    retried = run("retry_failed.py", job, "--submit", base_url=url)
    assert retried.code == 3  # one is left out
    assert (retried.json["requests"], retried.json["left_out"]) == (1, 1)
    assert "failed for good: 1 with 400" in retried.stderr
    again = tmp_path / "job.retry.jsonl"
    assert again.read_bytes() == chat_line("slow", "[[simulate latency=8s]]")
    second = run("retry_failed.py", job, "--submit", base_url=url)
    assert second.json["batch_id"] == retried.json["batch_id"]
    everything = run("retry_failed.py", job, "--all", "-o", tmp_path / "all.jsonl")
    assert (everything.code, everything.json["requests"]) == (0, 2)


def test_errors_of_a_batch_that_ran_again_are_replaced(served: tuple[Process, Process], tmp_path: Path) -> None:
    process, url = served[0], f"{served[0].url}/v1"
    job, errors = tmp_path / "job.jsonl", tmp_path / "job.errors.jsonl"
    job.write_bytes(chat_line("good", "x") + chat_line("mends", "[[simulate status=400 times=1]]"))
    id = run("submit_batch.py", job, base_url=url).json["batch_id"]
    assert run("watch_batch.py", job, *FAST, base_url=url).code == 3
    assert custom_ids(errors.read_bytes()) == ["mends"]
    asked = urllib.request.Request(f"{process.url}/v1/batches/{id}/retry", method="POST")
    urllib.request.urlopen(asked, timeout=30).close()
    again = run("watch_batch.py", job, *FAST, base_url=url)
    assert (again.code, again.json["result_lines"], again.json["error_lines"]) == (0, 2, 0)
    assert custom_ids(tmp_path.joinpath("job.errors.jsonl.old").read_bytes()) == ["mends"]


def test_submitting_survives_sigkill_without_a_second_batch(served: tuple[Process, Process], tmp_path: Path) -> None:
    process, url = served[0], f"{served[0].url}/v1"
    for step in ("uploading", "input_file_id", "creating"):
        job = tmp_path / f"{step}.jsonl"
        job.write_bytes(chat_file(300, padding=10_000, mark=step))
        state = job.with_name(job.name + ".batch.json")
        before = len(batches(process))
        kill_when(
            command("submit_batch.py", job),
            url,
            lambda state=state, step=step: state.exists() and step in state.read_text(),
        )
        done = run("submit_batch.py", job, base_url=url)
        assert done.code == 0, done.stderr
        assert len(batches(process)) == before + 1
        assert done.json["requests"] == 300


def test_a_batch_whose_answer_was_lost_is_found_again(tmp_path: Path) -> None:
    job = tmp_path / "job.jsonl"
    job.write_bytes(fake_requests(4))
    with FakeServer(Manners(idempotent=False, lost_answers=[("POST", "/v1/batches")])) as fake:
        done = run("submit_batch.py", job, base_url=fake.base_url)
        assert done.code == 0, done.stderr
        assert len(fake.batches) == 1
        assert done.json["batch_id"] == "batch_0"


def test_watching_survives_sigkill_and_loses_no_line(served: tuple[Process, Process], tmp_path: Path) -> None:
    url = f"{served[0].url}/v1"
    job, output = tmp_path / "job.jsonl", tmp_path / "job.results.jsonl"
    # The last one holds the batch open until the first watcher has been killed.
    job.write_bytes(chat_file(400) + chat_line("last", "[[simulate latency=3s]]"))
    assert run("submit_batch.py", job, base_url=url).code == 0
    kill_when(command("watch_batch.py", job, *FAST), url, lambda: output.exists() and output.stat().st_size > 0)
    with output.open("ab") as file:
        file.write(b'{"custom_id": "request-00')  # as if it had died within a line
    once = run("watch_batch.py", job, "--once", base_url=url)
    assert once.code in (0, 8), once.stderr
    whole = run("watch_batch.py", job, *FAST, base_url=url)
    assert whole.code == 0, whole.stderr
    ids = custom_ids(output.read_bytes())
    assert len(ids) == len(set(ids)) == 401
    assert "done" in whole.stderr
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    again = run("watch_batch.py", moved / "job.jsonl", *FAST, base_url=url)
    assert (again.code, again.json["result_lines"]) == (0, 401)
    moved.rename(tmp_path)


@pytest.mark.parametrize(
    "manners",
    [
        Manners(numbered=False, early=False),
        Manners(ignores_offset=True),
        Manners(breaks=[200, None, 3, 700]),
        Manners(no_final_newline=True),
        Manners(troubles=[("GET", "/v1/files/.*", 500, {}), ("GET", "/v1/batches/.*", 429, {"Retry-After": "1"})]),
    ],
    ids=["plain", "ignores the offset", "breaks off", "no last line break", "troubled"],
)
def test_every_result_comes_once_from_any_server(tmp_path: Path, manners: Manners) -> None:
    job = tmp_path / "job.jsonl"
    job.write_bytes(fake_requests(40))
    manners.failing, manners.key = {"row-3"}, KEY
    with FakeServer(manners) as fake:
        done = run("submit_batch.py", job, "--wait", *FAST, base_url=fake.base_url)
        assert done.code == 3, done.stderr
        assert fake.count("POST", "/v1/batches") == 1
    results = custom_ids((tmp_path / "job.results.jsonl").read_bytes())
    assert results == [f"row-{number}" for number in range(40) if number != 3]
    assert custom_ids((tmp_path / "job.errors.jsonl").read_bytes()) == ["row-3"]


def test_a_server_with_the_manners_of_doublewords(tmp_path: Path) -> None:
    job = tmp_path / "job.jsonl"
    job.write_bytes(chat_file(8))
    with DoublewordLike(refusals=[(429, "1"), (503, "0")]) as like:
        began = time.monotonic()
        done = run("submit_batch.py", job, "--wait", *FAST, base_url=like.base_url)
        assert done.code == 0, done.stderr
        assert time.monotonic() - began >= 1
        assert "the gate is closed" in done.stderr
        assert (like.uploads, like.creations) == (3, 1)
        assert [query.get("skip") for query in like.queries[:3]] == [None, ["3"], ["6"]]
    assert custom_ids((tmp_path / "job.results.jsonl").read_bytes()) == [f"request-{i:05}" for i in range(8)]


def test_an_expired_batch_keeps_what_it_has_and_the_rest_runs_again(tmp_path: Path) -> None:
    job = tmp_path / "job.jsonl"
    job.write_bytes(chat_file(8))
    with DoublewordLike(end="expired", unanswered=3) as like:
        done = run("submit_batch.py", job, "--wait", *FAST, base_url=like.base_url)
        assert (done.code, done.json["status"], done.json["result_lines"]) == (4, "expired", 5)
    retried = run("retry_failed.py", job)
    assert (retried.code, retried.json["requests"]) == (0, 3)
    assert custom_ids((tmp_path / "job.retry.jsonl").read_bytes()) == [f"request-{i:05}" for i in (5, 6, 7)]


def test_what_may_still_run_is_not_run_again(tmp_path: Path) -> None:
    with FakeServer(Manners(failing={"row-1"})) as fake:
        fake.manners.finish.clear()
        job = tmp_path / "job.jsonl"
        job.write_bytes(fake_requests(8))
        assert run("submit_batch.py", job, base_url=fake.base_url).code == 0
        for _ in range(2):
            assert run("watch_batch.py", job, "--once", base_url=fake.base_url).code == 8
        refused = run("retry_failed.py", job, "--submit", "--all", base_url=fake.base_url)
        assert (refused.code, refused.stdout) == (1, "")
        assert "watch_batch.py" in refused.stderr
        assert fake.count("POST", "/v1/batches") == 1
        fake.manners.finish.set()
        assert run("watch_batch.py", job, *FAST, base_url=fake.base_url).code == 3
        retried = run("retry_failed.py", job, "--all", base_url=fake.base_url)
        assert (retried.code, retried.json["requests"]) == (0, 1)


def test_new_makes_one_batch_however_often_the_command_goes_on(tmp_path: Path) -> None:
    with FakeServer(Manners()) as fake:
        job = tmp_path / "job.jsonl"
        job.write_bytes(fake_requests(3))
        options = (job, "--new", "--patience", "0")
        fake.manners.lost_answers = [("POST", "/v1/batches")]
        assert run("submit_batch.py", *options, base_url=fake.base_url).code == 6
        assert run("submit_batch.py", *options, base_url=fake.base_url).code == 0
        assert len(fake.batches) == 1
        fake.manners.finish.clear()
        waiting = (*options, "--wait", "--timeout", "0")
        for _ in range(2):
            assert run("submit_batch.py", *waiting, base_url=fake.base_url).code == 8
        assert len(fake.batches) == 2
        fake.manners.finish.set()
        assert run("submit_batch.py", *options, "--wait", *FAST, base_url=fake.base_url).code == 0
        assert len(fake.batches) == 2
        assert run("submit_batch.py", *options, base_url=fake.base_url).code == 0
        assert len(fake.batches) == 3


def test_a_full_disk_is_not_taken_for_a_lost_connection(tmp_path: Path) -> None:
    job = tmp_path / "job.jsonl"
    job.write_bytes(fake_requests(100))
    with FakeServer(Manners()) as fake:
        assert run("submit_batch.py", job, base_url=fake.base_url).code == 0
        done = subprocess.run(
            ["bash", "-c", 'ulimit -f 4; exec "$@"', "-", *command("watch_batch.py", job, *FAST)],
            env=environment(fake.base_url),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert "job.results.jsonl cannot be written" in done.stderr
        assert "connection" not in done.stderr
        assert run("watch_batch.py", job, *FAST, base_url=fake.base_url).json["result_lines"] == 100


def test_errors_in_plain_text_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with DoublewordLike() as like:
        done = run("watch_batch.py", "file-1", base_url=like.base_url)
        echoed = run("watch_batch.py", "other", base_url=like.base_url)
    assert done.code == 1
    assert "400: Invalid file ID format" in done.stderr
    assert "No thing for Bearer [key]" in echoed.stderr
    assert not list(tmp_path.iterdir())


def test_the_key_is_refused_and_never_shown(tmp_path: Path) -> None:
    job = tmp_path / "job.jsonl"
    job.write_bytes(fake_requests(1))
    with FakeServer(Manners(key="sk-another")) as fake:
        done = run("submit_batch.py", job, base_url=fake.base_url)
        assert done.code == 5
        assert "401" in done.stderr
        # A remembered address alone gets no key.
        assert run("submit_batch.py", job, base_url="http://127.0.0.1:9/v1", key=KEY).code in (1, 5)
        assert all("authorization" not in call.headers for call in fake.calls[1:])


def test_no_connection_ends_with_its_own_code(tmp_path: Path) -> None:
    job = tmp_path / "job.jsonl"
    job.write_bytes(fake_requests(1))
    done = run("submit_batch.py", job, "--patience", "1", base_url="http://127.0.0.1:9")
    assert done.code == 6
    assert "trying again" in done.stderr


def test_a_changed_input_is_not_taken_for_the_old(served: tuple[Process, Process], tmp_path: Path) -> None:
    url = f"{served[0].url}/v1"
    job = tmp_path / "job.jsonl"
    job.write_bytes(chat_file(2))
    first = run("submit_batch.py", job, base_url=url)
    job.write_bytes(chat_file(3))
    refused = run("submit_batch.py", job, base_url=url)
    assert refused.code == 2
    assert "has changed" in refused.stderr
    second = run("submit_batch.py", job, "--new", base_url=url)
    assert second.code == 0
    assert second.json["batch_id"] != first.json["batch_id"]


def test_results_of_another_batch_are_left_alone(served: tuple[Process, Process], tmp_path: Path) -> None:
    url = f"{served[0].url}/v1"
    job = tmp_path / "job.jsonl"
    job.write_bytes(chat_file(2))
    assert run("submit_batch.py", job, base_url=url).code == 0
    mine = tmp_path / "job.results.jsonl"
    mine.write_text("precious\n")
    done = run("watch_batch.py", job, *FAST, base_url=url)
    assert done.code == 1
    assert mine.read_text() == "precious\n"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"nonsense\n", "invalid_json_line"),
        (b'{"a": NaN}\n', "invalid_json_line"),
        (b"[]\n", "invalid_json_line"),
        (b"\xff\n", "invalid_utf8"),
        (b"[" * 100_000 + b"\n", "invalid_json_line"),
        (chat_line("i" * 65, "x"), "invalid_custom_id"),
        (chat_line("fine", "x"), "duplicate_custom_id"),
        (chat_line("s", "x", stream=True), "streaming_unsupported"),
        (chat_line("s", "x", model=""), "missing_required_parameter"),
        (chat_line("s", "x").replace(b"POST", b"GET"), "invalid_method"),
        (chat_line("s", "x").replace(b"/v1/chat/completions", b"/v1/no"), "invalid_url"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_sent(tmp_path: Path, line: bytes, code: str) -> None:
    job = tmp_path / "job.jsonl"
    job.write_bytes(chat_line("fine", "x") + b"\n" + line)
    checked = run("validate_batch_file.py", job, "--json")
    assert checked.code == 2
    assert [(problem["line"], problem["code"]) for problem in checked.json["problems"]] == [(3, code)]
    done = run("submit_batch.py", job, base_url="http://127.0.0.1:9")
    assert done.code == 2
    assert f"{job}:3:" in done.stderr


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        ("", (), "there is no request"),
        ("no json\n", (), "line 1 is not JSON"),
        ('{"text": "x"}\n', (), "--template"),
        ('{"text": "x"}\n', ("--template", "{{other}}"), "has no 'other'"),
        ('{"text": "x"}\n', ("--template", "Say {text}"), "write {{text}}"),
        ('{"prompt": "x"}\n', (), "--model"),
        (
            '{"prompt": "x", "custom_id": "a"}\n{"prompt": "y", "custom_id": "a"}\n',
            ("--model", "m"),
            "the same custom_id",
        ),
    ],
)
def test_a_bad_input_makes_no_file(tmp_path: Path, content: str, arguments: tuple[str, ...], said: str) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(content)
    done = run("create_batch_file.py", output, "--input", source, *arguments)
    assert done.code == 2
    assert said in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_table_that_is_not_utf8_is_told_with_what_mends_it(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(b"text\ncaf\xe9\n")
    done = run(
        "create_batch_file.py", tmp_path / "out.jsonl", "--input", source, "--model", "m", "--template", "{{text}}"
    )
    assert done.code == 2
    assert "iconv" in done.stderr


def test_many_requests_are_split(tmp_path: Path) -> None:
    rows = b'{"prompt": "x"}\n' * 50_001
    refused = run("create_batch_file.py", tmp_path / "out.jsonl", "--input", "-", "--model", "m", stdin=rows)
    assert refused.code == 2
    assert "--split" in refused.stderr
    done = run("create_batch_file.py", tmp_path / "out.jsonl", "--input", "-", "--model", "m", "--split", stdin=rows)
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(Path(part["file"]).name, part["requests"]) for part in made] == [
        ("out-1.jsonl", 50_000),
        ("out-2.jsonl", 1),
    ]


def test_memory_stays_flat_whatever_the_file(served: tuple[Process, Process], tmp_path: Path) -> None:
    """Validating and uploading 60 MB takes hardly more memory than a small file."""
    peaks = []
    for count in (1, 60):
        job = tmp_path / f"{count}.jsonl"
        with job.open("wb") as file:
            for number in range(count):
                file.write(chat_line(f"r{number}", "x" * 1_000_000))
        code = (
            "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
        )
        script = command("submit_batch.py", job)
        done = subprocess.run(
            [*script[:-2], "-c", code, *script[-2:]],
            env=environment(f"{served[0].url}/v1"),
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stderr.split()[-1]))
    assert peaks[1] - peaks[0] < 12_000, peaks  # KiB


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    job = tmp_path / "job.jsonl"
    job.write_bytes(fake_requests(2))
    manners = Manners(finish=threading.Event())
    with FakeServer(manners) as fake:
        manners.finish.clear()
        assert run("submit_batch.py", job, base_url=fake.base_url).code == 0
        process = subprocess.Popen(
            command("watch_batch.py", job, *FAST), env=environment(fake.base_url), stderr=subprocess.PIPE, text=True
        )
        fake.wait_until(lambda: fake.count("GET", "/v1/batches/.*") >= 2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the same command follows it again" in said


def test_single_calls(served: tuple[Process, Process], tmp_path: Path) -> None:
    url = f"{served[0].url}/v1"
    job = tmp_path / "job.jsonl"
    job.write_bytes(chat_line("slow", "[[simulate latency=60s]]"))
    assert run("manage_batches.py", "status", job, base_url=url).code == 1
    id = run("submit_batch.py", job, base_url=url).json["batch_id"]
    assert run("manage_batches.py", "status", job, base_url=url).json["id"] == id
    assert run("manage_batches.py", "list", "--limit", "1", base_url=url).json["data"][0]["id"] == id
    assert run("manage_batches.py", "cancel", id, base_url=url).json["status"] == "cancelling"
    watched = run("watch_batch.py", job, *FAST, base_url=url)
    assert (watched.code, watched.json["status"], watched.json["error_lines"]) == (4, "cancelled", 1)
    assert run("manage_batches.py", "models", base_url=url).json["object"] == "list"
    assert run("manage_batches.py", "cancel", base_url=url).code == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("submit_batch.py", "."), "directory"),
        (("submit_batch.py", "missing"), "missing: No such file"),
        (("submit_batch.py", "job.jsonl", "--metadata", "x"), "NAME=VALUE"),
        (("submit_batch.py", "job.jsonl", "--base-url", "nonsense"), "must look like https"),
        (("submit_batch.py", "job.jsonl", "--api-key-env", "NOT_SET"), "NOT_SET"),
        (("submit_batch.py", "job.jsonl", "--state", "job.jsonl"), "not a state file"),
        (("submit_batch.py",), "required"),
        (("watch_batch.py", "."), "has not been submitted"),
        (("watch_batch.py", "/"), "has not been submitted"),
        (("watch_batch.py", "job.jsonl"), "has not been submitted"),
        (("retry_failed.py", "missing"), "run watch_batch.py first"),
        (("validate_batch_file.py", "."), "directory"),
        (("create_batch_file.py", "."), "is a folder"),
        (("watch_batch.py", "id", "-o", "."), "is a folder"),
        (("create_batch_file.py", "no/such/folder.jsonl"), "No such file"),
        (("create_batch_file.py", "out.jsonl", "--set", "x"), "NAME=JSON"),
        (("create_batch_file.py", "out.jsonl", "--input", "missing.csv"), "missing.csv: No such file"),
        (("manage_batches.py", "status", "."), "has not been submitted"),
        (("manage_batches.py", "list", "job.jsonl"), "take none"),
    ],
)
def test_wrong_arguments_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.jsonl").write_bytes(chat_file(1))
    done = run(*arguments, base_url="http://127.0.0.1:9")
    assert done.code == 1, done.stderr
    assert said in done.stderr
    assert not done.stdout
