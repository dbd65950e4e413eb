"""The `batchery` command: it only gathers the subcommands, each of which lives in the module of its name.

A subcommand's module imports what is heavy (the web framework, the database) inside its function, so that `--help` and
the start of a worker stay quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from batchery import __version__
from batchery.cli import run, serve, simulate, worker

app = typer.Typer(
    name="batchery",
    help="Batch inference, whole: run a file of requests against any OpenAI-compatible server, and lose nothing.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("run")(run.run)
app.command("serve")(serve.serve)
app.command("simulate")(simulate.simulate)
app.command("worker", hidden=True)(worker.worker)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"batchery {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Batch inference, whole."""


def main() -> None:
    """Entry point of the `batchery` script."""
    app()


if __name__ == "__main__":
    main()
