"""Writes what the pages in docs/commands say under `## Options`, from the definitions of the commands themselves.

    .venv/bin/python -m scripts.command_pages

It changes nothing else of a page, and makes no page: what a command is for, only people can say. A page without the
section, and a command without a page, it names and ends with 1. `tests/docs` looks whether the pages are up to date.
"""

from __future__ import annotations

import re
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import typer.main

from batchery.cli import main
from batchery.server.settings import Settings

PAGES = Path(__file__).parents[1] / "docs" / "commands"
RENEW = "run .venv/bin/python -m scripts.command_pages"
SETTINGS_READERS = ("serve", "worker", "keys")
"""Commands whose options are settings of the server, each of which is an environment variable, too."""
MOST = 2**62
"""A number over this is what the database can hold, and no bound that anybody meets."""

_SECTION = re.compile(r"^## Options\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_VALUES = {"str": "TEXT", "int": "N", "float": "NUMBER", "Path": "PATH"}


def all_commands() -> dict[str, Any]:
    """The commands by their names, as the parser has them."""
    commands: dict[str, Any] = typer.main.get_command(main.build()).commands  # type: ignore[attr-defined]
    return commands


def parts_of(name: str, command: Any) -> dict[str, Any]:
    """The command itself, or its subcommands, by how they are called: `batchery files list`."""
    subs = getattr(command, "commands", None)
    if subs is None:
        return {f"batchery {name}": command}
    return {f"batchery {name} {sub}": part for sub, part in subs.items()}


def parameters_of(command: Any) -> list[Any]:
    """The arguments and options that are shown, in the order of the help."""
    return [one for one in command.params if not getattr(one, "hidden", False)]


def with_options(page: str, name: str, command: Any) -> str:
    """The page with its options as they are.

    Args:
        page: its text.
        name: of the command.
        command: as the parser has it.

    Raises:
        ValueError: the page has no section for them, or several.
    """
    if len(_SECTION.findall(page)) != 1:
        raise ValueError(f"docs/commands/{name}.md must have one section '## Options'")
    parts = parts_of(name, command)
    tables = [
        (f"### {title}\n\n" if len(parts) > 1 else "") + _table(name, part) + "\n" for title, part in parts.items()
    ]
    section = "## Options\n\n" + "\n".join(tables)
    return _SECTION.sub(lambda match: section + ("" if match.end() == len(page) else "\n"), page)


def _table(name: str, command: Any) -> str:
    rows = [_row(name, command, one) for one in parameters_of(command)]
    head = ["option", "value", "default", "meaning", "variable"]
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    lines = [head, ["---"] * len(head), *([_cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |").replace("|  |", "| |") for line in lines)[:-1]


def _row(name: str, command: Any, one: Any) -> list[str]:
    is_argument = one.param_type_name == "argument"
    names = f"`{one.metavar or one.name.upper()}`" if is_argument else ", ".join(f"`{opt}`" for opt in one.opts)
    return [names, "" if is_argument else _value(one), _default(one), one.help or "", _variable(name, command, one)]


def _value(one: Any) -> str:
    if one.is_flag:
        return ""
    kind = one.type_descriptor.annotation
    value = one.metavar or _VALUES.get(getattr(kind, "__name__", ""))
    if value is None:
        value = "|".join(each.value for each in kind) if isinstance(kind, type) and issubclass(kind, Enum) else "TEXT"
    least, most = one.min, one.max
    if least is None:
        return f"`{value}`"
    return f"`{value}`, {f'at least {least}' if most is None or most > MOST else f'{least} to {most}'}"


def _default(one: Any) -> str:
    if one.required:
        return "needed"
    if isinstance(one.show_default, str):
        return one.show_default
    if one.default is None or one.default is False:
        return ""
    if isinstance(one.default, float):
        return f"`{one.default:g}`"
    return f"`{one.default.value if isinstance(one.default, Enum) else one.default}`"


def _variable(name: str, command: Any, one: Any) -> str:
    if one.param_type_name == "argument":
        return ""
    prefix = (command.context_settings or {}).get("auto_envvar_prefix")
    if prefix is None and name in SETTINGS_READERS and one.name in Settings.model_fields:
        prefix = "BATCHERY"
    if prefix is None and one.name == "base_url":
        prefix = "BATCHERY"  # batchery.client.server looks there where no option names a server
    return "" if prefix is None else f"`{prefix}_{one.name.upper()}`"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def renew() -> list[str]:
    """Write the options of all pages; returns what stands in the way."""
    problems = []
    for name, command in all_commands().items():
        path = PAGES / f"{name}.md"
        try:
            before = path.read_text()
            after = with_options(before, name, command)
        except FileNotFoundError:
            problems.append(f"docs/commands/{name}.md is not there")
            continue
        except ValueError as error:
            problems.append(str(error))
            continue
        if after != before:
            path.write_text(after)
            print(f"docs/commands/{name}.md")
    return problems


if __name__ == "__main__":
    found = renew()
    print("\n".join(found), file=sys.stderr)
    sys.exit(bool(found))
