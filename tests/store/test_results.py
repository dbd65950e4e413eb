"""The queries over `results`: the log is read in segments, from any line on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from batchery.store import results
from batchery.store.database import Database, sqlite_url
from batchery.wire.results import Kind
from tests.store.examples import add_batch, recorded_requests, segment


async def write(database: Database, batch: str, kind: Kind, sizes: list[int]) -> list[bytes]:
    """Segments of these many lines; the lines."""
    lines: list[bytes] = []
    segments = []
    for size in sizes:
        new = [f"{kind} {len(lines) + i}\n".encode() for i in range(size)]
        segments.append(segment(batch, kind, len(lines), new))
        lines += new
    async with database.write() as connection:
        await results.insert(connection, segments)
    return lines


async def read_from(database: Database, batch: str, kind: Kind, first: int, segments: int) -> tuple[int, list[bytes]]:
    """What one read gives: the position of its first line, and the lines."""
    async with database.read() as connection:
        found = await results.read(connection, batch, kind, first, segments=segments)
    lines: list[bytes] = []
    for piece in found:
        assert piece.position == found[0].position + len(lines)
        start = 0
        for end in piece.ends:
            lines.append(piece.body[start:end])
            start = end
        assert start == len(piece.body)
    return (found[0].position if found else -1), lines


async def test_every_line_can_be_the_first(database: Database) -> None:
    async with database.write() as connection:
        batch, other = await add_batch(connection), await add_batch(connection)
    lines = await write(database, batch, "output", [3, 1, 2])
    errors = await write(database, batch, "error", [1, 1])
    await write(database, other, "output", [9])
    for first, begins in ((0, 0), (1, 0), (2, 0), (3, 3), (4, 4), (5, 4)):
        assert await read_from(database, batch, "output", first, 9) == (begins, lines[begins:])
        one = await read_from(database, batch, "output", first, 1)
        assert one[0] == begins
        assert first - begins < len(one[1])
    for first in (6, 7, 2**40):
        assert await read_from(database, batch, "output", first, 9) == (-1, [])
    assert await read_from(database, batch, "error", 1, 9) == (1, errors[1:])
    assert await read_from(database, "0" * 32, "output", 0, 9) == (-1, [])


@given(st.lists(st.integers(1, 6), max_size=12), st.integers(1, 5), st.data())
@settings(max_examples=25)
def test_reading_on_gives_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], segments: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, sum(sizes) + 2))

    async def check(folder: Path) -> None:
        database = Database(sqlite_url(folder / "a.db"))
        await database.migrate()
        async with database.write() as connection:
            batch = await add_batch(connection)
        lines = await write(database, batch, "output", sizes) if sizes else []
        wanted, position = lines[first:], first
        found: list[bytes] = []
        while (piece := await read_from(database, batch, "output", position, segments))[1]:
            assert piece[0] <= position
            found += piece[1][position - piece[0] :]
            position = piece[0] + len(piece[1])
        assert found == wanted
        await database.close()

    asyncio.run(check(tmp_path_factory.mktemp("log")))


async def test_a_position_is_given_once(database: Database) -> None:
    async with database.write() as connection:
        batch = await add_batch(connection)
    lines = await write(database, batch, "output", [2])
    with pytest.raises(sa.exc.IntegrityError):
        await write(database, batch, "output", [1])
    assert await read_from(database, batch, "output", 0, 9) == (0, lines)


async def test_bodies_come_back_byte_for_byte(database: Database) -> None:
    body = bytes(range(256)) * 5000
    async with database.write() as connection:
        batch = await add_batch(connection)
        await results.insert(connection, [segment(batch, "error", 0, [body])])
        await results.insert(connection, [segment(batch, "error", 1, [b""])])
    assert await read_from(database, batch, "error", 0, 9) == (0, [body, b""])


async def test_the_requests_that_are_recorded(database: Database) -> None:
    async with database.write() as connection:
        batch = await add_batch(connection)
        assert list(await recorded_requests(connection, batch)) == []
    await write(database, batch, "output", [2, 1])
    await write(database, batch, "error", [2])
    async with database.read() as connection:
        assert sorted(await recorded_requests(connection, batch)) == [0, 0, 1, 1, 2]


async def test_a_log_is_dropped_a_few_segments_at_a_time(database: Database) -> None:
    async with database.write() as connection:
        batch, other = await add_batch(connection), await add_batch(connection)
    for kind in ("output", "error"):
        await write(database, batch, kind, [1] * 5)
        await write(database, other, kind, [1])
    async with database.write() as connection:
        dropped = [await results.drop_some(connection, batch, 4) for _ in range(4)]
        assert dropped == [4, 4, 2, 0]
        assert list(await recorded_requests(connection, batch)) == []
        assert len(await recorded_requests(connection, other)) == 2
