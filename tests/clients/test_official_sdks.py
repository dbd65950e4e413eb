"""The official SDKs, old and new, in Python and Node.js, through the whole flow against a real server with API keys."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import server, simulator

HERE = Path(__file__).parent
VENV = Path(sys.prefix)
MORE = 248  # with the two of the flow itself, 250 batches to page over


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """The base URL of a server that asks for a key, its data folder, and a folder for files."""
    folder = tmp_path_factory.mktemp("clients")
    with simulator(folder) as upstream, server(folder, upstream.url) as process:
        yield process.url, str(folder / "data"), folder


def new_key(data: str, owner: str) -> str:
    """A key of an owner with no batches yet."""
    made = subprocess.run(
        [sys.executable, "-m", "batchery", "keys", "create", "--data-dir", data, "--owner", owner],
        check=True,
        capture_output=True,
        text=True,
    )
    return made.stdout.strip()


def run(command: list[str], **environment: str) -> dict[str, Any]:
    """What a flow saw."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTHON"))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=clean | environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:] or done.stdout[-4000:]
    saw: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return saw


def check(saw: dict[str, Any]) -> None:
    """What every SDK must see."""
    assert saw["file"] == ["file", True, "input.jsonl", "batch", "processed"]
    assert saw["waited"] == "processed"
    assert saw["same bytes"] is True
    assert saw["created"] == ["batch", "validating", {"job": "flow"}, True]
    assert saw["ended"] == ["completed", 3, 2, 1]
    assert saw["headers"] == ["2", "false"]
    assert saw["output"] == ["r0", "r1"]
    assert saw["error line"] == ["r2", 400, ["code", "message"]]
    errors = {name: saw[name] for name in saw if isinstance(saw[name], dict) and "class" in saw[name]}
    assert all(error.pop("request_id") for error in errors.values())
    assert {name: (error["class"], error["status"]) for name, error in errors.items()} == {
        "cancel finished": ("ConflictError", 409),
        "unknown batch": ("NotFoundError", 404),
        "unknown file": ("NotFoundError", 404),
        "bad window": ("BadRequestError", 400),
        "wrong key": ("AuthenticationError", 401),
        "gone": ("NotFoundError", 404),
    }
    assert (errors["bad window"]["param"], errors["unknown file"]["param"]) == ("completion_window", "id")
    assert saw["failed"] == ["failed", "invalid_json_line", 1]
    assert saw["paged"] == [250, 250, True]
    assert saw["empty page"] == 0
    assert saw["uploaded"] == ["pending", "completed", True]
    assert saw["deleted"] is True


def test_newest_python_sdk(served: tuple[str, str, Path]) -> None:
    url, data, _ = served
    saw = run([sys.executable, str(HERE / "flow.py"), f"{url}/v1", new_key(data, "python-new"), str(MORE)])
    check(saw)
    assert int(saw["version"].split(".")[0]) >= 2
    assert saw["unnamed"] == "upload"
    assert saw["chunked parts"] is True
    assert saw["stream"] == [True, 3600]


def test_python_sdk_1_40(served: tuple[str, str, Path]) -> None:
    """The oldest that people still have: it pages until a page is empty."""
    url, data, _ = served
    saw = run(
        [sys.executable, "-S", str(HERE / "flow.py"), f"{url}/ai/v1", new_key(data, "python-old"), str(MORE)],
        PYTHONPATH=str(VENV / "openai-1.40"),
    )
    check(saw)
    assert saw["version"] == "1.40.0"


def test_newest_node_sdk(served: tuple[str, str, Path], tmp_path: Path) -> None:
    url, data, _ = served
    flow = VENV / "node" / "flow.mjs"  # modules are looked for from the file's own folder upwards
    shutil.copyfile(HERE / "node" / "flow.mjs", flow)
    saw = run([str(VENV / "bin" / "node"), str(flow), f"{url}/v1", new_key(data, "node"), str(MORE), str(tmp_path)])
    check(saw)
    assert (saw["expires"], saw["buffer"]) == (3600, "b.jsonl")
