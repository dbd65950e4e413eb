"""`batchery completion`: the script with which a shell completes commands and options."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from typer._completion_shared import get_completion_script


class Shell(StrEnum):
    """Shells that can complete."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(shell: Annotated[Shell, typer.Argument(metavar="bash|zsh|fish", help="Which shell.")]) -> None:
    """Print the completion script of a shell.

    \b
    Examples:
      batchery completion bash > ~/.local/share/bash-completion/completions/batchery
      batchery completion fish > ~/.config/fish/completions/batchery.fish
    """
    typer.echo(get_completion_script(prog_name="batchery", complete_var="_BATCHERY_COMPLETE", shell=shell.value))
