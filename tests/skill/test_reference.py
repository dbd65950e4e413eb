"""The published text of the skill: each of its commands and scripts runs, as written but for the host and the key."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from batchery.server.openapi import document
from tests.processes import server, simulator, wait_for
from tests.skill.scripts import SKILL, environment

MODEL = "anthropic/claude-3-5-sonnet"
# What the published page tells people to type, word for word.
UPLOAD = """curl https://api.doubleword.ai/v1/files \\
  -H "Authorization: Bearer $DOUBLEWORD_API_KEY" \\
  -F purpose="batch" \\
  -F file="@batch_requests.jsonl\""""
CREATE = """curl https://api.doubleword.ai/v1/batches \\
  -H "Authorization: Bearer $DOUBLEWORD_API_KEY" \\
  -H "Content-Type: application/json" \\
  -d '{
    "input_file_id": "file-abc123",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h"
  }'"""
STATUS = """curl https://api.doubleword.ai/v1/batches/batch-xyz789 \\
  -H "Authorization: Bearer $DOUBLEWORD_API_KEY\""""
RESULTS = """curl https://api.doubleword.ai/v1/files/file-output123/content \\
  -H "Authorization: Bearer $DOUBLEWORD_API_KEY" \\
  > results.jsonl"""
ERRORS = """curl https://api.doubleword.ai/v1/files/file-error123/content \\
  -H "Authorization: Bearer $DOUBLEWORD_API_KEY" \\
  > errors.jsonl"""
LIST = """curl https://api.doubleword.ai/v1/batches?limit=10 \\
  -H "Authorization: Bearer $DOUBLEWORD_API_KEY\""""
CANCEL = """curl https://api.doubleword.ai/v1/batches/batch-xyz789/cancel \\
  -X POST \\
  -H "Authorization: Bearer $DOUBLEWORD_API_KEY\""""
PROCESS = """import json

with open('results.jsonl') as f:
    for line in f:
        result = json.loads(line)
        custom_id = result['custom_id']
        content = result['response']['body']['choices'][0]['message']['content']
        print(f"{custom_id}: {content}")
"""
PARTIAL = """import requests

response = requests.get(
    'https://api.doubleword.ai/v1/files/file-output123/content',
    headers={'Authorization': f'Bearer {api_key}'}
)

if response.headers.get('X-Incomplete') == 'true':
    last_line = int(response.headers.get('X-Last-Line', 0))
    print(f"Batch incomplete. Processed {last_line} requests so far.")
    # Continue polling and download again later
"""
RETRY = """import json

failed_ids = []
with open('errors.jsonl') as f:
    for line in f:
        error = json.loads(line)
        failed_ids.append(error['custom_id'])

print(f"Failed requests: {failed_ids}")
# Create new batch with only failed requests
"""


class Shell:
    """Runs what the page says in a folder, with the page's placeholders standing for the real things."""

    def __init__(self, folder: Path, base_url: str, key: str) -> None:
        self.folder, self.base_url, self.key = folder, base_url, key
        self.names: dict[str, str] = {"https://api.doubleword.ai": base_url}

    def _real(self, text: str) -> str:
        for name, value in self.names.items():
            text = text.replace(name, value)
        return text

    def bash(self, text: str) -> str:
        done = subprocess.run(
            ["bash", "-euc", self._real(text)],
            cwd=self.folder,
            env=os.environ | {"DOUBLEWORD_API_KEY": self.key},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def object(self, text: str) -> Any:
        return json.loads(self.bash(text))

    def python(self, text: str) -> str:
        before = f"api_key = {self.key!r}\n"
        done = subprocess.run(
            [sys.executable, "-c", before + self._real(text)],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def new_key(folder: Path) -> str:
    made = subprocess.run(
        [sys.executable, "-m", "batchery", "keys", "create", "--data-dir", str(folder / "data")],
        check=True,
        capture_output=True,
        text=True,
    )
    return made.stdout.strip()


def ended(shell: Shell) -> dict[str, Any]:
    def look() -> Any:
        batch = shell.object(STATUS)
        return batch if batch["status"] in ("completed", "failed", "expired", "cancelled") else None

    found: dict[str, Any] = wait_for(look, 30, "the end of the batch")
    return found


def test_the_five_steps_and_the_patterns(tmp_path: Path) -> None:
    with simulator(tmp_path, "--models", MODEL) as upstream, server(tmp_path, upstream.url) as process:
        shell = Shell(tmp_path, process.url, new_key(tmp_path))
        made = subprocess.run(
            [sys.executable, "-I", "-S", str(SKILL / "scripts" / "create_batch_file.py"), "batch_requests.jsonl"],
            cwd=tmp_path,
            env=environment(),
            check=False,
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stderr
        failing = {"role": "user", "content": "[[simulate status=400]]"}
        with (tmp_path / "batch_requests.jsonl").open("a") as file:
            line = {"custom_id": "bad-1", "method": "POST", "url": "/v1/chat/completions"}
            file.write(json.dumps(line | {"body": {"model": MODEL, "messages": [failing]}}) + "\n")
        shell.names["file-abc123"] = shell.object(UPLOAD)["id"]
        created = shell.object(CREATE)
        shell.names["batch-xyz789"] = created["id"]
        shell.names["file-output123"] = created["output_file_id"]
        batch = ended(shell)
        assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 3, "completed": 2, "failed": 1})
        shell.bash(RESULTS)
        shell.names["file-error123"] = batch["error_file_id"]
        shell.bash(ERRORS)
        lines = shell.python(PROCESS).splitlines()
        assert sorted(line.split(":")[0] for line in lines) == ["req-1", "req-2"]
        assert shell.python(RETRY) == "Failed requests: ['bad-1']\n"
        assert shell.python(PARTIAL) == ""
        assert [row["id"] for row in shell.object(LIST)["data"]] == [created["id"]]
        assert shell.bash(CANCEL).count("error") >= 1  # a finished batch cannot be cancelled


def test_early_results_and_cancelling(tmp_path: Path) -> None:
    with simulator(tmp_path, "--models", MODEL) as upstream, server(tmp_path, upstream.url) as process:
        shell = Shell(tmp_path, process.url, new_key(tmp_path))
        rows = [f"[[simulate latency={'60s' if number else '0'}]]" for number in range(2)]
        (tmp_path / "batch_requests.jsonl").write_text(
            "".join(
                json.dumps(
                    {
                        "custom_id": f"user-123-question-{number}",
                        "method": "POST",
                        "url": "/v1/chat/completions",
                        "body": {"model": MODEL, "messages": [{"role": "user", "content": row}]},
                    }
                )
                + "\n"
                for number, row in enumerate(rows)
            )
        )
        shell.names["file-abc123"] = shell.object(UPLOAD)["id"]
        created = shell.object(CREATE)
        shell.names["batch-xyz789"] = created["id"]
        shell.names["file-output123"] = created["output_file_id"]
        wait_for(lambda: "Processed 1 requests" in shell.python(PARTIAL), 30, "the early result")
        assert shell.object(CANCEL)["status"] in ("cancelling", "cancelled")
        assert ended(shell)["status"] == "cancelled"
        shell.bash(RESULTS)
        assert shell.python(PROCESS).startswith("user-123-question-0: ")


def test_every_endpoint_is_in_the_api_reference() -> None:
    page = (SKILL / "references" / "api_reference.md").read_text()
    for path, item in document()["paths"].items():
        for method in item:
            if path.startswith("/v1/"):
                assert re.search(re.escape(f"`{method.upper()} {path}`"), page), f"{method.upper()} {path} is missing"


def test_what_is_here_is_what_the_skill_says() -> None:
    """The commands above are those of SKILL.md too, so that neither goes its own way."""

    def squeezed(text: str) -> str:
        return re.sub(r"\s+", " ", text).strip()

    page = squeezed((SKILL / "SKILL.md").read_text())
    for text in (UPLOAD, CREATE, STATUS, RESULTS, ERRORS, LIST, CANCEL, PROCESS, RETRY):
        assert squeezed(text) in page, text
