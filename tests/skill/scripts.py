"""Runs the skill's scripts as an agent would, but on the barest Python: isolated, and without site-packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SKILL = Path(__file__).parents[2] / "skills" / "doubleword-batches"
KEY = "sk-" + "k" * 43


def command(name: str, *arguments: str | Path) -> list[str]:
    """The command line of a script."""
    return [sys.executable, "-I", "-S", "-B", str(SKILL / "scripts" / name), *map(str, arguments)]


def environment(base_url: str = "", key: str = KEY) -> dict[str, str]:
    """What the scripts are told, and nothing else of ours."""
    found = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    return (
        found | ({"DOUBLEWORD_BASE_URL": base_url} if base_url else {}) | ({"DOUBLEWORD_API_KEY": key} if key else {})
    )


class Done:
    """How a script ended. Its output never has the key."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        assert KEY not in stdout + stderr
        assert "Traceback" not in stderr, stderr
        self.code, self.stdout, self.stderr = code, stdout, stderr

    @property
    def json(self) -> Any:
        """What it printed."""
        assert self.stdout, self.stderr
        return json.loads(self.stdout)


def run(name: str, *arguments: str | Path, base_url: str = "", key: str = KEY, stdin: bytes = b"") -> Done:
    """Run a script to its end."""
    done = subprocess.run(
        command(name, *arguments),
        env=environment(base_url, key),
        input=stdin,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())
