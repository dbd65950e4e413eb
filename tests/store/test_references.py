"""Every blob that the database knows of, and which database it is."""

from __future__ import annotations

import asyncio

import sqlalchemy as sa

from batchery.store import dead_blobs, identity, references, uploads
from batchery.store.database import Database
from batchery.store.ids import new_id
from batchery.store.schema import metadata
from tests.store.examples import NOW, add_batch, add_file


def test_no_column_with_a_blob_s_key_is_left_out() -> None:
    """Whatever has the type of a key is one; forgotten here, its blobs would be swept."""
    keys = {
        column
        for table in metadata.sorted_tables
        for column in table.columns
        if isinstance(column.type, sa.String) and column.type.length == 128
    }
    assert set(references.COLUMNS) == keys


async def test_every_kind_of_reference_counts(database: Database) -> None:
    upload = new_id()
    async with database.write() as connection:
        await add_file(connection, blob_key="files/a", index_key="index/a")
        await add_file(connection)
        await add_file(connection, blob_key="output/b")
        await add_batch(connection, result_index="results/c")
        await add_batch(connection)
        await uploads.insert(
            connection,
            id=upload,
            owner="local",
            filename="f",
            mime_type="t",
            bytes=1,
            status="pending",
            created_at=NOW,
            expires_at=NOW,
        )
        await uploads.insert_part(
            connection, id=new_id(), upload_id=upload, bytes=1, md5="m" * 32, blob_key="parts/d", created_at=NOW
        )
        await dead_blobs.note(connection, ["files/dead", "filesystem/not"], NOW)
    async with database.read() as connection:
        found = {kind: await references.blobs(connection, kind) for kind in ("files", "index", "output", "error")}
        assert found == {
            "files": {"files/a", "files/dead"},
            "index": {"index/a"},
            "output": {"output/b"},
            "error": set(),
        }
        assert await references.blobs(connection, "results") == {"results/c"}
        assert await references.blobs(connection, "parts") == {"parts/d"}


async def test_a_database_has_one_identity_for_ever(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(3)]
    await databases[0].migrate()

    async def ask(database: Database) -> str:
        async with database.write() as connection:
            return await identity.get(connection)

    found = await asyncio.gather(*(ask(database) for database in databases * 3))
    assert len(set(found)) == 1
    assert len(found[0]) == 32
    for database in databases:
        await database.close()
