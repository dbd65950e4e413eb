"""Rows as the API's objects. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import msgspec

from batchery.store.batches import BatchRow, decode_errors, decode_metadata, deduplicated, usage
from batchery.store.files import FileRow
from batchery.store.uploads import PartRow, UploadRow
from batchery.wire import ids
from batchery.wire.objects import (
    BatchErrors,
    BatchList,
    BatchObject,
    BatchStatus,
    FileList,
    FileObject,
    FileStatus,
    Purpose,
    RequestCounts,
)
from batchery.wire.uploads import PartObject, StoredPart, UploadObject, UploadStatus, UploadWithParts


def file_object(row: FileRow) -> FileObject:
    """A file as the API shows it."""
    return FileObject(
        id=ids.show("file", row.id),
        bytes=row.size,
        created_at=row.created_at,
        filename=row.filename,
        purpose=cast(Purpose, row.purpose),
        status=cast(FileStatus, row.status),
        status_details=row.status_details,
        expires_at=row.expires_at,
    )


def batch_object(row: BatchRow, done_at: int | None) -> BatchObject:
    """A batch as the API shows it.

    Args:
        done_at: when it is expected to be done.
    """
    return BatchObject(
        id=ids.show("batch", row.id),
        endpoint=row.endpoint,
        model=row.model,
        errors=None if row.errors is None else BatchErrors(data=decode_errors(row.errors)),
        input_file_id=ids.show("file", row.input_file),
        completion_window=row.window,
        status=cast(BatchStatus, row.status),
        output_file_id=ids.show("file", row.output_file),
        error_file_id=None if row.error_file is None else ids.show("file", row.error_file),
        created_at=row.created_at,
        in_progress_at=row.in_progress_at,
        expires_at=row.expires_at,
        finalizing_at=row.finalizing_at,
        completed_at=row.completed_at,
        failed_at=row.failed_at,
        expired_at=row.expired_at,
        cancelling_at=row.cancelling_at,
        cancelled_at=row.cancelled_at,
        request_counts=RequestCounts(total=row.total, completed=row.completed, failed=row.failed),
        usage=usage(row),
        estimated_completion_at=done_at,
        deduplicated=deduplicated(row),
        metadata=decode_metadata(row.metadata),
    )


def file_page(rows: Sequence[FileRow], limit: int) -> FileList:
    """A page of at most `limit` files, from up to one row more, which says whether there are further ones."""
    data = [file_object(row) for row in rows[:limit]]
    return FileList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(rows) > limit,
    )


def batch_page(rows: Sequence[BatchRow], limit: int, done_at: Sequence[int | None]) -> BatchList:
    """A page of at most `limit` batches, likewise, and when each is expected to be done."""
    data = [batch_object(row, at) for row, at in zip(rows[:limit], done_at, strict=True)]
    return BatchList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(rows) > limit,
    )


def upload_object(row: UploadRow, file: FileRow | None, now: int) -> UploadObject:
    """An upload as the API shows it.

    Args:
        file: what it has become, if that is there.
        now: Unix seconds.
    """
    return UploadObject(
        id=ids.show("upload", row.id),
        bytes=row.bytes,
        created_at=row.created_at,
        filename=row.filename,
        status=cast(UploadStatus, row.status_at(now)),
        expires_at=row.expires_at,
        file=None if file is None else file_object(file),
    )


def upload_with_parts(row: UploadRow, file: FileRow | None, parts: Sequence[PartRow], now: int) -> UploadWithParts:
    """An upload and its parts, likewise."""
    stored = [
        StoredPart(
            id=ids.show("part", part.id),
            created_at=part.created_at,
            upload_id=ids.show("upload", part.upload_id),
            bytes=part.bytes,
            md5=part.md5,
        )
        for part in parts
    ]
    return UploadWithParts(**msgspec.structs.asdict(upload_object(row, file, now)), parts=stored)


def part_object(row: PartRow) -> PartObject:
    """A part as the API shows it."""
    return PartObject(
        id=ids.show("part", row.id), created_at=row.created_at, upload_id=ids.show("upload", row.upload_id)
    )
