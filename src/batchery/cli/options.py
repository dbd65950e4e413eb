"""What the commands that take server settings share: reading them, and saying what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NoReturn

import typer
from pydantic import Field, ValidationError
from pydantic_settings import SettingsError

from batchery.server.settings import CONFIG_FILE, Settings

WITHOUT_FLAG = ("prices",)
"""Settings that are tables in the settings file, or JSON in the environment; what is said of them names the place."""


def fail(message: str, code: int = 1) -> NoReturn:
    """End the command with a message on stderr."""
    typer.echo(f"batchery: {message}", err=True)
    raise typer.Exit(code)


def read_settings(config: Path | None, *, needs_upstream: bool = True, **flags: Any) -> Settings:
    """The settings from flags, environment, file and defaults; a flag that is None was not given.

    Args:
        config: the file; None for `batchery.toml` in the current folder, which need not be there.
        needs_upstream: whether an upstream must be named; it is empty where none is, and then not used.
        flags: settings by name.

    Raises:
        typer.Exit: something is wrong with them, which has been said.
    """
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    file = CONFIG_FILE if config is None else config
    if config is not None and not config.is_file():
        fail(f"--config {config}: there is no such file")

    class FromFile(Settings):
        config_file: ClassVar[Path] = file

    class WithoutUpstream(FromFile):
        upstream: tuple[str, ...] | str = Field((), validate_default=False)

    try:
        return (FromFile if needs_upstream else WithoutUpstream)(**given)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            name = str(item["loc"][0]) if item["loc"] else "settings"
            flag = "--" + name.replace("_", "-")
            if item["type"] == "missing":
                problems.append(f"{flag} is needed (or BATCHERY_{name.upper()}, or {name} in {file})")
            elif item["type"] == "extra_forbidden":
                problems.append(f"{name!r} in {file} is not a setting")
            else:
                message = item["msg"].removeprefix("Value error, ")
                problems.append(message if name in WITHOUT_FLAG else f"{flag}: {message}")
        fail("; ".join(problems))
    except (SettingsError, ValueError) as error:
        fail(f"{file} or the environment cannot be read: {error}")
