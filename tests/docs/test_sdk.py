"""docs/sdk.md: its Python runs as a newcomer would run it, in order, and prints what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from batchery.cli.main import COMMANDS
from tests.processes import server
from tests.sdk.receiving import JsonModel

PAGE = Path(__file__).parents[2] / "docs" / "sdk.md"
_BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_RUNNER = """
import contextlib, io, json, sys
names = {"__name__": "page"}
told = []
for block in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block, "docs/sdk.md", "exec"), names)
    told.append(out.getvalue())
print(json.dumps(told))
"""


def test_every_snippet_runs_and_prints_what_the_page_says(tmp_path: Path) -> None:
    import json

    blocks: list[tuple[str, str | None]] = []
    for kind, text in _BLOCK.findall(PAGE.read_text()):
        if kind == "python":
            blocks.append((text, None))
        else:
            blocks[-1] = (blocks[-1][0], text)
    assert len(blocks) >= 10
    with JsonModel() as model, server(tmp_path, model.url) as process:
        done = subprocess.run(
            [sys.executable, "-c", _RUNNER],
            input=json.dumps([code for code, _ in blocks]),
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={"BATCHERY_BASE_URL": process.url, "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            check=False,
        )
    assert done.returncode == 0, done.stderr
    for (code, wanted), printed in zip(blocks, json.loads(done.stdout), strict=True):
        if wanted is not None:
            assert printed == wanted, code


def test_every_option_of_the_proxy_on_the_page_exists() -> None:
    assert "proxy" in COMMANDS
    shown = set(re.findall(r"batchery proxy((?: --[a-z-]+ \S+)+)", PAGE.read_text()))
    options = {option for text in shown for option in re.findall(r"--[a-z-]+", text)}
    assert options
    done = subprocess.run(
        [sys.executable, "-m", "batchery", "proxy", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin", "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert not {option for option in options if option not in done.stdout}
