"""docs/api.md: every command runs and answers what the page says, and no endpoint is missing from it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from batchery.server.openapi import document
from tests.docs.examples import Runner, examples_of
from tests.processes import server, simulator

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_every_example_answers_what_the_page_says(tmp_path: Path) -> None:
    with simulator(tmp_path, "--models", "example-model") as upstream, server(tmp_path, upstream.url) as process:
        made = subprocess.run(
            [sys.executable, "-m", "batchery", "keys", "create", "--data-dir", str(tmp_path / "data")],
            check=True,
            capture_output=True,
            text=True,
        )
        folder = tmp_path / "work"
        folder.mkdir()
        environment = {"BATCHERY_BASE_URL": f"{process.url}/v1", "BATCHERY_API_KEY": made.stdout.strip()}
        runner = Runner(folder, environment)
        examples = examples_of(PAGE.read_text())
        assert examples
        for example in examples:
            runner.run(example)


def test_every_endpoint_is_called_under_its_heading() -> None:
    sections = dict(re.findall(r"^### `([A-Z]+ [^`]+)`\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    described = {
        f"{method.upper()} {path}": (method.upper(), path)
        for path, item in document()["paths"].items()
        for method in item
    }
    assert described.keys() <= sections.keys()
    for heading, (method, path) in described.items():
        calls = [
            example
            for example in examples_of(sections[heading])
            for call in re.findall(r"curl (?:\\\n|[^|\n])+", example.command)
            if _called_path(path).search(call) and _method(call) == method
        ]
        assert calls, f"no command under {heading} calls it"
        assert all(example.answer.strip() for example in calls), f"a command under {heading} shows no answer"


def _called_path(path: str) -> re.Pattern[str]:
    """How a command names this path: after the base URL, with ids or variables where the path has a name."""
    under = path.removeprefix("/v1")
    base = r"\$BATCHERY_BASE_URL" if path != under else r"\$\{BATCHERY_BASE_URL%/v1\}"
    return re.compile(base + re.sub(r"\\{\w+\\}", r"[\\w$-]+", re.escape(under)) + r"""(?=["'?\s])""")


def _method(call: str) -> str:
    named = re.search(r"-X (\w+)", call)
    if named:
        return named[1]
    return "POST" if re.search(r" (?:-F|-d|--json|--data\S*) ", call) else "GET"
