"""The API's objects, and the bodies of its requests with the rules they must pass.

Nulls are sent as null, times are whole Unix seconds, and field order is the contract's.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from batchery.wire import strict_json
from batchery.wire.errors import BadRequest
from batchery.wire.lines import URLS

FileStatus = Literal["processed", "error"]
Purpose = Literal["batch", "batch_output", "batch_error"]
BatchStatus = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]

MIN_EXPIRY = 3_600
MAX_EXPIRY = 2_592_000
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512


class FileObject(msgspec.Struct, kw_only=True):
    """A file: uploaded (`batch`) or produced (`batch_output`, `batch_error`)."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: FileStatus
    status_details: str | None = None
    expires_at: int | None = None


class DeletedFile(msgspec.Struct, kw_only=True):
    """The answer to a file's deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class RequestCounts(msgspec.Struct, kw_only=True):
    """How many requests a batch has, and how many of them have ended in either way. Requests that never ran are in
    neither of the last two."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(msgspec.Struct, kw_only=True):
    """One thing wrong with a batch or a line of its input file."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(msgspec.Struct, kw_only=True):
    """Everything wrong with a batch."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class InputTokensDetails(msgspec.Struct, kw_only=True):
    """Of the input tokens, those that came from a prompt cache."""

    cached_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, kw_only=True):
    """Of the output tokens, those spent on reasoning."""

    reasoning_tokens: int = 0


class BatchUsage(msgspec.Struct, kw_only=True):
    """Tokens summed over a batch's answers."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class BatchObject(msgspec.Struct, kw_only=True):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    usage: BatchUsage | None = None
    metadata: dict[str, str]


class FileList(msgspec.Struct, kw_only=True):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchList(msgspec.Struct, kw_only=True):
    """A page of batches."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Model(msgspec.Struct, kw_only=True):
    """A model that an upstream serves."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "upstream"


class ModelList(msgspec.Struct, kw_only=True):
    """All models that the upstreams serve."""

    object: Literal["list"] = "list"
    data: list[Model]


class ExpiresAfter(msgspec.Struct, kw_only=True, frozen=True):
    """When a file may be deleted: so many seconds after its creation."""

    seconds: int
    anchor: Literal["created_at"] = "created_at"


class CreateBatch(msgspec.Struct, kw_only=True, frozen=True):
    """The body of `POST /batches`, for the OpenAPI document; `parse_create_batch` reads it."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


def parse_create_batch(data: bytes) -> CreateBatch:
    """Read and check the body of `POST /batches`. Whether the window is offered is for `windows.require_window`.

    Raises:
        BadRequest: names the field, its value and what would be accepted.
    """
    try:
        body = strict_json.loads(data)
    except strict_json.NotJson as error:
        raise BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if type(body) is not dict:
        raise BadRequest("The body must be a JSON object.", code="invalid_type")
    return CreateBatch(
        input_file_id=_string(body, "input_file_id"),
        endpoint=_endpoint(body),
        completion_window=_string(body, "completion_window"),
        metadata=_metadata(body.get("metadata")),
        output_expires_after=_output_expires_after(body.get("output_expires_after")),
    )


def _string(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if value is None:
        raise BadRequest(f"The field {field!r} is required.", param=field, code="missing_required_parameter")
    if type(value) is not str or not value:
        raise BadRequest(
            f"{field} must be a non-empty string, not {strict_json.describe(value)}.", param=field, code="invalid_type"
        )
    return value


def _endpoint(body: dict[str, Any]) -> str:
    endpoint = _string(body, "endpoint")
    if endpoint not in URLS:
        raise BadRequest(
            f"endpoint {strict_json.describe(endpoint)} is not supported; use one of: {', '.join(URLS)}.",
            param="endpoint",
            code="invalid_value",
        )
    return endpoint


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if type(value) is not dict:
        raise BadRequest(
            f"metadata must be an object of strings, not {strict_json.kind(value)}.",
            param="metadata",
            code="invalid_type",
        )
    if len(value) > MAX_METADATA:
        raise BadRequest(
            f"metadata has {len(value)} pairs; the most is {MAX_METADATA}.", param="metadata", code="invalid_value"
        )
    for key, text in value.items():
        if len(key) > MAX_METADATA_KEY:
            raise BadRequest(
                f"A metadata key has {len(key)} characters; the most is {MAX_METADATA_KEY}.",
                param="metadata",
                code="invalid_value",
            )
        if type(text) is not str:
            raise BadRequest(
                f"metadata[{key!r}] must be a string, not {strict_json.describe(text)}.",
                param=f"metadata.{key}",
                code="invalid_type",
            )
        if len(text) > MAX_METADATA_VALUE:
            raise BadRequest(
                f"metadata[{key!r}] has {len(text)} characters; the most is {MAX_METADATA_VALUE}.",
                param=f"metadata.{key}",
                code="invalid_value",
            )
    return value


def _output_expires_after(value: Any) -> ExpiresAfter | None:
    if value is None:
        return None
    if type(value) is not dict:
        raise BadRequest(
            f"output_expires_after must be an object with anchor and seconds, not {strict_json.kind(value)}.",
            param="output_expires_after",
            code="invalid_type",
        )
    return check_expires_after(value.get("anchor"), value.get("seconds"), "output_expires_after")


def check_expires_after(anchor: Any, seconds: Any, param: str) -> ExpiresAfter:
    """Check an expiry rule.

    Args:
        anchor: must be `created_at`.
        seconds: a whole number from 3 600 to 2 592 000.
        param: the field's name, for the message.

    Raises:
        BadRequest: either is missing or not accepted.
    """
    if anchor != "created_at":
        raise BadRequest(
            f"{param}[anchor] must be 'created_at', not {strict_json.describe(anchor)}.",
            param=f"{param}.anchor",
            code="invalid_value",
        )
    if type(seconds) is not int or not MIN_EXPIRY <= seconds <= MAX_EXPIRY:
        raise BadRequest(
            f"{param}[seconds] must be a whole number from {MIN_EXPIRY} to {MAX_EXPIRY}, "
            f"not {strict_json.describe(seconds)}.",
            param=f"{param}.seconds",
            code="invalid_value",
        )
    return ExpiresAfter(seconds=seconds)
