"""`batchery run` against servers that differ: as strict as OpenAI, as odd as Doubleword, and broken. Every job that can
be finished is, and of the others the reason is told.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from batchery.cli import main
from batchery.client import carry_out, follow
from batchery.client.http import Api
from batchery.client.retry import Patience
from tests.cli.test_run import NAMES, ROWS, SETTINGS
from tests.client.fake_server import FakeServer, Manners, custom_ids, requests

OPENAI: dict[str, Any] = {
    "early": False,
    "numbered": False,
    "idempotent": False,
    "honours_wait": False,
    "validating": 60,
    "windows": ("24h",),
}
DOUBLEWORD: dict[str, Any] = {
    "bare_ids": True,
    "created": 201,
    "plain_errors": True,
    "skip_only": True,
    "idempotent": False,
    "honours_wait": False,
    "windows": ("1h", "24h"),
}
BROKEN: dict[str, Any] = {"idempotent": False, "repeats": True}
BREAKS = [0, 200, None, 70]


def troubles() -> list[tuple[str, str, int, dict[str, str]]]:
    return [
        ("POST", "/v1/files", 500, {}),
        ("POST", "/v1/batches", 429, {"Retry-After": "0"}),
        ("POST", "/v1/batches", 503, {"Retry-After": "0"}),
        ("GET", "/v1/batches/.*", 502, {}),
        ("GET", "/v1/batches/.*", 429, {"Retry-After": "0"}),
        ("GET", "/v1/files/.*/content", 500, {}),
        ("GET", "/v1/files/.*/content", 429, {"Retry-After": "0"}),
    ]


SERVERS = [
    pytest.param(OPENAI, id="as strict as OpenAI"),
    pytest.param(DOUBLEWORD, id="as odd as Doubleword"),
    pytest.param(BROKEN, id="broken"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".none"))
    monkeypatch.setattr(follow, "pause_between_polls", lambda *_, **__: 0.005)
    monkeypatch.setattr(carry_out, "Api", functools.partial(Api, patience=Patience(first=0.005, total=2.0)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(requests(ROWS))
    return tmp_path


def serve(manners: dict[str, Any], **more: Any) -> FakeServer:
    if manners is BROKEN:
        more |= {"troubles": troubles(), "breaks": list(BREAKS)}
    return FakeServer(Manners(**manners, **more))


def run(server: FakeServer, *arguments: str) -> Result:
    return CliRunner().invoke(
        main.build(["run"]), ["run", "in.jsonl", "-o", "out.jsonl", "--base-url", server.base_url, *arguments]
    )


def outcomes() -> dict[str, str]:
    rows = [json.loads(line) for line in Path("out.jsonl").read_bytes().split(b"\n") if line]
    assert [row["custom_id"] for row in rows] == NAMES
    return {row["custom_id"]: row["status"] for row in rows}


@pytest.mark.parametrize("manners", SERVERS)
def test_a_job_without_troubles_of_its_own(manners: dict[str, Any]) -> None:
    with serve(manners) as server:
        result = run(server)
        assert result.exit_code == 0, result.stderr
        assert len(server.batches) == 1
    assert set(outcomes().values()) == {"ok"}


@pytest.mark.parametrize("manners", SERVERS)
def test_failures_that_pass_and_failures_that_stay(manners: dict[str, Any]) -> None:
    with serve(manners, passing={"row-1", "row-4"}, failing={"row-7"}) as server:
        result = run(server)
        assert result.exit_code == 3, result.stderr
        assert len(server.batches) == 2
    assert "1 x 400 bad_prompt: no row-7" in result.stderr
    assert [name for name, status in outcomes().items() if status != "ok"] == ["row-7"]


@pytest.mark.parametrize("manners", SERVERS)
def test_an_expired_batch_with_a_part_of_its_results(manners: dict[str, Any]) -> None:
    with serve(manners, end="expired", never_run={"row-2", "row-3"}) as server:
        result = run(server)
        assert result.exit_code == 0, result.stderr
        (_, again) = server.files.values()
    assert custom_ids(again) == ["row-2", "row-3"]
    assert set(outcomes().values()) == {"ok"}


@pytest.mark.parametrize("manners", SERVERS)
@pytest.mark.parametrize("call", [("POST", "/v1/files"), ("POST", "/v1/batches")])
def test_an_answer_that_is_lost_makes_no_second_batch(manners: dict[str, Any], call: tuple[str, str]) -> None:
    with serve(manners, lost_answers=[call]) as server:
        assert run(server).exit_code == 0
        assert len(server.batches) == 1


@pytest.mark.parametrize("manners", SERVERS)
def test_what_is_cancelled_elsewhere_is_told_and_its_results_kept(manners: dict[str, Any]) -> None:
    with serve(manners, end="cancelled", never_run={"row-2", "row-3"}) as server:
        result = run(server)
    assert result.exit_code == 4
    assert "Cancelled: 10 ok, 0 failed, 2 not run" in result.stderr
    assert [name for name, status in outcomes().items() if status != "ok"] == ["row-2", "row-3"]


def test_a_window_that_is_not_offered_is_told_with_those_that_are() -> None:
    with serve(OPENAI) as server:
        result = run(server, "--window", "1h")
        assert not server.batches
        assert result.exit_code == 1
        assert "Say --window with one of: 24h" in result.stderr
        again = run(server, "--window", "24h")
        assert again.exit_code == 0, again.stderr
        (batch,) = server.batches.values()
        assert (batch["completion_window"], server.count("POST", "/v1/files")) == ("24h", 1)


def test_a_deadline_takes_a_window_that_is_offered() -> None:
    with serve(OPENAI) as server:
        result = run(server, "--within", "4h")
        (batch,) = server.batches.values()
    assert batch["completion_window"] == "24h"
    assert result.exit_code == 0
    assert "no window it offers ends before the deadline" in result.stderr


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "message"),
    [
        ("POST", "/v1/files", 401, 5, "trouble 401"),
        ("POST", "/v1/files", 413, 1, "trouble 413"),
        ("POST", "/v1/batches", 402, 5, "trouble 402"),
        ("POST", "/v1/batches", 400, 1, "trouble 400"),
        ("POST", "/v1/batches", 500, 6, "trouble 500"),
        ("GET", "/v1/batches/.*", 500, 6, "trouble 500"),
        ("GET", "/v1/files/.*/content", 404, 1, "trouble 404"),
        ("GET", "/v1/files/.*/content", 500, 6, "trouble 500"),
    ],
)
@pytest.mark.parametrize("manners", [pytest.param(OPENAI, id="OpenAI"), pytest.param(DOUBLEWORD, id="Doubleword")])
def test_why_a_job_cannot_be_finished_is_told_and_it_can_be_gone_on_with(
    manners: dict[str, Any], method: str, path: str, status: int, code: int, message: str
) -> None:
    with FakeServer(Manners(**{**manners, "validating": 0}, troubles=[(method, path, status, {})] * 400)) as server:
        result = run(server)
        assert result.exit_code == code, result.stderr
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        server.manners.troubles.clear()
        assert run(server).exit_code == 0
        assert len(server.batches) == 1
    assert set(outcomes().values()) == {"ok"}
