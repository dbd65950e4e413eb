"""The `batchery` command: it only gathers the subcommands, each of which is the function of its module's name, or,
where it has subcommands of its own, that module's `group`.

Only the module of the subcommand that is asked for is imported, so that a worker is at work again a moment after a
crash; what is heavy (the web framework, the database) the modules import inside their functions.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from batchery import __version__

GROUPS = {
    "Run jobs": ("run", "stream", "watch", "status", "results", "retry", "cancel", "receipt"),
    "Work on files, offline": ("check", "estimate", "prepare", "split", "merge", "sample", "diff", "stats"),
    "Call a server": ("files", "batches", "models", "doctor"),
    "Help agents, tools and shells": ("skill", "mcp", "proxy", "completion"),
    "Serve": ("serve", "worker", "keys", "simulate", "llama"),
}
"""All subcommands, as the help groups them."""

COMMANDS = tuple(name for names in GROUPS.values() for name in names)

EXIT_USAGE = 1
"""The exit code for a wrong command line; 2, which the parser would use, says that an input file is invalid."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"batchery {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Batch inference, whole: run a file of requests against any OpenAI-compatible server, and lose nothing."""


def build(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The command with some of its subcommands.

    Args:
        names: of the subcommands; all of them unless only one is going to be called.
    """
    app = typer.Typer(name="batchery", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.callback()(_root)
    panels = {name: title for title, grouped in GROUPS.items() for name in grouped}
    for name in names:
        module = importlib.import_module(f"batchery.cli.{name}")
        if hasattr(module, "group"):
            app.add_typer(module.group, name=name, rich_help_panel=panels[name])
            continue
        app.command(
            name,
            epilog=getattr(module, "EPILOG", None),
            context_settings=getattr(module, "CONTEXT_SETTINGS", None),
            rich_help_panel=panels[name],
        )(getattr(module, name))
    return app


def main() -> None:
    """Entry point of the `batchery` script."""
    for parent in typer.BadParameter.__mro__:
        if parent.__name__ == "UsageError":  # the parser's own class, which it does not export
            parent.exit_code = EXIT_USAGE  # type: ignore[attr-defined]
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by 2>&-
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  # until the process ends
    for argument in sys.argv[1:]:
        if any("\ud800" <= character <= "\udfff" for character in argument):  # bytes that the locale could not read
            typer.echo(
                f"Error: {argument!a} is not UTF-8: rename the file, or set a locale in UTF-8, such as "
                "export LC_ALL=C.UTF-8",
                err=True,
            )
            sys.exit(EXIT_USAGE)
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    build([asked] if asked in COMMANDS else COMMANDS)()


if __name__ == "__main__":
    main()
