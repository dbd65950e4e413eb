"""The output: one typed outcome for each row of the inputs, in their order, made of the results wherever they landed.

It reads one row at a time, so memory stays flat, and it puts the output in place as a whole or not at all.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from batchery.client.errors import SettingsError
from batchery.client.index import ResultIndex
from batchery.client.objects import Usage
from batchery.client.results import Cause, read_record, read_result, whole_characters
from batchery.client.state import sync_folder

FORMATS = ("jsonl", "csv", "parquet", "raw")
_GROUP = 2_000  # rows of a Parquet file that are written at a time

_COLUMNS = (
    "custom_id",
    "status",
    "output_text",
    "http_status",
    "error_code",
    "error_message",
    "model",
    "finish_reason",
    "input_tokens",
    "output_tokens",
    "cached_tokens",
)

_OURS = re.compile(f"(?:input_)*(?:{'|'.join(_COLUMNS[1:])})")
"""Our columns, but for `custom_id`, which is the row's own, with any number of prefixes."""


class InputRow(msgspec.Struct, frozen=True):
    """A row of the inputs.

    Attributes:
        custom_id: its name.
        row: its number over all inputs, from 1.
        data: its own columns; None for a finished request.
    """

    custom_id: str
    row: int
    data: Mapping[str, Any] | None = None


class RowOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a row. A superset of the result lines of OpenAI's Batch API.

    Attributes:
        id, custom_id, response, error: as the server's result line has them; `id` and `response` are null without one.
        row: its number over all inputs, from 1.
        status: `ok`, `failed`, `expired`, `cancelled`, or `not_run` where there is no result at all.
        output_text: the answer's text; null where it has none.
        data: the input's own columns; left out for a finished request.
    """

    id: msgspec.Raw
    custom_id: str
    row: int
    status: str
    output_text: str | None
    response: msgspec.Raw
    error: Any
    data: Mapping[str, Any] | msgspec.UnsetType = msgspec.UNSET


class _Line(msgspec.Struct):
    id: msgspec.Raw = msgspec.Raw(b"null")
    response: msgspec.Raw = msgspec.Raw(b"null")
    error: msgspec.Raw = msgspec.Raw(b"null")


class _Joined(msgspec.Struct):
    custom_id: str
    row: int
    status: str
    data: dict[str, Any] | None = None


RowWithResult = tuple[InputRow, bytes | None, Cause | None]
"""A row, its result line, and how it ended; None and None without a result."""

Outcomes = Callable[[], Iterable[RowWithResult]]
"""Gives the rows in order, each time it is called."""

_CAUSES = {"ok": Cause.ok, "failed": Cause.permanent, "expired": Cause.expired, "cancelled": Cause.cancelled}
_read_joined = msgspec.json.Decoder(_Joined).decode
_STATUS = {Cause.transient: "failed", Cause.permanent: "failed"}
_NOT_RUN = {"code": "not_run", "message": "the batch ended without a result for this request"}
_read_line = msgspec.json.Decoder(_Line).decode


def format_of(output: Path, named: str | None) -> str:
    """The output's format: as named, else by the suffix of its name.

    Raises:
        SettingsError: there is no such format, or it needs a package that is not there.
    """
    chosen = named or {".csv": "csv", ".parquet": "parquet"}.get(output.suffix.lower(), "jsonl")
    if chosen not in FORMATS:
        raise SettingsError(f"--output-format is one of {', '.join(FORMATS)}, not {named!r}")
    if chosen == "parquet":
        try:
            import pyarrow  # noqa: F401, PLC0415
        except ImportError:
            raise SettingsError("Parquet output needs pyarrow: pip install 'batchery[parquet]'") from None
    return chosen


def write_joined(format: str, path: Path, rows: Callable[[], Iterable[InputRow]], index: ResultIndex) -> None:
    """Write the output, and return when it is on disk; what was there stays until then.

    Args:
        format: `jsonl`, `csv` or `parquet`.
        path: where it goes.
        rows: gives the rows in order, each time it is called.
        index: their results.
    """
    _write(format, path, lambda: _outcomes(rows(), index))


def write_again(format: str, path: Path, joined: Path) -> None:
    """Write an output in another format.

    Args:
        format: `jsonl`, `csv` or `parquet`.
        path: where it goes.
        joined: the output as `write_joined` writes it as JSONL.
    """
    _write(format, path, lambda: _outcomes_in(joined))


def flat_records(joined: Path) -> Iterator[dict[str, Any]]:
    """The rows of an output in JSONL as flat records with the columns of a table, in order."""
    for outcome in _outcomes_in(joined):
        yield flat(*outcome)


def _write(format: str, path: Path, outcomes: Outcomes) -> None:
    write = {"jsonl": _write_jsonl, "csv": _write_csv, "parquet": _write_parquet}[format]
    with _replacing(path) as temporary:
        write(temporary, outcomes)


def write_raw(paths: tuple[Path, Path], rows: Iterable[InputRow], index: ResultIndex) -> None:
    """Write the two files of OpenAI's Batch API, successes and failures, each row once and in order."""
    with (
        _replacing(paths[0]) as first,
        _replacing(paths[1]) as second,
        first.open("wb") as ok,
        second.open("wb") as bad,
    ):
        for row in rows:
            found = index.get(row.custom_id)
            if found is not None:
                (ok if found.cause is Cause.ok else bad).write(index.line(found) + b"\n")
    for path in paths:
        if not path.stat().st_size:
            path.unlink()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.new")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it is in the way of what would mend that
        raise
    sync_folder(path.parent)


def outcome_of(row: InputRow, line: bytes | None, cause: Cause | None) -> RowOutcome:
    """A row's outcome.

    Args:
        row: of the input.
        line: its result line; None if there is none.
        cause: how it ended; None if nobody knows.
    """
    data = msgspec.UNSET if row.data is None else row.data
    if line is None or cause is None:
        null = msgspec.Raw(b"null")
        return RowOutcome(
            id=null,
            custom_id=row.custom_id,
            row=row.row,
            status="not_run",
            output_text=None,
            response=null,
            error=_NOT_RUN,
            data=data,
        )
    try:
        parts = _read_line(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        record = read_record(line)
        parts = _Line(*(msgspec.Raw(json.dumps(record.get(name)).encode()) for name in ("id", "response", "error")))
    error: Any = parts.error
    if cause is not Cause.ok and bytes(parts.error) == b"null":
        result = read_result(line)  # some servers name the error only in the answer's body
        error = {"code": result.code, "message": result.message}
    return RowOutcome(
        id=parts.id,
        custom_id=row.custom_id,
        row=row.row,
        status=_STATUS.get(cause, cause.value),
        output_text=output_text(_body(line)) if cause is Cause.ok else None,
        response=parts.response,
        error=error,
        data=data,
    )


def output_text(body: Mapping[str, Any]) -> str | None:
    """The text of an answer of chat completions, completions, responses or messages; None where there is none."""
    for choice in _list(body.get("choices"))[:1]:
        text = _dict(choice.get("message")).get("content", choice.get("text"))
        return _text(text)
    pieces = [
        part.get("text")
        for item in _list(body.get("output"))
        if item.get("type") == "message"
        for part in _list(item.get("content"))
    ] or [part.get("text") for part in _list(body.get("content"))]
    texts = [text for text in pieces if isinstance(text, str)]
    return whole_characters("".join(texts)) if texts else None


def _body(line: bytes) -> Mapping[str, Any]:
    return _dict(_dict(read_record(line).get("response")).get("body"))


def _finish_reason(body: Mapping[str, Any]) -> str | None:
    for choice in _list(body.get("choices"))[:1]:
        return _text(choice.get("finish_reason"))
    return _text(body.get("stop_reason")) or _text(body.get("status"))


def _outcomes_in(joined: Path) -> Iterator[RowWithResult]:
    """The rows of an output in JSONL: its lines hold all that result lines hold."""
    with joined.open("rb") as file:
        for line in file:
            try:
                row = _read_joined(line)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                row = msgspec.convert(read_record(line), _Joined)  # an answer with half of an emoji, for one
            cause = _CAUSES.get(row.status)
            yield InputRow(row.custom_id, row.row, row.data), None if cause is None else line, cause


def _outcomes(rows: Iterable[InputRow], index: ResultIndex) -> Iterator[RowWithResult]:
    for row in rows:
        found = index.get(row.custom_id)
        yield row, None if found is None else index.line(found), None if found is None else found.cause


def _write_jsonl(path: Path, outcomes: Outcomes) -> None:
    encoder = msgspec.json.Encoder(enc_hook=str)
    with path.open("wb") as file:
        for row, line, cause in outcomes():
            file.write(encoder.encode(outcome_of(row, line, cause)) + b"\n")


def flat(row: InputRow, line: bytes | None, cause: Cause | None) -> dict[str, Any]:
    """An outcome as columns; the input's own come first, and one that has the name of ours is prefixed."""
    values: dict[str, Any] = {_own(name): value for name, value in (row.data or {}).items()}
    values |= dict.fromkeys(_COLUMNS)
    values |= {"custom_id": row.custom_id, "status": "not_run"}
    if line is None or cause is None:
        return values | {"error_code": _NOT_RUN["code"], "error_message": _NOT_RUN["message"]}
    result, body = read_result(line), _body(line)
    usage = result.usage or Usage(0, 0)
    return values | {
        "status": _STATUS.get(cause, cause.value),
        "output_text": output_text(body) if cause is Cause.ok else None,
        "http_status": result.status,
        "error_code": result.code or None,
        "error_message": result.message or None,
        "model": _text(body.get("model")),
        "finish_reason": _finish_reason(body),
        "input_tokens": usage.input_tokens if result.usage else None,
        "output_tokens": usage.output_tokens if result.usage else None,
        "cached_tokens": usage.cached_tokens if result.usage else None,
    }


def _own(name: str) -> str:
    """An own column's name. One that already has the prefix, as of an earlier output, gets another, so that no two of
    them become one.
    """
    return f"input_{name}" if _OURS.fullmatch(name) else name


def _own_columns(outcomes: Iterable[RowWithResult]) -> list[str]:
    names: dict[str, None] = {}
    for row, _, _ in outcomes:
        names |= dict.fromkeys(_own(name) for name in row.data or ())
    return [*(name for name in names if name not in _COLUMNS), *_COLUMNS]


def _write_csv(path: Path, outcomes: Outcomes) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, _own_columns(outcomes()))
        writer.writeheader()
        for item in outcomes():
            writer.writerow({name: _cell(value) for name, value in flat(*item).items()})


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else value


def _write_parquet(path: Path, outcomes: Outcomes) -> None:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    numbers = {"http_status", "input_tokens", "output_tokens", "cached_tokens"}
    schema = pa.schema([(name, pa.int64() if name in numbers else pa.string()) for name in _own_columns(outcomes())])

    def text(name: str, value: Any) -> Any:
        if value is None or name in numbers:
            return value
        value = _cell(value)
        return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else str(value)

    with pq.ParquetWriter(path, schema) as writer:
        group: list[dict[str, Any]] = []

        def flush() -> None:
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group.clear()

        for item in outcomes():
            group.append({name: text(name, value) for name, value in flat(*item).items()})
            if len(group) == _GROUP:
                flush()
        flush()


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    return whole_characters(value) if isinstance(value, str) else None
