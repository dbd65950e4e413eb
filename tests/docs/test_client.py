"""docs/client.md: its examples run and answer what the page says, and no command, input option or exit code is missing.
The options of each command are on its own page (`test_commands`).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from batchery.cli import exit_codes, main
from scripts.command_pages import all_commands
from tests.cli.test_run import SETTINGS
from tests.docs.examples import Runner, examples_of
from tests.processes import server, simulator

PAGE = Path(__file__).parents[2] / "docs" / "client.md"
CLIENT = [name for title, names in main.GROUPS.items() if title != "Serve" for name in names]


def test_every_example_answers_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "work"
    folder.mkdir()
    with simulator(tmp_path, "--models", "my-model") as upstream, server(tmp_path, upstream.url) as process:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        runner = Runner(folder, {"PATH": path, "XDG_CONFIG_HOME": str(tmp_path), "BATCHERY_BASE_URL": process.url})
        examples = examples_of(PAGE.read_text())
        assert len(examples) >= 3
        for example in examples:
            runner.run(example)


def test_every_command_of_the_client_is_linked() -> None:
    commands = PAGE.read_text().partition("\n## Commands\n")[2]
    for name in CLIENT:
        assert f"[{name}](commands/{name}.md)" in commands


def test_every_option_of_the_table_of_inputs_exists_and_none_is_missing() -> None:
    shown = PAGE.read_text().partition("\n## Inputs\n")[2].partition("\n## ")[0]
    made_by = {option for one in all_commands()["prepare"].params for option in one.opts if option.startswith("-")}
    assert set(re.findall(r"`(--?[a-z-]+)`", shown.partition("| option |")[2].partition("\n\n")[0])) == made_by - {
        "--output",
        "-o",
    }


def test_the_exit_codes_are_those_of_the_page() -> None:
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    shown = PAGE.read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", shown, re.MULTILINE)} == codes
