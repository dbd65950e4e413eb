"""docs/commands: a page for each command, with its options, whose examples run and answer what it says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from batchery.cli import main
from scripts.command_pages import PAGES, RENEW, all_commands, parameters_of, parts_of, with_options
from tests.cli.test_run import SETTINGS
from tests.docs.examples import Runner, examples_of
from tests.engine.llama import write_model
from tests.processes import server, simulator

DOCS = PAGES.parent
NOT_RUN = ("worker",)
"""Its example needs more machines; all other pages have one that runs."""


@cache
def command(name: str) -> Any:
    return all_commands()[name]


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server to try things on, as docs/commands/README.md has it; pages do not get into each other's way there."""
    folder = tmp_path_factory.mktemp("server")
    with ExitStack() as stack:
        upstream = stack.enter_context(simulator(folder, "--models", "my-model"))
        yield stack.enter_context(server(folder, upstream.url, "--cancel-grace", "1")).url


def test_there_is_a_page_for_each_command_and_no_other() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} - {"README"} == set(main.COMMANDS)


@pytest.mark.parametrize("name", main.COMMANDS)
def test_a_page_has_the_options_of_its_command(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text()
    assert with_options(page, name, command(name)) == page, f"docs/commands/{name}.md is out of date: {RENEW}"


def test_an_option_that_is_missing_or_other_is_found() -> None:
    page = (PAGES / "sample.md").read_text()
    row = re.search(r"^\| `--rows`.*\n", page, re.MULTILINE)
    assert row is not None
    for wrong in (page.replace(row[0], ""), page.replace(row[0], row[0] * 2), page.replace("`10`", "`11`")):
        assert wrong != page
        assert with_options(wrong, "sample", command("sample")) == page
    with pytest.raises(ValueError, match="Options"):
        with_options(page.replace("## Options", "## Other"), "sample", command("sample"))


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_option_is_there_and_explained(name: str) -> None:
    options = (PAGES / f"{name}.md").read_text().partition("\n## Options\n")[2].partition("\n## ")[0]
    for title, part in parts_of(name, command(name)).items():
        section = options.partition(f"### {title}\n")[2].partition("\n### ")[0] or options
        for one in parameters_of(part):
            assert one.help, f"{one.name} of {title} does not say what it is"
            shown = one.opts if one.param_type_name == "option" else [one.metavar.replace("|", r"\|")]
            assert all(f"`{text}`" in section for text in shown), f"{shown} of {title}: {RENEW}"
        for one in part.params:
            if getattr(one, "hidden", False):
                assert f"`{one.opts[0]}`" not in section


@pytest.mark.parametrize("name", main.COMMANDS)
def test_a_page_has_its_parts(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text()
    assert page.startswith(f"# batchery {name}\n\n")
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert headings[-2:] in (["Options", "See also"], ["Exit codes", "See also"])
    assert "Options" in headings
    assert "client.md#exit-codes" in page or "Exit codes" in headings
    first = re.search(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert first is not None
    assert first.start() < page.index("\n## "), "an example comes first"
    assert f"batchery {name}" in first[2] or name in ("retry", "batches"), "the first example is of the command"
    runs = [example for example in examples_of(page) if f"batchery {name}" in example.command]
    assert bool(runs) == (name not in NOT_RUN)
    for sub in getattr(command(name), "commands", {}):
        said = page.partition("\n## Options\n")[0]
        assert f"`{sub}`" in said or f"batchery {name} {sub}" in said, f"what batchery {name} {sub} is for"


@pytest.mark.parametrize("name", [name for name in main.COMMANDS if name not in NOT_RUN])
def test_every_example_of_a_page_answers_what_it_says(
    name: str, server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "work"
    folder.mkdir()
    if name == "llama":
        write_model(folder / "model.gguf")
    assert shutil.which("curl")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    home = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    runner = Runner(folder, home | {"PATH": path, "BATCHERY_BASE_URL": server_url})
    for example in examples_of((PAGES / f"{name}.md").read_text()):
        runner.run(example)


def test_the_index_has_the_groups_of_the_help() -> None:
    index = (PAGES / "README.md").read_text()
    for title, names in main.GROUPS.items():
        section = index.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        assert tuple(re.findall(r"^- \[([\w-]+)\]\(\1\.md\): .", section, re.MULTILINE)) == names, title


def test_commands_that_are_shown_and_not_run_have_these_options() -> None:
    checked = 0
    for path in (*DOCS.rglob("*.md"), DOCS.parent / "README.md"):
        for block in re.findall(r"^```sh\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if re.search(r"batchery \w", line):
                    checked += 1
                    _check_options(shlex.split(line.replace("...", "x"), comments=True), f"{path.name}: {line}")
    assert checked > 20


def _check_options(words: list[str], where: str) -> None:
    """Looks at `batchery NAME ...` wherever it begins in a line, up to what belongs to the shell."""
    for place, word in enumerate(words):
        if Path(word).name == "batchery" and words[place + 1 : place + 2] and words[place + 1] in main.COMMANDS:
            name, *rest = words[place + 1 :]
            parts = parts_of(name, command(name))
            part = parts.get(f"batchery {name} {rest[0]}" if rest and len(parts) > 1 else f"batchery {name}")
            assert part is not None, where
            known = {option for one in part.params for option in one.opts} | {"--help"}
            for text in rest:
                if text in ("|", "&&", ">", ">>", "&", ";"):
                    break
                if text.startswith("-") and text != "-":
                    assert text.partition("=")[0] in known, f"{where}: no {text}"
