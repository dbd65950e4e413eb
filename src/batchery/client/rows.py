"""The rows of all inputs, each as a finished request, in the order of the inputs; what is wrong stands in the place of
its row. It reads one row at a time and the same inputs always give the same rows, so a job can read them again to join
results to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from batchery.client.delimited import Record, RowProblem, read_delimited
from batchery.client.duplicates import Duplicates
from batchery.client.errors import InputProblem
from batchery.client.images import encode_images, image_urls
from batchery.client.inputs import open_input
from batchery.client.making import Making
from batchery.client.parquet import read_parquet
from batchery.client.requests import BadRow, Maker
from batchery.client.sources import Source, resolve_sources
from batchery.client.template import MissingColumn, value_of
from batchery.wire import strict_json
from batchery.wire.lines import BOM, MAX_PROBLEMS, Limits, Problem, line_too_large, parse_line

__all__ = ["Making", "Row", "read_rows", "rows_of"]

_FINISHED = ("body", "method")
"""A JSONL line with one of these is a finished request, or is meant to be one."""


class Row(msgspec.Struct, frozen=True):
    """A row of an input, and the request that it became.

    Attributes:
        source: the input as named.
        number: of the row in that input, from 1; of JSONL the physical line.
        custom_id: unique in all inputs.
        line: the finished request, one line of JSONL with its line break.
        model: of the request.
        url: of the request.
        data: the input's own columns; None for a finished request.
        changed: whether `line` is other than what the input has.
    """

    source: str
    number: int
    custom_id: str
    line: bytes
    model: str
    url: str
    data: dict[str, Any] | None
    changed: bool


def read_rows(
    inputs: Sequence[str],
    making: Making,
    *,
    stdin: BinaryIO | None = None,
    folder: Path | None = None,
    limits: Limits | None = None,
) -> Iterator[Row | InputProblem]:
    """The rows of the inputs, and behind them the `custom_id`s that come twice.

    Args:
        inputs: paths, globs, `-`.
        making: how they become requests.
        stdin: what `-` means.
        folder: where stdin is kept; None for a file that is gone with this process.
        limits: of the server; only `line_bytes` is looked at here.

    Raises:
        SettingsError: an input is missing or unreadable, or `making` cannot work.
        ResumeError: stdin is not what was kept of it before.
    """
    sources = resolve_sources(inputs, format=making.format, folder=folder, stdin=stdin)
    yield from rows_of(sources, making, limits)


def rows_of(
    sources: Sequence[Source],
    making: Making,
    limits: Limits | None = None,
    *,
    tap: Callable[[Source, bytes], None] | None = None,
) -> Iterator[Row | InputProblem]:
    """As `read_rows`, of sources that were resolved.

    Args:
        tap: is given each line of JSONL inputs as it is read, line break and all.
    """
    limits = limits or Limits()
    maker = Maker(making)
    ids = Duplicates()
    offsets: list[int] = []
    offset = 0
    for source in sources:
        offsets.append(offset)
        last = 0
        for row in _Reading(source, making, maker, limits, offset, tap).rows():
            last = max(last, row.number) if isinstance(row, Row) else last
            if isinstance(row, Row):
                ids.add(row.custom_id, offset + row.number)
            yield row
        offset += last
    pairs = ids.pairs()
    if pairs:
        yield from _repeated(sources, making, limits, offsets, pairs)


def _repeated(
    sources: Sequence[Source], making: Making, limits: Limits, offsets: list[int], pairs: list[tuple[int, int]]
) -> Iterator[InputProblem]:
    """The problems of `custom_id`s that come twice. The inputs are read again for their names, which were not kept."""
    wanted = {number for pair in pairs[:MAX_PROBLEMS] for number in pair}
    rows: dict[int, Row] = {}
    maker = Maker(making)
    for source, offset in zip(sources, offsets, strict=True):
        for row in _Reading(source, making, maker, limits, offset, None).rows():
            if isinstance(row, Row) and offset + row.number in wanted:
                rows[offset + row.number] = row
    for later, first in pairs:
        repeat, other = rows.get(later), rows.get(first)
        if repeat is None or other is None:  # one of more than are told; equal hashes of 64 bits are proof enough
            yield InputProblem("", None, "duplicate_custom_id", "")
            continue
        if repeat.custom_id != other.custom_id:
            continue
        elsewhere = "" if repeat.source == other.source else f" of {other.source}"
        yield InputProblem(
            repeat.source,
            repeat.number,
            "duplicate_custom_id",
            f"Row {repeat.number}: custom_id {repeat.custom_id!r} was already used in row {other.number}{elsewhere}. "
            "Results of all inputs go to one place, so each must be unique.",
        )


class _Reading:
    """One source being read."""

    def __init__(
        self,
        source: Source,
        making: Making,
        maker: Maker,
        limits: Limits,
        offset: int,
        tap: Callable[[Source, bytes], None] | None,
    ) -> None:
        self._source = source
        self._making = making
        self._maker = maker
        self._limits = limits
        self._offset = offset
        self._tap = tap
        self._images = Path(making.image_root) if making.image_root is not None else source.folder

    def rows(self) -> Iterator[Row | InputProblem]:
        source = self._source
        if source.format == "jsonl":
            yield from self._jsonl()
        elif source.format == "parquet":
            yield from self._records(read_parquet(source.path))
        else:
            delimiter = self._making.delimiter or ("\t" if source.format == "tsv" else None)
            with open_input(source.path) as file:
                yield from self._records(read_delimited(file, delimiter, field_bytes=self._limits.line_bytes))

    def _records(self, records: Iterator[Record | RowProblem]) -> Iterator[Row | InputProblem]:
        """Of a table all rows have the same columns, so one that is missing is told once."""
        for record in records:
            if isinstance(record, RowProblem):
                yield InputProblem(self._source.name, record.line, record.code, record.message)
                continue
            try:
                yield self._made(record)
            except BadRow as error:
                yield self._problem(error, record)
                if error.columns:
                    return

    def _made(self, record: Record) -> Row:
        data, making = record.data, self._making
        custom_id = self._maker.custom_id(data, self._offset + record.number)
        images: list[str] = []
        if making.image_column is not None:
            try:
                value = value_of(data, making.image_column)
            except MissingColumn:
                raise BadRow(
                    "missing_column", f"--image-column names the column {making.image_column!r}", columns=True
                ) from None
            images = image_urls(value, self._images)
        body = self._maker.body(data, images)
        request = {"custom_id": custom_id, "method": "POST", "url": making.endpoint, "body": body}
        return self._checked(_encode(request), record.number, data)

    def _checked(self, line: bytes, number: int, data: dict[str, Any] | None) -> Row:
        """A row whose line passes as a line of a batch file."""
        found = parse_line(line, number, self._limits)
        if isinstance(found, Problem):
            raise BadRow(found.code, found.message.removeprefix(f"Line {number}: ").removesuffix("."))
        return Row(self._source.name, number, found.custom_id, line + b"\n", found.model, found.url, data, True)

    def _problem(self, error: BadRow, record: Record) -> InputProblem:
        place = f"Row {record.number}" if record.line is None else f"Line {record.line}"
        if record.line is not None and record.line != record.number:
            place += f" (row {record.number})"
        text = f"{place}: {error}."
        if error.columns:
            names = ", ".join(map(repr, list(record.data)[:50]))
            text += f" The columns are: {names}."
        return InputProblem(self._source.name, record.line, error.code, text)

    def _jsonl(self) -> Iterator[Row | InputProblem]:
        limit = self._limits.line_bytes
        name = self._source.name
        count = number = 0
        with open_input(self._source.path) as file:
            while raw := file.readline(limit + 8):
                if self._tap is not None:
                    self._tap(self._source, raw)
                number += 1
                line = raw.removeprefix(BOM) if number == 1 else raw
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                if len(line) > limit:
                    while not raw.endswith(b"\n") and (raw := file.readline(CHUNK)):
                        if self._tap is not None:
                            self._tap(self._source, raw)
                    problem = line_too_large(number, self._limits)
                    yield InputProblem(name, number, problem.code, problem.message)
                    count += 1
                    continue
                if not line or line.isspace():
                    continue
                count += 1
                if count == 1 and line.lstrip().startswith(b"["):
                    yield InputProblem(
                        name,
                        number,
                        "invalid_json_line",
                        "The file is a JSON array; each line must be one object. Convert it: "
                        "jq -c '.[]' FILE > FILE.jsonl",
                    )
                    return
                yield self._line(line, number)
        if not count:
            yield InputProblem(name, None, "empty_file", "The file has no rows: it needs at least one line of JSON.")

    def _line(self, line: bytes, number: int) -> Row | InputProblem:
        if not self._making.changes_requests:
            parsed = parse_line(line, number, self._limits)
            if not isinstance(parsed, Problem):
                return self._finished_as_it_is(line, number, parsed.custom_id, parsed.model, parsed.url)
        try:
            value = strict_json.loads(line)
        except strict_json.NotJson:
            value = None
        if type(value) is not dict or any(field in value for field in _FINISHED):
            return self._finished(line, value, number)
        record = Record(number, number, value)
        try:
            return self._made(record)
        except BadRow as error:
            return self._problem(error, record)

    def _finished_as_it_is(self, line: bytes, number: int, custom_id: str, model: str, url: str) -> Row | InputProblem:
        refused = self._refused(number)
        return refused or Row(self._source.name, number, custom_id, line + b"\n", model, url, None, False)

    def _refused(self, number: int) -> InputProblem | None:
        """What was said about rows cannot be done to a line that is a request already."""
        making = self._making
        for option, value in (
            ("--template", making.template),
            ("--system", making.system),
            ("--image-column", making.image_column),
        ):
            if value is not None:
                return InputProblem(
                    self._source.name,
                    number,
                    "invalid_value",
                    f"Line {number} is a finished request, and {option} is for rows that become one. Leave it out.",
                )
        return None

    def _finished(self, line: bytes, value: Any, number: int) -> Row | InputProblem:
        name = self._source.name
        refused = self._refused(number) if type(value) is dict else None
        if refused is not None:
            return refused
        if type(value) is dict and type(value.get("body")) is dict and self._making.model is not None:
            value["body"]["model"] = "-"  # comes from --model, so that it need not be there
            parsed = parse_line(_encode(value), number, self._limits)
        else:
            parsed = parse_line(line, number, self._limits)
        if isinstance(parsed, Problem):
            return InputProblem(name, number, parsed.code, parsed.message)
        record = Record(number, number, value)
        try:
            self._maker.change(value)
            if self._making.encode_images:
                encode_images(value["body"], self._images)
            row = self._checked(_encode(value), number, None)
        except BadRow as error:
            return self._problem(error, record)
        return row


_encode = msgspec.json.Encoder().encode
CHUNK = 256 * 1024
