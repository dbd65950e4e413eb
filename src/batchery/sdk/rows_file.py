"""Rows from a program, kept in a file, since a job must be able to read its rows again.

A row is a mapping with columns (or a finished request), a text (the prompt) or a list of messages; rows come from any
iterable, or from a DataFrame of pandas or polars or a table of pyarrow, none of which is imported here. One row is held
at a time.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from batchery.client.errors import SettingsError
from batchery.client.sources import sync_folder

_CHUNK = 10_000  # rows of a DataFrame that are converted at a time


def is_path(rows: Any) -> bool:
    """Whether rows are named by a path or a glob rather than given."""
    return isinstance(rows, str | os.PathLike)


def paths_of(rows: Any) -> tuple[str, ...] | None:
    """The paths that are meant; None where rows are given themselves. A list of `pathlib.Path` is several files; a list
    of texts is prompts.
    """
    if is_path(rows):
        return (os.fspath(rows),)
    if isinstance(rows, list | tuple) and rows and all(isinstance(row, os.PathLike) for row in rows):
        return tuple(map(os.fspath, rows))
    return None


def keep_rows(rows: Iterable[Any], folder: Path) -> tuple[Path, str]:
    """Write rows to a JSONL file in a folder, durably.

    Returns:
        The file, whose name no other has, and the SHA-256 of its content in hex.

    Raises:
        SettingsError: something is not a row; the message names it.
    """
    path = folder / f".rows-{uuid.uuid4().hex}.jsonl"
    digest = hashlib.sha256()
    encoder = msgspec.json.Encoder(enc_hook=_plain)
    count = 0
    try:
        with path.open("wb") as file:
            for row in records_of(rows):
                count += 1
                try:
                    line = encoder.encode(_row(row)) + b"\n"
                except (TypeError, ValueError) as error:
                    raise SettingsError(f"row {count} cannot be sent: {error}") from None
                digest.update(line)
                file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if not count:
            raise SettingsError("there are no rows to run")
        sync_folder(folder)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path, digest.hexdigest()


def records_of(rows: Any) -> Iterator[Any]:
    """The rows, one after the other.

    Raises:
        SettingsError: they cannot be gone through, or have two columns of one name.
    """
    library = type(rows).__module__.partition(".")[0]
    kind = type(rows).__name__
    if library == "pandas" and kind == "DataFrame":
        if not rows.columns.is_unique:  # of two of one name, a mapping would lose the first
            names = ", ".join(map(repr, rows.columns[rows.columns.duplicated()].unique()))
            raise SettingsError(f"the DataFrame has more than one column {names}; rename one")
        for start in range(0, len(rows), _CHUNK):
            for record in rows.iloc[start : start + _CHUNK].to_dict("records"):
                yield {str(name): value for name, value in record.items()}
    elif library == "polars" and kind in ("DataFrame", "LazyFrame"):
        yield from (rows.collect() if kind == "LazyFrame" else rows).iter_rows(named=True)
    elif library == "pyarrow" and kind == "Table":
        for batch in rows.to_batches(max_chunksize=_CHUNK):
            yield from batch.to_pylist()
    elif isinstance(rows, Mapping | bytes) or not isinstance(rows, Iterable):
        raise SettingsError(
            "rows are a list or another iterable of mappings or texts, a DataFrame, or a path, not "
            f"{type(rows).__name__}"
        )
    else:
        yield from rows


def _row(row: Any) -> Any:
    if isinstance(row, str):
        return {"prompt": row}
    if isinstance(row, Mapping):
        return row if type(row) is dict else dict(row)
    if isinstance(row, list) and row and all(isinstance(message, Mapping) and "role" in message for message in row):
        return {"messages": row}
    if hasattr(row, "model_dump"):  # a model of pydantic
        return row.model_dump(mode="json")
    raise TypeError(f"a row is a mapping, a text or a list of messages, not {type(row).__name__}")


def _plain(value: Any) -> Any:
    """A value that JSON does not know: numbers of numpy, and missing ones of pandas, else its text."""
    if type(value).__name__ in ("NaTType", "NAType"):
        return None
    # An array of one has `item` too, which is no list.
    for method in ("tolist", "item"):
        if hasattr(value, method):
            return getattr(value, method)()
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return str(value)
