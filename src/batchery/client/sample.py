"""Some rows of an input as they are in it, for a trial: the first, or random ones by a seed, in the input's order."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterator
from typing import Any

import msgspec

from batchery.client.delimited import Record, read_delimited
from batchery.client.errors import InputError, InputProblem
from batchery.client.inputs import open_input
from batchery.client.parquet import read_parquet
from batchery.client.sources import Source
from batchery.wire.lines import BOM


def sample_rows(source: Source, rows: int, *, first: bool, seed: int, delimiter: str | None = None) -> Iterator[bytes]:
    """Some rows of an input: JSONL lines as they are, tables as CSV with their header, Parquet as JSONL.

    Args:
        rows: how many at most.
        first: take the first ones; otherwise each row is as likely as any other.
        seed: of the choice.

    Raises:
        InputError: a row of a table cannot be read.
        SettingsError: the input cannot be read.
    """
    records = _lines(source) if source.format == "jsonl" else _records(source, delimiter)
    header, chosen = _choose(records, rows, first, random.Random(seed))  # noqa: S311  # a sample, no secret
    if header is not None:
        yield header
    yield from chosen


def _choose(
    records: Iterator[tuple[bytes | None, bytes]], rows: int, first: bool, chance: random.Random
) -> tuple[bytes | None, list[bytes]]:
    """Reservoir sampling (Vitter's algorithm R): one pass, and no more than `rows` rows in memory."""
    header: bytes | None = None
    kept: list[tuple[int, bytes]] = []
    for number, (head, record) in enumerate(records):
        header = head
        if len(kept) < rows:
            kept.append((number, record))
        elif first:
            break
        elif (place := chance.randrange(number + 1)) < rows:
            kept[place] = (number, record)
    return header, [record for _, record in sorted(kept)]


def _lines(source: Source) -> Iterator[tuple[bytes | None, bytes]]:
    with open_input(source.path) as file:
        for number, raw in enumerate(file):
            line = (raw.removeprefix(BOM) if number == 0 else raw).rstrip(b"\r\n")
            if line and not line.isspace():
                yield None, line + b"\n"


def _records(source: Source, delimiter: str | None) -> Iterator[tuple[bytes | None, bytes]]:
    if source.format == "parquet":
        for record in read_parquet(source.path):
            yield None, msgspec.json.encode(_good(source, record).data) + b"\n"
        return
    tab = source.format == "tsv"
    with open_input(source.path) as file:
        for record in read_delimited(file, delimiter or ("\t" if tab else None)):
            data = _good(source, record).data
            yield _csv(list(data), tab), _csv(list(data.values()), tab)


def _csv(fields: list[Any], tab: bool) -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter="\t" if tab else ",", lineterminator="\n").writerow(fields)
    return out.getvalue().encode()


def _good(source: Source, record: Any) -> Record:
    if isinstance(record, Record):
        return record
    raise InputError((InputProblem(source.name, record.line, record.code, record.message),), 1)
