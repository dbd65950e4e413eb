"""Which row has which result: an index on disk, so that memory stays flat however many rows there are.

Of several results of one row (a server that repeats lines, a row that was run again) the first success counts, and
without one the last failure. It is made anew from the result files whenever it is needed, and holds nothing that is not
in them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from batchery.client.objects import Usage
from batchery.client.results import Cause, Reason, Result, Tally, read_result

_SCHEMA = """
CREATE TABLE results (
    custom_id TEXT PRIMARY KEY, cause TEXT, kind TEXT, message TEXT,
    file INTEGER, start INTEGER, length INTEGER, sent INTEGER, received INTEGER, cached INTEGER,
    model TEXT
) WITHOUT ROWID
"""
_ADD = """
INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (custom_id) DO UPDATE SET
    cause = excluded.cause, kind = excluded.kind, message = excluded.message, file = excluded.file,
    start = excluded.start, length = excluded.length, sent = excluded.sent, received = excluded.received,
    cached = excluded.cached, model = excluded.model
WHERE results.cause <> 'ok'
"""
_MOST_REASONS = 1_000
_GROUP = 5_000


class Found(msgspec.Struct, frozen=True):
    """Where a row's result is.

    Attributes:
        cause: how it ended.
        file: which of the result files, from 0.
        start, length: of the line, in bytes, with its line break.
    """

    cause: Cause
    file: int
    start: int
    length: int


class ResultIndex:
    """The results in some files, by `custom_id`. A context manager; the index goes at its end.

    Args:
        path: where it is kept; what is there is replaced.
        files: result files; those that do not exist have no results. Later ones count as later.
    """

    def __init__(self, path: Path, files: Iterable[Path]) -> None:
        self._path = path
        self.files = tuple(files)
        self.unreadable = 0
        self.lines = 0
        path.unlink(missing_ok=True)
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -32768", "locking_mode = EXCLUSIVE"):
            self._connection.execute(f"PRAGMA {setting}")
        self._connection.execute(_SCHEMA)
        for number, file in enumerate(self.files):
            self._add(number, file)
        self._readers = [file.open("rb") if file.exists() else None for file in self.files]

    def __enter__(self) -> ResultIndex:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._connection.close()
        self._path.unlink(missing_ok=True)
        for reader in self._readers:
            if reader is not None:
                reader.close()

    @property
    def repeats(self) -> int:
        """Result lines that are of a row which has another that counts."""
        count: int = self._connection.execute("SELECT count(*) FROM results").fetchone()[0]
        return self.lines - self.unreadable - count

    def get(self, custom_id: str) -> Found | None:
        """Where a row's result is; None if it has none."""
        row = self._connection.execute(
            "SELECT cause, file, start, length FROM results WHERE custom_id = ?", (_key(custom_id),)
        ).fetchone()
        return None if row is None else Found(Cause(row[0]), *row[1:])

    def line(self, found: Found) -> bytes:
        """A result line, without its line break."""
        reader = self._readers[found.file]
        assert reader is not None
        reader.seek(found.start)
        return reader.read(found.length).rstrip(b"\n")

    def tally(self, rows: int) -> Tally:
        """Count what became of so many rows."""
        counts = dict(self._connection.execute("SELECT cause, count(*) FROM results GROUP BY cause"))
        ok = counts.get(Cause.ok, 0)
        # A line that cannot be read is of a row that has no other; it failed in a way that nobody knows.
        failed = counts.get(Cause.transient, 0) + counts.get(Cause.permanent, 0)
        unreadable = min(self.unreadable, max(0, rows - sum(counts.values())))
        failed += unreadable
        tokens = self._connection.execute(
            "SELECT sum(sent), sum(received), sum(cached) FROM results WHERE sent IS NOT NULL"
        ).fetchone()
        usage = None if tokens[0] is None else Usage(*tokens)
        models = tuple(
            (model, Usage(*counts))
            for model, *counts in self._connection.execute(
                "SELECT model, sum(sent), sum(received), sum(cached) FROM results WHERE sent IS NOT NULL GROUP BY model"
            )
        )
        reasons = [
            Reason(f"{kind}: {message}".rstrip(": "), count, Cause(cause))
            for kind, cause, message, count in self._connection.execute(
                "SELECT kind, cause, min(message), count(*) FROM results WHERE cause NOT IN ('ok', 'expired', "
                "'cancelled') GROUP BY kind, cause ORDER BY count(*) DESC, kind LIMIT ?",
                (_MOST_REASONS,),
            )
        ]
        if unreadable:
            text = "unreadable_result: the server sent a line that is not a result"
            reasons.append(Reason(text, unreadable))
        return Tally(rows, ok, failed, max(0, rows - ok - failed), usage, tuple(reasons), models)

    def _add(self, number: int, file: Path) -> None:
        rows = []
        self._connection.execute("BEGIN")
        for start, line in _lines(file):
            self.lines += 1
            result = read_result(line)
            if result.custom_id is None:
                self.unreadable += 1
                continue
            rows.append(_row(result, number, start, len(line)))
            if len(rows) == _GROUP:
                self._connection.executemany(_ADD, rows)
                rows.clear()
        self._connection.executemany(_ADD, rows)
        self._connection.execute("COMMIT")


def _row(result: Result, file: int, start: int, length: int) -> tuple[object, ...]:
    kind = "" if result.cause is Cause.ok else " ".join(str(part) for part in (result.status, result.code) if part)
    usage = result.usage
    tokens = (None, None, None) if usage is None else (usage.input_tokens, usage.output_tokens, usage.cached_tokens)
    # SQLite takes no half of a surrogate pair, which JSON may hold.
    message = _key(result.message)
    custom_id = _key(result.custom_id or "")
    return (custom_id, result.cause.value, kind, message, file, start, length, *tokens, _key(result.model))


def _key(custom_id: str) -> str:
    return custom_id.encode("utf-8", "surrogatepass").decode("utf-8", "backslashreplace")


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    if not file.exists():
        return
    start = 0
    with file.open("rb") as lines:
        for line in lines:
            yield start, line
            start += len(line)
