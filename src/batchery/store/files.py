"""Queries over `files`: uploads, and the output and error files of batches.

A file that has expired is there no more for those who ask through the API (`at`), swept or not; but as long as a live
batch reads or writes it, it stays. No query here takes a row away without noting its blobs dead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from batchery.store import dead_blobs
from batchery.store.rows import all_typed, typed
from batchery.store.schema import LIVE_SQL, batches, files
from batchery.wire.file_index import Groups
from batchery.wire.lines import Problem


class FileRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `files`.

    `size` (in bytes) and `lines` are the file's length as of the reading. While `grows`, the first `blob_lines` of
    these lines, `blob_size` bytes, are in its blob if there is one, and the rest is in the result log; and it has no
    `expires_at`, because that is counted from its end.
    """

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
    groups: bytes | None
    batch_id: str | None
    api_key: str | None
    grows: bool
    blob_size: int
    blob_lines: int


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
encode_groups = msgspec.msgpack.Encoder().encode
decode_groups = msgspec.msgpack.Decoder(Groups).decode

_grows = batches.c.status.in_(LIVE_SQL) & ((files.c.id == batches.c.output_file) | (files.c.id == batches.c.error_file))
_is_output = files.c.purpose == "batch_output"
_length = (
    sa.case((_grows & _is_output, batches.c.output_bytes), (_grows, batches.c.error_bytes), else_=files.c.bytes).label(
        "size"
    ),
    sa.case((_grows & _is_output, batches.c.output_lines), (_grows, batches.c.error_lines), else_=files.c.lines).label(
        "lines"
    ),
    sa.case((_grows, sa.true()), else_=sa.false()).label("grows"),
    sa.case((_grows, sa.null()), else_=files.c.expires_at).label("expires_at"),
    files.c.bytes.label("blob_size"),
    files.c.lines.label("blob_lines"),
)
_with_batch = files.outerjoin(batches, files.c.batch_id == batches.c.id)
_plain = [column for column in files.c if column.name not in ("bytes", "lines", "expires_at")]
_select = sa.select(*_plain, *_length).select_from(_with_batch)
_select_light = sa.select(
    *(sa.null().label(column.name) if column.name in ("models", "problems", "groups") else column for column in _plain),
    *_length,
).select_from(_with_batch)

_get = _select.where(files.c.id == sa.bindparam("of_id"))
_lock = sa.select(files.c.id).where(files.c.id == sa.bindparam("of_id")).with_for_update()
_insert = sa.insert(files)

_users = batches.alias("users")
_in_use = sa.exists().where(_users.c.input_file == files.c.id, _users.c.status.in_(LIVE_SQL)) | sa.exists().where(
    _users.c.id == files.c.batch_id,
    _users.c.status.in_(LIVE_SQL),
    (_users.c.output_file == files.c.id) | (_users.c.error_file == files.c.id),
)
"""Whether a live batch reads or writes the file; both halves are found by an index."""


def _exists_at(moment: int) -> sa.ColumnElement[bool]:
    return files.c.expires_at.is_(None) | (files.c.expires_at > moment) | _in_use


class Gone(msgspec.Struct, frozen=True):
    """Files that were deleted.

    Attributes:
        ids: theirs.
        blob_keys: what they referred to, now noted dead.
    """

    ids: list[str]
    blob_keys: list[str]


async def insert(connection: AsyncConnection, **values: Any) -> None:
    """Add a file; `values` are the columns, of which `seq` is made here."""
    await connection.execute(_insert, values)


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


async def get(connection: AsyncConnection, id: str, *, at: int | None = None) -> FileRow | None:
    """The file with this id, whoever owns it.

    Args:
        at: Unix seconds; then a file that has expired by this moment is found only while a live batch uses it. Without
            it the row is found as long as there is one.
    """
    query = _get if at is None else _get.where(_exists_at(at))
    return typed(FileRow, (await connection.execute(query, {"of_id": id})).one_or_none())


class Place(msgspec.Struct, frozen=True):
    """Where an uploaded file and its line index are, by their blobs' keys."""

    blob_key: str
    index_key: str


_places = sa.select(files.c.id, files.c.blob_key, files.c.index_key).where(
    files.c.id.in_(sa.bindparam("ids", expanding=True)), files.c.blob_key.is_not(None), files.c.index_key.is_not(None)
)


async def places(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, Place]:
    """Where these uploads are; those that are not there, or have no index, are not among the answers."""
    found = await connection.execute(_places, {"ids": ids})
    return {id: Place(blob_key, index_key) for id, blob_key, index_key in found}


async def lock(connection: AsyncConnection, id: str) -> bool:
    """Hold a file until the end of the transaction, so that it is not deleted while a batch is made over it.

    Returns:
        Whether it exists.
    """
    found = await connection.execute(_lock, {"of_id": id})
    return found.first() is not None


async def page(
    connection: AsyncConnection,
    owner: str,
    *,
    limit: int,
    after: int | None = None,
    newest_first: bool = True,
    purpose: str | None = None,
    at: int | None = None,
) -> list[FileRow]:
    """An owner's files in order of creation, without `models`, `problems` and `groups`, which could be megabytes each.

    Args:
        limit: at most so many rows.
        after: the `seq` of the last row of the page before.
        newest_first: the order.
        purpose: only files with this one.
        at: as in `get`: what has expired by then is left out.
    """
    query = _select_light.where(files.c.owner == owner)
    if at is not None:
        query = query.where(_exists_at(at))
    if purpose is not None:
        query = query.where(files.c.purpose == purpose)
    if after is not None:
        query = query.where(files.c.seq < after if newest_first else files.c.seq > after)
    query = query.order_by(files.c.seq.desc() if newest_first else files.c.seq.asc()).limit(limit)
    return all_typed(FileRow, await connection.execute(query))


async def bytes_of_key(connection: AsyncConnection, key: str, now: int) -> int:
    """The bytes of the files that were uploaded with an API key (its bare id) and have not expired."""
    found = await connection.execute(
        sa.select(sa.func.coalesce(sa.func.sum(files.c.bytes), 0)).where(
            files.c.api_key == key,
            files.c.purpose == "batch",
            files.c.expires_at.is_(None) | (files.c.expires_at > now),
        )
    )
    return int(found.scalar_one())


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


_FINISHED = ("blob_key", "bytes", "lines", "sha256", "expires_at")
_finish = (
    sa.update(files)
    .where(files.c.id == sa.bindparam("of_id"))
    .values({name: sa.bindparam(f"new_{name}") for name in _FINISHED})
)


async def finish_many(connection: AsyncConnection, finished: Sequence[Mapping[str, Any]]) -> None:
    """The same for several.

    Args:
        finished: for each `id`, `blob_key`, `bytes`, `lines`, `sha256` and `expires_at`.
    """
    if not finished:
        return
    await connection.execute(
        _finish,
        [{"of_id": file["id"]} | {f"new_{name}": file[name] for name in _FINISHED} for file in finished],
    )


async def keep(connection: AsyncConnection, id: str) -> None:
    """A file does not expire, for now: it grows again."""
    await connection.execute(sa.update(files).where(files.c.id == id).values(expires_at=None))


async def delete(connection: AsyncConnection, id: str, now: float) -> Gone:
    """Forget a file.

    Args:
        now: Unix seconds.
    """
    return await _delete(connection, files.c.id == id, now)


async def delete_expired(connection: AsyncConnection, now: float, limit: int) -> Gone:
    """Forget up to `limit` files that have expired and that no live batch uses, those that expired first.

    Any number of workers may do this at once; each takes others.

    Args:
        now: Unix seconds.
    """
    expired = files.c.expires_at <= int(now)
    found = await connection.execute(
        sa.select(files.c.id)
        .where(expired, ~_in_use)
        .order_by(files.c.expires_at)
        .limit(limit)
        .with_for_update(skip_locked=True, of=files)
    )
    ids = list(found.scalars())
    # Who makes a batch over a file locks it first (`lock`). So now that these are locked, a second look sees each batch
    # that was made before, and there can be no further one.
    return await _delete(connection, files.c.id.in_(ids) & expired & ~_in_use, now) if ids else Gone([], [])


async def delete_empty(connection: AsyncConnection, batch: str, now: float) -> Gone:
    """Forget the files of an ended batch that nothing was ever written to.

    Args:
        batch: its id.
        now: Unix seconds.
    """
    return await _delete(connection, (files.c.batch_id == batch) & (files.c.bytes == 0) & ~_in_use, now)


async def _delete(connection: AsyncConnection, which: sa.ColumnElement[bool], now: float) -> Gone:
    deleted = await connection.execute(
        sa.delete(files).where(which).returning(files.c.id, files.c.blob_key, files.c.index_key)
    )
    rows: Sequence[Any] = deleted.all()
    keys = [key for row in rows for key in (row.blob_key, row.index_key) if key is not None]
    await dead_blobs.note(connection, keys, now)
    return Gone([row.id for row in rows], keys)
