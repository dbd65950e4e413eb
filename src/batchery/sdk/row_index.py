"""Which row a result is of: an index on disk, so that memory stays flat however many rows there are."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from types import TracebackType

import msgspec

from batchery.client.join import InputRow

_SCHEMA = "CREATE TABLE rows (custom_id BLOB PRIMARY KEY, number INTEGER, data BLOB) WITHOUT ROWID"
_GROUP = 5_000


class RowIndex:
    """The rows of a job by `custom_id`. A context manager; the index goes at its end.

    Args:
        rows: in order.
    """

    def __init__(self, rows: Iterable[InputRow]) -> None:
        # Without a name it is a temporary file, which SQLite removes.
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._connection.execute(
            "CREATE TABLE rows (custom_id BLOB PRIMARY KEY, number INTEGER, data BLOB) WITHOUT ROWID"
        )
        encoder = msgspec.json.Encoder(enc_hook=str)
        group = []
        self._connection.execute("BEGIN")
        for row in rows:
            group.append((_key(row.custom_id), row.row, None if row.data is None else encoder.encode(row.data)))
            if len(group) == _GROUP:
                self._add(group)
        self._add(group)
        self._connection.execute("COMMIT")

    def __enter__(self) -> RowIndex:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._connection.close()

    def get(self, custom_id: str) -> InputRow | None:
        """The row of this name; None if there is none."""
        found = self._connection.execute(
            "SELECT number, data FROM rows WHERE custom_id = ?", (_key(custom_id),)
        ).fetchone()
        if found is None:
            return None
        return InputRow(custom_id, found[0], None if found[1] is None else msgspec.json.decode(found[1]))

    def _add(self, group: list[tuple[bytes, int, bytes | None]]) -> None:
        self._connection.executemany("INSERT OR IGNORE INTO rows VALUES (?, ?, ?)", group)
        group.clear()


def _key(custom_id: str) -> bytes:
    return custom_id.encode("utf-8", "surrogatepass")
