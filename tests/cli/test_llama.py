"""`batchery llama`: a real llama.cpp over a tiny GGUF model, alone and beneath a job."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine.llama import WIDTH, write_model
from tests.processes import Process, wait_for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_model(path)
    return path


def batchery(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "batchery", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def ask(url: str, path: str, body: dict[str, Any] | None = None, key: str = "") -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=30) as answer:
        return json.load(answer)


def test_a_job_over_a_local_model(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say something about number {n}."} for n in range(24)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ("run", "in.jsonl", "-o", "out.jsonl", "-m", "tiny", "--max-tokens", "4", "--upstream", str(model))
    done = batchery(*run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [outcome["status"] for outcome in outcomes] == ["ok"] * 24
    assert {outcome["response"]["body"]["usage"]["completion_tokens"] for outcome in outcomes} <= {1, 2, 3, 4}
    assert "SIMULATED" not in done.stderr


def test_its_name_its_key_and_its_end(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_KEY", "secret")
    process = Process(
        ["llama", str(model), "--port", "0", "--name", "small", "--api-key-env", "MODEL_KEY", "--parallel", "2"],
        tmp_path / "log",
    )
    try:
        assert [each["id"] for each in ask(process.url, "/v1/models", key="secret")["data"]] == ["small"]
        body = {"model": "small", "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]}
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(process.url, "/v1/chat/completions", body)
        assert refused.value.code == 401
        assert ask(process.url, "/v1/chat/completions", body, "secret")["usage"]["completion_tokens"] <= 2
    finally:
        code = process.stop()
    assert code == 0
    assert not psutil.pid_exists(process.pid) or wait_for(lambda: not psutil.pid_exists(process.pid))


def test_embeddings(model: Path, tmp_path: Path) -> None:
    process = Process(["llama", str(model), "--port", "0", "--embeddings"], tmp_path / "log")
    try:
        answer = ask(process.url, "/v1/embeddings", {"model": "tiny", "input": "hello"})
        assert len(answer["data"][0]["embedding"]) == WIDTH
    finally:
        process.stop()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), (b"PK\x03\x04", "is not a GGUF model"), (b"GGUF" + b"\0" * 64, "llama.cpp cannot serve")],
)
def test_what_is_no_model_is_told(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "bad.gguf").write_bytes(content)
    done = batchery("llama", "bad.gguf", "--port", "0", cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    done = batchery("run", "in.jsonl", "-o", "out.jsonl", "-m", "m", "--upstream", "bad.gguf", cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()
