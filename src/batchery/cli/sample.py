"""`batchery sample`: some rows of an input, for a trial."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from batchery.cli.failures import told
from batchery.cli.making_options import Delimiter, InputFormat
from batchery.client.errors import SettingsError
from batchery.client.sample import sample_rows
from batchery.client.sources import resolve_sources


def sample(
    input: Annotated[str, typer.Argument(metavar="INPUT", help="JSONL, CSV, TSV or Parquet; - for stdin.")],
    *,
    rows: Annotated[int, typer.Option("--rows", "-n", metavar="N", min=1, help="How many at most.")] = 10,
    first: Annotated[bool, typer.Option("--first", help="The first ones, not random ones.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Another seed chooses other rows.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="A file.", show_default="stdout")
    ] = None,
    input_format: InputFormat = None,
    delimiter: Delimiter = None,
) -> None:
    """Take some rows of an input, in its order: JSONL lines as they are, CSV with its header, Parquet as JSONL.

    \b
    Examples:
      batchery sample requests.jsonl -n 20 -o trial.jsonl
      batchery sample reviews.csv -n 5 --first
      batchery sample reviews.csv --seed 7 | batchery prepare - -m my-model -t '{{text}}'

    \b
    Exit codes:
      0  written
      1  wrong usage
      2  a row of a table cannot be read
    """
    with told():
        sources = resolve_sources([input], format=input_format, stdin=sys.stdin.buffer)
        if len(sources) > 1:
            raise SettingsError(f"{input} matches {len(sources)} files; name one")
        if output is not None and output.resolve() == sources[0].path.resolve():
            raise SettingsError(f"{output} is both input and output")
        tab = "\t" if delimiter == "\\t" else delimiter
        chosen = list(sample_rows(sources[0], rows, first=first, seed=seed, delimiter=tab))
        if output is None:
            sys.stdout.buffer.writelines(chosen)
            sys.stdout.flush()
        else:
            output.write_bytes(b"".join(chosen))
