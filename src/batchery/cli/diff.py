"""`batchery diff`: what differs between two request files or two result files."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from batchery.cli.failures import told
from batchery.cli.tables import Format, FormatOption, show
from batchery.client.diff import Difference, diff_files

TABLE_ROWS = 100


def diff(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="A request or result file (JSONL).")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Another of the same kind.")],
    *,
    format: FormatOption = Format.TABLE,
) -> None:
    """Compare two request files, or two result files, by custom_id.

    Of results the status, the error's code and the answer count; ids, times and counts of tokens do not.

    \b
    Examples:
      batchery diff requests.jsonl changed.jsonl
      batchery diff results-a.jsonl results-b.jsonl --format jsonl

    \b
    Exit codes:
      0  compared, whether there are differences or not
      1  wrong usage
      2  a line cannot be compared
    """
    with told():
        counts: Counter[str] = Counter()
        shown: list[Difference] = []
        differences = diff_files(old, new)
        for difference in differences if format is Format.TABLE else ():
            counts[difference.change] += 1
            if len(shown) < TABLE_ROWS:
                shown.append(difference)
        if format is Format.JSONL:
            while part := list(islice(differences, 1000)):
                counts.update(difference.change for difference in part)
                show([msgspec.to_builtins(difference) for difference in part], format)
        else:
            shown = shown or list(differences)
            if format is not Format.TABLE:
                counts.update(difference.change for difference in shown)
            show([msgspec.to_builtins(difference) for difference in shown], format)
        total = counts.total()
        if format is Format.TABLE and total > len(shown):
            typer.echo(f"... and {total - len(shown)} more; --format jsonl has all", err=True)
        words = [f"{counts[change]} {change}" for change in ("changed", "added", "removed")]
        typer.echo(f"{', '.join(words)}." if total else "No differences.", err=True)
