"""How commands end when they cannot do what was asked: words on stderr and an exit code, in one place."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from batchery.cli.exit_codes import DETACHED, INVALID, OK, USAGE, exit_code_of_error
from batchery.client.errors import ClientError, InputError

PROBLEMS_SHOWN = 100


@contextmanager
def unheard() -> Iterator[None]:
    """Whatever is said within on stderr may go nowhere, as in a closed pipe or terminal: no job ends for that."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def tell(text: str) -> None:
    """Say something on stderr, if anyone hears it."""
    with unheard():
        typer.echo(text, err=True)


def show_problems(error: InputError) -> None:
    """Say on stderr what is wrong with an input, each problem with its place."""
    for problem in error.problems[:PROBLEMS_SHOWN]:
        place = problem.path if problem.line is None else f"{problem.path}:{problem.line}"
        typer.echo(f"{place}: {problem.message} [{problem.code}]", err=True)
    if error.count > PROBLEMS_SHOWN:
        typer.echo(f"... and {error.count - PROBLEMS_SHOWN} more", err=True)


@contextmanager
def told() -> Iterator[None]:
    """Turn what goes wrong within into words and an exit code.

    Raises:
        typer.Exit: with the code.
    """
    try:
        yield
    except InputError as error:
        typer.echo(f"Error: {error}", err=True)
        show_problems(error)
        raise typer.Exit(INVALID) from None
    except ClientError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(exit_code_of_error(error)) from None
    except BrokenPipeError:  # whoever read the answer has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(OK) from None
    except OSError as error:
        typer.echo(f"Error: {error.strerror or error}: {error.filename or 'while writing'}", err=True)
        raise typer.Exit(USAGE) from None
    except KeyboardInterrupt:
        raise typer.Exit(DETACHED) from None
