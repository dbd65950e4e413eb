"""What commands answer: records on stdout, as a table for people or as JSON, JSON lines or CSV for programs. Everything
that is not an answer goes to stderr, which is not this module's business.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Format(StrEnum):
    """How records are written."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"


FormatOption = Annotated[
    Format, typer.Option("--format", metavar="table|json|jsonl|csv", help="How the answer is written to stdout.")
]


def show(records: Sequence[Mapping[str, Any]], format: Format, *, whole: Any = None) -> None:
    """Write records to stdout.

    Args:
        records: with the same keys, which name the columns.
        format: as asked for.
        whole: what JSON is to say instead of the list of records, where there is more to say.
    """
    out = sys.stdout
    if format is Format.JSON:
        out.write(
            msgspec.json.format(msgspec.json.encode(records if whole is None else whole), indent=2).decode() + "\n"
        )
    elif format is Format.JSONL:
        out.writelines(msgspec.json.encode(record).decode() + "\n" for record in records)
    elif format is Format.CSV:
        if records:
            writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: _cell(value) for key, value in record.items()} for record in records)
    elif records:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for key in records[0]:
            numbers = all(type(record[key]) in (int, float, type(None)) for record in records)
            table.add_column(key.replace("_", " "), justify="right" if numbers else "left", overflow="fold")
        for record in records:
            table.add_row(*(Text(_shown(key, value)) for key, value in record.items()))
        # On a terminal to its width; for whatever else reads it, each record is one line.
        console = Console(file=out, width=None if out.isatty() else 10_000, highlight=False)
        with console.capture() as captured:
            console.print(table)
        out.writelines(line.rstrip() + "\n" for line in captured.get().splitlines())


def _cell(value: Any) -> Any:
    return msgspec.json.encode(value).decode() if isinstance(value, dict | list | tuple) else value


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "unknown" if "cost" in key or key == "prices" else "-"
    if "cost" in key and isinstance(value, int | float):
        return f"${value:,.4f}"
    if type(value) is int:
        return f"{value:,}"
    if isinstance(value, dict | list | tuple):
        return msgspec.json.encode(value).decode()
    return str(value)
