"""Reading Parquet, a few rows at a time. It needs pyarrow, which comes with `pip install 'batchery[parquet]'`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from batchery.client.delimited import Record, RowProblem
from batchery.client.errors import SettingsError

BATCH_ROWS = 256


def read_parquet(path: Path) -> Iterator[Any]:
    """The rows of a file; dates, decimals and bytes as the texts that JSON has for them.

    Yields:
        `Record`, or one `RowProblem` behind which nothing can be read.

    Raises:
        SettingsError: pyarrow is not installed.
    """
    try:
        import pyarrow  # noqa: PLC0415  # optional, and slow to import
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise SettingsError("to read Parquet, install pyarrow: pip install 'batchery[parquet]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                yield RowProblem("invalid_parquet", "The file has two columns of one name.")
                return
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(number, None, {name: _plain(value) for name, value in row.items()})
    except (pyarrow.ArrowException, OSError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield RowProblem("invalid_parquet", f"The file cannot be read as Parquet behind row {number}: {text}")
        return
    if not number:
        yield RowProblem("empty_file", "The file has no rows.")


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    return msgspec.to_builtins(value, str_keys=True, enc_hook=str)
