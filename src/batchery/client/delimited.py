"""Reading CSV and TSV as people really write them, one row at a time: a BOM, line breaks and delimiters inside quotes,
`;` for `,`, rows that are too short or too long, bytes that are not UTF-8, a quote that is never closed.

Memory is one row's, however many there are. What is wrong is a `RowProblem` in the place of its row; reading goes on
behind it as far as that makes sense.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import msgspec

from batchery.wire.lines import BOM, MAX_LINE_BYTES

DELIMITERS = ",;\t|"
_PACKED = {
    b"PK\x03\x04": "a workbook or a zip archive: save the sheet as CSV UTF-8",
    b"\x1f\x8b": "compressed: gzip -d FILE first",
}


class RowProblem(msgspec.Struct, frozen=True):
    """Something wrong with one row, or, without a line, with the whole file.

    Attributes:
        code: for programs.
        message: for people, without the file's name.
        line: physical line where the row begins, from 1; None where the file has no lines.
        number: the row, from 1; 0 for none in particular.
    """

    code: str
    message: str
    line: int | None = None
    number: int = 0


class Record(msgspec.Struct, frozen=True):
    """A row as it is in the input.

    Attributes:
        number: from 1, the header not counted; of JSONL the physical line.
        line: physical line where it begins, from 1; None where the file has no lines.
        data: its columns by name.
    """

    number: int
    line: int | None
    data: dict[str, Any]


def read_delimited(file: BinaryIO, delimiter: str | None, *, field_bytes: int = MAX_LINE_BYTES) -> Iterator[Any]:
    """The rows of a file with a header.

    Args:
        file: at its beginning.
        delimiter: None for the one of `DELIMITERS` that parts the header into most columns.
        field_bytes: the most that one field may have.

    Yields:
        `Record` or `RowProblem`, in the order of the file. Rows without any value are passed over.
    """
    csv.field_size_limit(field_bytes)  # of the whole process; this module is the only one to read CSV
    text = _Text(file)
    start = text.peek()
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        yield RowProblem("invalid_utf8", "The file is UTF-16, as Excel saves 'Unicode text'. Save it as CSV UTF-8.")
        return
    packed = next((kind for magic, kind in _PACKED.items() if start.startswith(magic)), None)
    if packed is not None:
        yield RowProblem("invalid_csv", f"The file is {packed}.")
        return
    if not start:
        yield RowProblem("empty_file", "The file is empty: it needs a header and at least one row.")
        return
    if delimiter is None:
        delimiter = _delimiter_of(start.removeprefix(BOM).decode(errors="replace"))
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        line = text.line + 1
        try:
            fields = next(rows, None)
        except csv.Error as error:
            yield from text.take_problems(number + 1)
            fatal = "limit" in str(error) or "unexpected end" in str(error)
            yield RowProblem("invalid_csv", _explain(str(error), line, field_bytes), line, number + 1)
            if fatal or header is None:
                return
            number += 1
            continue
        yield from text.take_problems(number + 1 if header is not None else 0)
        if fields is None:
            break
        if header is None:
            if not any(fields):
                continue
            header = [name.strip() or f"column_{place}" for place, name in enumerate(fields, 1)]
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                names = ", ".join(map(repr, repeated))
                yield RowProblem(
                    "invalid_csv", f"Line {line}: the header names {names} more than once. Rename one.", line
                )
                return
            continue
        if not any(fields):
            continue
        number += 1
        if len(fields) != len(header):
            yield RowProblem(
                "wrong_column_count",
                f"Line {line} (row {number}) has {len(fields)} column{'s' if len(fields) != 1 else ''}, the header has "
                f"{len(header)}. Quote fields that contain {_name(delimiter)}.",
                line,
                number,
            )
            continue
        yield Record(number, line, dict(zip(header, fields, strict=True)))
    if header is None:
        yield RowProblem("empty_file", "The file has no header: its first line must name the columns.")
    elif not number:
        yield RowProblem("empty_file", "The file has a header but no rows.")


class _Text:
    """The lines of a file as text, each decoded by itself, so that what is not UTF-8 is found with its place."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._problems: list[tuple[int, int]] = []
        self._first: bytes | None = None
        self.line = 0

    def peek(self) -> bytes:
        """The first line."""
        if self._first is None:
            self._first = self._file.readline(MAX_LINE_BYTES)
        return self._first

    def __iter__(self) -> _Text:
        return self

    def __next__(self) -> str:
        raw = self._first if self._first is not None else self._file.readline(MAX_LINE_BYTES + 2)
        first, self._first = self.line == 0, None
        if not raw:
            raise StopIteration
        if raw.endswith(b"\n") or len(raw) < MAX_LINE_BYTES:
            self.line += 1
        if first:
            raw = raw.removeprefix(BOM)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self._problems.append((self.line, error.start))
            return raw.decode(errors="replace")

    def take_problems(self, number: int) -> Iterable[RowProblem]:
        """What could not be decoded since the last call."""
        found, self._problems = self._problems, []
        for line, start in found:
            yield RowProblem(
                "invalid_utf8",
                f"Line {line} is not UTF-8 at byte {start} of the line. Save the file as UTF-8, such as with "
                "iconv -f latin1 -t utf-8.",
                line,
                number,
            )


def _delimiter_of(header: str) -> str:
    def columns(delimiter: str) -> int:
        try:
            return len(next(csv.reader([header], delimiter=delimiter), []))
        except csv.Error:  # reading on says what is wrong, with its line
            return 0

    return max(DELIMITERS, key=columns)  # the first of equals: the comma


def _name(delimiter: str) -> str:
    return "a tab" if delimiter == "\t" else repr(delimiter)


def _explain(error: str, line: int, field_bytes: int) -> str:
    if "limit" in error:
        return (
            f"Line {line}: a field is longer than {field_bytes} bytes; perhaps a quote that opens there is never "
            "closed. Reading stops here."
        )
    if "unexpected end" in error:
        return f"Line {line}: a quote that opens in this row is never closed. Reading stops here."
    if "new-line" in error:
        return (
            f"Line {line} has a carriage return that ends no line, as in files of old spreadsheets for the Mac. "
            "Convert the file: tr '\\r' '\\n' < FILE > NEW.csv"
        )
    return f"Line {line} is not CSV: {error}. A quote inside a quoted field is written twice."
