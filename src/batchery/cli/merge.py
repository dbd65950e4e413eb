"""`batchery merge`: the result files of several batches as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from batchery.cli.failures import told
from batchery.cli.making_options import named
from batchery.cli.tables import Format, FormatOption, show
from batchery.client.merge import merge_results


def merge(
    files: Annotated[list[str] | None, typer.Argument(metavar="FILE...", help="Output and error files.")] = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The one file.")],
    strict: Annotated[
        bool, typer.Option("--strict", help="Write nothing if two lines of one custom_id say different things.")
    ] = False,
    format: FormatOption = Format.TABLE,
) -> None:
    """Merge output and error files into one with one line for each custom_id.

    A good answer wins over a failure, as after a retry; of two different answers the first stays, and they are counted.

    \b
    Examples:
      batchery merge part-1.jsonl part-2.jsonl errors.jsonl -o results.jsonl
      batchery merge first-run.jsonl retry.jsonl -o results.jsonl --strict

    \b
    Exit codes:
      0  written
      1  wrong usage, or --strict and there are conflicts
      2  a line is not a result; nothing was written
    """
    with told():
        merged = merge_results([Path(name) for name in named(files)], output, strict=strict)
        record = msgspec.to_builtins(merged)
        conflicts = record.pop("conflicts")
        show([record], format)
        if conflicts:
            names = ", ".join(conflicts)
            typer.echo(
                f"{merged.conflicting} lines say other than an earlier one of their custom_id: {names}", err=True
            )
