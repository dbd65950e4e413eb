"""Rows as the API's objects. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from batchery.store.batches import BatchRow, decode_errors, decode_metadata
from batchery.store.files import FileRow
from batchery.wire import ids
from batchery.wire.objects import (
    BatchErrors,
    BatchList,
    BatchObject,
    BatchStatus,
    BatchUsage,
    FileList,
    FileObject,
    FileStatus,
    InputTokensDetails,
    OutputTokensDetails,
    Purpose,
    RequestCounts,
)


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


def batch_object(row: BatchRow) -> BatchObject:
    """A batch as the API shows it."""
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
        usage=_usage(row),
        metadata=decode_metadata(row.metadata),
    )


def _usage(row: BatchRow) -> BatchUsage | None:
    if row.input_tokens == 0 and row.output_tokens == 0:
        return None
    return BatchUsage(
        input_tokens=row.input_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=row.cached_tokens),
        output_tokens=row.output_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=row.reasoning_tokens),
        total_tokens=row.input_tokens + row.output_tokens,
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


def batch_page(rows: Sequence[BatchRow], limit: int) -> BatchList:
    """A page of at most `limit` batches, likewise."""
    data = [batch_object(row) for row in rows[:limit]]
    return BatchList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(rows) > limit,
    )
