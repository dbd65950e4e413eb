"""Queries over `files`: uploads, and the output and error files of batches."""

from __future__ import annotations

from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store.rows import typed
from batchery.store.schema import batches, files
from batchery.wire.lines import Problem


class FileRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `files`. For a file that still grows, `size` (in bytes) and `lines` are its length as of the reading."""

    seq: int
    id: str
    owner: str
    purpose: str
    filename: str
    status: str
    status_details: str | None
    size: int
    created_at: int
    expires_at: int | None
    blob_key: str | None
    sha256: str | None
    lines: int
    requests: int
    models: bytes | None
    index_key: str | None
    problems: bytes | None
    batch_id: str | None
    batch_status: str | None


class FileProblems(msgspec.Struct, frozen=True):
    """What is wrong with an upload, as stored.

    Attributes:
        count: how many problems there are.
        data: the first of them.
    """

    count: int
    data: tuple[Problem, ...]


encode_problems = msgspec.msgpack.Encoder().encode
decode_problems = msgspec.msgpack.Decoder(FileProblems).decode
encode_models = msgspec.msgpack.Encoder().encode
decode_models = msgspec.msgpack.Decoder(tuple[str, ...]).decode

_growing = files.c.blob_key.is_(None) & files.c.batch_id.is_not(None)
_is_output = files.c.purpose == "batch_output"
_length = (
    sa.case(
        (_growing & _is_output, batches.c.output_bytes), (_growing, batches.c.error_bytes), else_=files.c.bytes
    ).label("size"),
    sa.case(
        (_growing & _is_output, batches.c.output_lines), (_growing, batches.c.error_lines), else_=files.c.lines
    ).label("lines"),
    batches.c.status.label("batch_status"),
)
_with_batch = files.outerjoin(batches, files.c.batch_id == batches.c.id)
_plain = [column for column in files.c if column.name not in ("bytes", "lines")]
_select = sa.select(*_plain, *_length).select_from(_with_batch)
_select_light = sa.select(
    *(sa.null().label(column.name) if column.name in ("models", "problems") else column for column in _plain), *_length
).select_from(_with_batch)


async def insert(connection: AsyncConnection, **values: Any) -> None:
    """Add a file; `values` are the columns, of which `seq` is made here."""
    await connection.execute(sa.insert(files).values(**values))


def growing_file(*, id: str, owner: str, purpose: str, batch: str, created_at: int) -> dict[str, Any]:
    """The columns of an output or error file that has no content yet."""
    return {
        "id": id,
        "owner": owner,
        "purpose": purpose,
        "filename": f"batch_{batch}_{'output' if purpose == 'batch_output' else 'error'}.jsonl",
        "status": "processed",
        "bytes": 0,
        "created_at": created_at,
        "lines": 0,
        "requests": 0,
        "batch_id": batch,
    }


async def get(connection: AsyncConnection, id: str) -> FileRow | None:
    """The file with this id, whoever owns it."""
    return typed(FileRow, (await connection.execute(_select.where(files.c.id == id))).one_or_none())


async def lock(connection: AsyncConnection, id: str) -> bool:
    """Hold a file until the end of the transaction, so that it is not deleted while a batch is made over it.

    Returns:
        Whether it exists.
    """
    found = await connection.execute(sa.select(files.c.id).where(files.c.id == id).with_for_update())
    return found.first() is not None


async def page(
    connection: AsyncConnection,
    owner: str,
    *,
    limit: int,
    after: int | None = None,
    newest_first: bool = True,
    purpose: str | None = None,
) -> list[FileRow]:
    """An owner's files in order of creation, without their `models` and `problems`, which could be megabytes each.

    Args:
        limit: at most so many rows.
        after: the `seq` of the last row of the page before.
        newest_first: the order.
        purpose: only files with this one.
    """
    query = _select_light.where(files.c.owner == owner)
    if purpose is not None:
        query = query.where(files.c.purpose == purpose)
    if after is not None:
        query = query.where(files.c.seq < after if newest_first else files.c.seq > after)
    query = query.order_by(files.c.seq.desc() if newest_first else files.c.seq.asc()).limit(limit)
    return [FileRow(**row._mapping) for row in await connection.execute(query)]


async def finish(
    connection: AsyncConnection,
    id: str,
    *,
    blob_key: str,
    size: int,
    lines: int,
    sha256: str,
    expires_at: int | None,
) -> None:
    """A growing file is complete: its content is now this blob."""
    await connection.execute(
        sa.update(files)
        .where(files.c.id == id)
        .values(blob_key=blob_key, bytes=size, lines=lines, sha256=sha256, expires_at=expires_at)
    )


async def delete(connection: AsyncConnection, id: str) -> None:
    """Forget a file; its blobs are the caller's to delete after the commit."""
    await connection.execute(sa.delete(files).where(files.c.id == id))


async def blob_keys(connection: AsyncConnection) -> set[str]:
    """Every blob that a file refers to; what else lies in the store is a remnant."""
    found = await connection.execute(sa.select(files.c.blob_key, files.c.index_key))
    return {key for row in found for key in row if key is not None}
