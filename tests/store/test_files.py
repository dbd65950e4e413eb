"""The queries over `files`, on both databases."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from batchery.store import batches, files
from batchery.store.database import Database
from batchery.store.ids import new_id
from batchery.store.schema import LIVE, dead_blobs
from batchery.wire.lines import Problem
from tests.store.examples import NOW, add_batch, add_file


async def test_a_file_comes_back_as_it_went_in(database: Database) -> None:
    problems = files.FileProblems(7, (Problem("invalid_url", "Line 2: é", "url", 2, "ä"), Problem("empty_file", "x")))
    async with database.write() as connection:
        id = await add_file(
            connection,
            filename="größe\u2028.jsonl",
            bytes=2**40,
            models=files.encode_models(("m", "模型")),
            problems=files.encode_problems(problems),
            expires_at=NOW + 1,
        )
    async with database.read() as connection:
        row = await files.get(connection, id)
        assert await files.get(connection, new_id()) is None
    assert row is not None
    assert (row.filename, row.size, row.lines, row.requests) == ("größe\u2028.jsonl", 2**40, 3, 2)
    assert row.models is not None
    assert files.decode_models(row.models) == ("m", "模型")
    assert row.problems is not None
    assert files.decode_problems(row.problems) == problems
    assert (row.blob_key, row.batch_id, row.grows, row.expires_at) == (None, None, False, NOW + 1)


async def test_pages_in_both_orders_without_gaps(database: Database) -> None:
    async with database.write() as connection:
        ids = [await add_file(connection, purpose=("batch", "batch_output")[i % 2]) for i in range(7)]
        await add_file(connection, owner="somebody")
    async with database.read() as connection:
        for newest_first in (True, False):
            for purpose, expected in ((None, ids), ("batch", ids[::2]), ("batch_output", ids[1::2]), ("none", [])):
                seen: list[str] = []
                after = None
                while page := await files.page(
                    connection, "local", limit=2, after=after, newest_first=newest_first, purpose=purpose
                ):
                    assert len(page) <= 2
                    seen += [row.id for row in page]
                    after = page[-1].seq
                assert seen == (expected[::-1] if newest_first else expected)


async def test_an_id_is_never_given_twice(database: Database) -> None:
    """`seq` is the cursor of pages, so a deleted file's must not come back."""
    async with database.write() as connection:
        first = await add_file(connection)
        before = await files.get(connection, first)
        await files.delete(connection, first, NOW)
        assert await files.get(connection, first) is None
        after = await files.get(connection, await add_file(connection))
    assert before is not None
    assert after is not None
    assert after.seq > before.seq


async def test_a_growing_file_has_its_batch_s_length_until_it_is_finished(database: Database) -> None:
    output, error = new_id(), new_id()
    async with database.write() as connection:
        batch = await add_batch(
            connection,
            output_file=output,
            error_file=error,
            output_lines=3,
            output_bytes=300,
            error_lines=1,
            error_bytes=50,
        )
        for id, purpose in ((output, "batch_output"), (error, "batch_error")):
            values = files.growing_file(id=id, owner="local", purpose=purpose, batch=batch, created_at=NOW)
            await files.insert(connection, **values)
    async with database.read() as connection:
        growing = [await files.get(connection, id) for id in (output, error)]
        assert [row.id for row in await files.page(connection, "local", limit=5)] == [error, output]
    assert [(row.size, row.lines, row.grows) for row in growing if row] == [(300, 3, True), (50, 1, True)]
    assert {row.filename for row in growing if row} == {f"batch_{batch}_{kind}.jsonl" for kind in ("output", "error")}

    async with database.write() as connection:
        await files.finish(connection, output, blob_key="k", size=301, lines=4, sha256="s" * 64, expires_at=NOW + 9)
        await batches.change_many(connection, [{"id": batch, "status": "cancelled"}])
    async with database.read() as connection:
        row = await files.get(connection, output)
        other = await files.get(connection, error)
    assert row is not None
    assert (row.size, row.lines, row.blob_key, row.expires_at, row.sha256) == (301, 4, "k", NOW + 9, "s" * 64)
    assert other is not None
    assert (other.size, other.blob_key, other.grows) == (0, None, False)

    async with database.write() as connection:  # run again: the output goes on, the errors go to a file of their own
        changes = {"id": batch, "status": "in_progress", "error_file": None, "output_lines": 6, "output_bytes": 400}
        await batches.change_many(connection, [changes])
    async with database.read() as connection:
        row = await files.get(connection, output)
        other = await files.get(connection, error)
    assert row is not None
    assert (row.size, row.lines, row.blob_size, row.blob_lines, row.grows) == (400, 6, 301, 4, True)
    assert other is not None
    assert not other.grows


async def test_an_expired_file_is_found_only_while_a_live_batch_uses_it(database: Database) -> None:
    async with database.write() as connection:
        gone = await add_file(connection, expires_at=NOW)
        later = await add_file(connection, expires_at=NOW + 1)
        never = await add_file(connection)
        read, was_read = [await add_file(connection, expires_at=NOW) for _ in range(2)]
        await add_batch(connection, input_file=read)
        await add_batch(connection, input_file=read, status="completed")
        await add_batch(connection, input_file=was_read, status="completed")
        ids = {name: new_id() for name in ("output", "error", "old error", "ended")}
        live = await add_batch(connection, output_file=ids["output"], error_file=ids["error"])
        ended = await add_batch(connection, output_file=ids["ended"], status="expired")
        for name, id in ids.items():
            await add_file(connection, id=id, batch_id=ended if name == "ended" else live, expires_at=NOW)
        for at, there in (
            (None, {gone, later, never, read, was_read, *ids.values()}),
            (NOW, {later, never, read, ids["output"], ids["error"]}),
            (NOW + 1, {never, read, ids["output"], ids["error"]}),
        ):
            assert {row.id for row in await files.page(connection, "local", limit=99, at=at)} == there
            for id in (gone, later, never, read, was_read, *ids.values()):
                assert (await files.get(connection, id, at=at) is not None) == (id in there)
        growing = await files.get(connection, ids["output"])
        assert growing is not None
        assert growing.expires_at is None, "it is counted from the end"

        swept = [(await files.delete_expired(connection, NOW + 0.9, limit)).ids for limit in (2, 99)]
        assert len(swept[0]) == 2
        assert sorted(swept[0] + swept[1]) == sorted([gone, was_read, ids["old error"], ids["ended"]])
        assert await files.delete_expired(connection, NOW + 0.9, 99) == files.Gone([], [])


async def test_deleting_a_file_notes_its_blobs(database: Database) -> None:
    async with database.write() as connection:
        kept = await add_file(connection, blob_key="files/kept")
        some = await add_file(connection, blob_key="files/a", index_key="index/a", expires_at=NOW)
        other = await add_file(connection, blob_key="files/b")
        empty = await add_file(connection, batch_id="b" * 32, bytes=0)
        written = await add_file(connection, batch_id="b" * 32, bytes=1)
        assert await files.delete(connection, other, NOW) == files.Gone([other], ["files/b"])
        assert await files.delete(connection, other, NOW) == files.Gone([], [])
        assert await files.delete_expired(connection, NOW, 9) == files.Gone([some], ["files/a", "index/a"])
        assert (await files.delete_empty(connection, "b" * 32, NOW)).ids == [empty]
        assert {row.id for row in await files.page(connection, "local", limit=9)} == {kept, written}
        noted = await connection.execute(sa.select(dead_blobs.c.key))
        assert set(noted.scalars()) == {"files/a", "index/a", "files/b"}


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing", "cancelling", "completed", "failed"])
async def test_a_file_is_in_use_while_a_batch_that_names_it_lives(database: Database, status: str) -> None:
    async with database.write() as connection:
        await add_batch(connection, status=status, input_file="i" * 32, output_file="o" * 32, error_file="e" * 32)
        for letter in "ioe":
            assert await batches.live_of_file(connection, letter * 32) == (status in LIVE)
        assert not await batches.live_of_file(connection, "x" * 32)
