"""docs/client.md: its examples run and answer what the page says, and no command, option or exit code is missing."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import typer.main

from batchery.cli import exit_codes, main
from tests.cli.test_run import SETTINGS
from tests.docs.examples import Runner, examples_of
from tests.processes import server, simulator

PAGE = Path(__file__).parents[2] / "docs" / "client.md"
SERVERS = ("serve", "worker", "keys", "simulate", "llama")
CLIENT = [name for name in main.COMMANDS if name not in SERVERS]


def test_every_example_answers_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "work"
    folder.mkdir()
    with simulator(tmp_path, "--models", "my-model") as upstream, server(tmp_path, upstream.url) as process:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        runner = Runner(folder, {"PATH": path, "XDG_CONFIG_HOME": str(tmp_path), "BATCHERY_BASE_URL": process.url})
        examples = examples_of(PAGE.read_text())
        assert len(examples) > 20
        for example in examples:
            runner.run(example)


@pytest.mark.parametrize("name", CLIENT)
def test_every_command_and_option_is_on_the_page(name: str) -> None:
    page = PAGE.read_text()
    assert f"\n### batchery {name}\n" in page
    command = typer.main.get_command(main.build([name, "doctor"])).commands[name]  # type: ignore[attr-defined]
    section = page.partition(f"\n### batchery {name}\n")[2].partition("\n### ")[0]
    subs = getattr(command, "commands", {})
    for sub in subs:
        assert f"`{sub}`" in section, f"batchery {name} {sub} is not in its section of docs/client.md"
    for each in (command, *subs.values()):
        for parameter in each.params:
            for option in parameter.opts:
                if option.startswith("--") and option != "--help":
                    assert option in page, f"{option} of batchery {name} is not in docs/client.md"


def test_the_exit_codes_are_those_of_the_page() -> None:
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    shown = PAGE.read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", shown, re.MULTILINE)} == codes
