"""The objects' fields are the contract's, in order, and nulls are sent."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from batchery.wire import objects

FILE = objects.FileObject(id="file-1", bytes=1, created_at=2, filename="f", purpose="batch", status="processed")
BATCH = objects.BatchObject(
    id="batch_1",
    endpoint="/v1/embeddings",
    input_file_id="file-1",
    completion_window="24h",
    status="validating",
    created_at=1,
    expires_at=2,
    request_counts=objects.RequestCounts(),
    metadata={},
)
EMPTY_PAGE: dict[str, Any] = {"data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize(
    ("value", "fields"),
    [
        (FILE, "id object bytes created_at filename purpose status status_details expires_at"),
        (objects.DeletedFile(id="file-1"), "id object deleted"),
        (
            BATCH,
            "id object endpoint model errors input_file_id completion_window status output_file_id error_file_id "
            "created_at in_progress_at expires_at finalizing_at completed_at failed_at expired_at cancelling_at "
            "cancelled_at request_counts usage estimated_completion_at deduplicated metadata",
        ),
        (
            objects.FileList(data=[], first_id=None, last_id=None, has_more=False),
            "object data first_id last_id has_more",
        ),
        (
            objects.BatchList(data=[], first_id=None, last_id=None, has_more=False),
            "object data first_id last_id has_more",
        ),
        (objects.RequestCounts(), "total completed failed"),
        (objects.BatchError(code="c", message="m"), "code message param line"),
        (objects.ModelList(data=[]), "object data"),
        (objects.Model(id="m"), "id object created owned_by"),
    ],
)
def test_fields_are_the_contracts_in_order_and_nulls_are_sent(value: msgspec.Struct, fields: str) -> None:
    assert list(json.loads(msgspec.json.encode(value))) == fields.split()


def test_the_constants_of_objects() -> None:
    assert json.loads(msgspec.json.encode(FILE))["object"] == "file"
    assert json.loads(msgspec.json.encode(objects.DeletedFile(id="x"))) == {
        "id": "x",
        "object": "file",
        "deleted": True,
    }
    batch = json.loads(msgspec.json.encode(BATCH))
    assert batch["object"] == "batch"
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert batch["metadata"] == {}
    assert batch["usage"] is None


def test_usage_is_whole() -> None:
    usage = objects.BatchUsage(
        input_tokens=1,
        input_tokens_details=objects.InputTokensDetails(),
        output_tokens=2,
        output_tokens_details=objects.OutputTokensDetails(),
        total_tokens=3,
    )
    assert json.loads(msgspec.json.encode(usage)) == {
        "input_tokens": 1,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 3,
    }
