"""The commands around a running job, on a fake server: what they print where, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from batchery.cli import main
from batchery.client import follow
from tests.cli.test_run import NAMES, ROWS, SETTINGS
from tests.client.fake_server import FakeServer, Manners, custom_ids, requests

ONLINE = (
    "run",
    "stream",
    "watch",
    "status",
    "results",
    "retry",
    "cancel",
    "receipt",
    "files",
    "batches",
    "models",
    "doctor",
    "completion",
)
OPENAI = {"early": False, "numbered": False, "idempotent": False, "honours_wait": False}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".none"))
    monkeypatch.setattr(follow, "pause_between_polls", lambda *_, **__: 0.02)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(requests(ROWS))
    return tmp_path


def invoke(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(main.build(ONLINE), list(arguments), input=input)


def create(server: FakeServer) -> str:
    """A batch made by hand, through the raw commands."""
    at = ("--base-url", server.base_url, "--format", "json")
    (file,) = json.loads(invoke("files", "upload", "in.jsonl", *at).stdout)
    (batch,) = json.loads(invoke("batches", "create", file["id"], "--window", "1h", "--metadata", "a=b", *at).stdout)
    assert server.batches[batch["id"]]["metadata"]["a"] == "b"
    name: str = batch["id"]
    return name


def test_the_raw_api(folder: Path) -> None:
    with FakeServer() as server:
        batch_id = create(server)
        at = ("--base-url", server.base_url)
        assert invoke("files", "content", "file-0", *at).stdout_bytes == (folder / "in.jsonl").read_bytes()
        assert json.loads(invoke("files", "get", "file-0", *at).stdout)["purpose"] == "batch"
        assert [row["id"] for row in json.loads(invoke("files", "list", *at, "--format", "json").stdout)] == ["file-0"]
        assert json.loads(invoke("batches", "get", batch_id, *at).stdout)["completion_window"] == "1h"
        assert batch_id in invoke("batches", "list", *at).stdout
        assert json.loads(invoke("batches", "cancel", batch_id, *at, "--format", "jsonl").stdout)["id"] == batch_id
        assert json.loads(invoke("models", *at, "--format", "json").stdout) == [{"id": "m", "owned_by": "fake"}]
        assert invoke("files", "delete", "file-0", *at).exit_code == 0
        assert not server.files
        missing = invoke("files", "get", "file-9", *at)
    assert missing.exit_code == 1
    assert "does not exist (HTTP 404)" in missing.stderr


@pytest.mark.parametrize("format", ["table", "json", "jsonl", "csv"])
def test_status_of_a_job_and_of_an_id_are_the_same(format: str) -> None:
    with FakeServer(Manners(failing={"row-1"})) as server:
        invoke("run", "in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url)
        of_job = invoke("status", "out.jsonl", "--format", format)
        of_id = invoke("status", "batch_0", "--base-url", server.base_url, "--format", format)
    assert of_job.exit_code == 0, of_job.stderr
    assert of_job.stdout == of_id.stdout
    assert "batch_0" in of_job.stdout
    assert "completed" in of_job.stdout


def test_a_job_is_not_asked_for_at_another_server() -> None:
    with FakeServer() as server, FakeServer() as other:
        invoke("run", "in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url)
        result = invoke("status", "out.jsonl", "--base-url", other.base_url)
        assert not other.calls
    assert result.exit_code == 1
    assert "this job runs on" in result.stderr


@pytest.mark.parametrize(
    ("manners", "code"),
    [({}, 0), ({"failing": {"row-1"}}, 3), ({"end": "expired", "never_run": {"row-2"}}, 4), (OPENAI, 0)],
)
def test_watch_ends_with_the_batch(manners: dict[str, object], code: int) -> None:
    with FakeServer(Manners(**manners)) as server:  # type: ignore[arg-type]
        result = invoke("watch", create(server), "--base-url", server.base_url, "--format", "json")
    assert result.exit_code == code, result.stderr
    assert json.loads(result.stdout)[0]["total"] == ROWS
    assert f"{ROWS}/{ROWS} done" in result.stderr


@pytest.mark.parametrize("manners", [{}, OPENAI, {"skip_only": True}, {"breaks": [100, 300]}])
def test_stream_and_results_give_each_line_once(manners: dict[str, object]) -> None:
    with FakeServer(Manners(failing={"row-1"}, **manners)) as server:  # type: ignore[arg-type]
        batch_id = create(server)
        at = ("--base-url", server.base_url)
        streamed = invoke("stream", batch_id, *at)
        assert (streamed.exit_code, sorted(custom_ids(streamed.stdout_bytes))) == (3, sorted(NAMES))
        fetched = invoke("results", batch_id, *at)
        assert (fetched.exit_code, sorted(custom_ids(fetched.stdout_bytes))) == (3, sorted(NAMES))
        assert invoke("results", batch_id, *at, "-o", "kept.jsonl").exit_code == 3
    assert Path("kept.jsonl").read_bytes() == fetched.stdout_bytes


def test_results_of_a_running_batch_are_those_that_are_there() -> None:
    with FakeServer() as server:
        server.manners.finish.clear()
        batch_id = create(server)
        result = invoke("results", batch_id, "--base-url", server.base_url)
        assert 0 < len(custom_ids(result.stdout_bytes)) < ROWS
    assert result.exit_code == 0
    assert "1 still running" in result.stderr


def test_results_that_cannot_be_fetched_leave_no_part_of_them() -> None:
    with FakeServer(Manners(steps=1)) as server:
        batch_id = create(server)
        at = (batch_id, "--base-url", server.base_url, "-o", "kept.jsonl")
        server.manners.troubles = [("GET", "/v1/files/.*/content", 403, {})]
        assert invoke("results", *at).exit_code == 5
        assert not Path("kept.jsonl").exists()
        assert invoke("results", *at).exit_code == 0
    assert sorted(custom_ids(Path("kept.jsonl").read_bytes())) == sorted(NAMES)


def test_a_job_whose_batch_is_gone_says_what_can_be_done() -> None:
    with FakeServer(Manners(steps=1, failing={"row-1"})) as server:
        arguments = ("run", "in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url)
        assert invoke(*arguments).exit_code == 3
        server.batches.clear()
        result = invoke(*arguments)
    assert result.exit_code == 1
    assert "kept until --overwrite" in result.stderr
    assert sorted(custom_ids(Path("out.jsonl").read_bytes())) == sorted(NAMES)


def test_stream_runs_inputs_and_keeps_the_output() -> None:
    with FakeServer(Manners(failing={"row-3"})) as server:
        result = invoke("stream", "in.jsonl", "--base-url", server.base_url, "--retries", "0")
    assert result.exit_code == 3, result.stderr
    assert sorted(custom_ids(result.stdout_bytes)) == sorted(NAMES)
    assert custom_ids(Path("in.jsonl.results.jsonl").read_bytes()) == NAMES


@pytest.mark.parametrize("own_retry", [True, False])
def test_retry_of_a_batch(own_retry: bool) -> None:
    with FakeServer(Manners(passing={"row-2", "row-5"}, retries=own_retry)) as server:
        batch_id = create(server)
        at = ("--base-url", server.base_url)
        assert invoke("watch", batch_id, *at).exit_code == 3
        result = invoke("retry", batch_id, *at, "--format", "json")
        assert result.exit_code == 0, result.stderr
        (again,) = json.loads(result.stdout)
        assert (again["id"] == batch_id) is own_retry
        assert invoke("watch", again["id"], *at).exit_code == 0
        if not own_retry:
            assert set(custom_ids(server.files["file-1"])) == {"row-2", "row-5"}
            nothing = invoke("retry", again["id"], *at)
            assert (nothing.exit_code, "nothing to run again" in nothing.stderr) == (1, True)


@pytest.mark.parametrize("own_retry", [True, False])
def test_retry_of_a_job_makes_its_output_anew(own_retry: bool) -> None:
    (Path("in.csv")).write_text("text\nfox\nhen\n")
    with FakeServer(Manners(passing={"row-2"}, retries=own_retry)) as server:
        arguments = ("in.csv", "-o", "out.csv", "--base-url", server.base_url, "-m", "m", "-t", "Say {{text}}")
        assert invoke("run", *arguments, "--retries", "0").exit_code == 3
        assert "hen,row-2,failed" in Path("out.csv").read_text()
        result = invoke("retry", "out.csv")
    assert result.exit_code == 0, result.stderr
    assert "hen,row-2,ok" in Path("out.csv").read_text()
    assert "1 time run again" in invoke("receipt", "out.csv").stdout
    assert json.loads(invoke("receipt", "out.csv", "--format", "jsonl").stdout)["retries"] == 1
    assert invoke("receipt", "none.csv").exit_code == 1


def test_cancel_and_what_is_over_stays() -> None:
    with FakeServer(Manners(never_run={"row-11"})) as server:
        server.manners.finish.clear()
        batch_id = create(server)
        at = ("--base-url", server.base_url, "--format", "json")
        assert invoke("cancel", batch_id, *at).exit_code == 0
        assert invoke("watch", batch_id, *at).exit_code == 4
        (record,) = json.loads(invoke("cancel", batch_id, *at).stdout)
    assert record["status"] == "cancelled"


def test_doctor_says_what_is_in_order() -> None:
    with FakeServer(Manners(key="sk-good")) as server:
        arguments = ("doctor", "--base-url", server.base_url, "--format", "json")
        wrong = invoke(*arguments)
        assert wrong.exit_code == 5
        assert json.loads(wrong.stdout)[-1]["detail"] == "wrong key (HTTP 401)"
        Path("config.toml").write_text(f'[servers.work]\nbase_url = "{server.base_url}"\napi_key = "sk-good"\n')
        Path("config.toml").chmod(0o600)
        good = CliRunner(env={"BATCHERY_CONFIG": "config.toml"}).invoke(
            main.build(ONLINE), ["doctor", "--server", "work", "--format", "json"]
        )
    assert good.exit_code == 0, good.output
    found = {record["check"]: record for record in json.loads(good.stdout)}
    assert {record["state"] for record in found.values()} == {"ok"}
    assert found["reach and key"]["detail"] == "1 models"
    assert "sk-good" not in good.output


def test_doctor_on_nothing() -> None:
    result = invoke("doctor", "--base-url", "http://127.0.0.1:1")
    assert result.exit_code == 6
    assert "refused" in result.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script(shell: str) -> None:
    result = invoke("completion", shell)
    assert result.exit_code == 0
    assert "_BATCHERY_COMPLETE" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status"], "name the output of a job"),
        (["watch"], "name the output of a job"),
        (["retry"], "name the output of a job"),
        (["stream"], "name at least one INPUT"),
        (["status", "batch_1"], "no server to send to"),
        (["status", "none.jsonl", "--base-url", "http://127.0.0.1:1"], ".none.jsonl.batchery"),
        (["status", "batch_1", "--server", "none"], "there is no such server"),
        (["files", "upload", "none", "--base-url", "http://127.0.0.1:1"], "none does not exist"),
        (["batches", "create", "f", "--metadata", "x", "--base-url", "http://127.0.0.1:1"], "NAME=TEXT"),
    ],
)
def test_a_wrong_command_line_is_told_in_a_sentence(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
