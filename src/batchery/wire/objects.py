"""The API's objects, as its answers show them.

Nulls are sent as null, times are whole Unix seconds, and field order is the contract's.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from batchery.wire.estimates import EstimateBasis, GroupEstimate

FileStatus = Literal["processed", "error"]
Purpose = Literal["batch", "batch_output", "batch_error"]
BatchStatus = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]

OnInvalidLine = Literal["fail", "skip"]


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


class Deduplicated(msgspec.Struct, kw_only=True):
    """Of a batch's completed requests those that were answered by the answer of a duplicate.

    Attributes:
        requests: how many; none of them was sent.
        input_tokens, output_tokens, total_tokens: what they would have taken; not in the batch's `usage`.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    total_tokens: int


class BatchObject(msgspec.Struct, kw_only=True):
    """A batch.

    Attributes:
        estimated_completion_at: when it is expected to be done; null while nothing is known, and once it has ended. It
            may be later than `expires_at`, and then the batch would expire.
        deduplicated: what was saved so far by sending duplicates once; null where that was not asked for.
    """

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
    estimated_completion_at: int | None = None
    deduplicated: Deduplicated | None = None
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


class ValidationCounts(msgspec.Struct, kw_only=True):
    """How many good requests an input file has."""

    total: int


class Load(msgspec.Struct, kw_only=True):
    """What the server has to do before a new batch would be done.

    Attributes:
        queued_requests: those without a result in live batches that are due no later.
        requests_per_second: at which they end just now; null while nothing is known.
    """

    queued_requests: int
    requests_per_second: float | None


class BatchValidation(msgspec.Struct, kw_only=True):
    """What would become of a batch over a file, without making it.

    Attributes:
        valid: whether the file has no bad line.
        runnable: whether the batch would run, with `on_invalid_line` as it was sent.
        errors: the first 1 000 things wrong with the file; null if there is none.
        error_count: how many there are in all.
        groups: the good requests by model and url, with what they would take; null, as all estimates of tokens and
            cost, for a file that was uploaded before these were counted.
        estimated_cost: in `currency`; null where the server does not know the price of each model.
        estimated_completion_at: null if the batch would not run, and while the server's rate is unknown.
    """

    object: Literal["batch.validation"] = "batch.validation"
    input_file_id: str
    valid: bool
    runnable: bool
    errors: BatchErrors | None
    error_count: int
    request_counts: ValidationCounts
    groups: list[GroupEstimate] | None
    estimated_input_tokens: int | None
    estimated_output_tokens: int | None
    estimate_basis: EstimateBasis | None
    estimated_cost: float | None
    currency: Literal["USD"] = "USD"
    completion_window: str
    expires_at_if_created_now: int
    load: Load
    estimated_completion_at: int | None
