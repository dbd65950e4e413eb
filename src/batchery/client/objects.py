"""A server's answers as the client needs them, read leniently.

Servers differ: statuses in upper case, null counts, errors as a bare array, a batch inside a `job`. What this module
cannot read it leaves out; it refuses only an answer without the one thing that matters, the id.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from batchery.client.errors import UnexpectedAnswerError

TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})


class Usage(msgspec.Struct, frozen=True):
    """Tokens, summed over a batch.

    Attributes:
        input_tokens: with those that came from a cache.
        output_tokens: with those of reasoning.
        cached_tokens: of the input; 0 where nobody says.
    """

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        """The sum of two."""
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_tokens + other.cached_tokens,
        )


class Deduplicated(msgspec.Struct, frozen=True):
    """What a server saved by sending identical requests once.

    Attributes:
        requests: completed ones that were answered by the answer to another.
        input_tokens, output_tokens: that these would have taken.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Deduplicated) -> Deduplicated:
        """The sum of two."""
        return Deduplicated(
            self.requests + other.requests,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
        )


class Batch(msgspec.Struct, frozen=True):
    """A batch as a server reports it.

    Attributes:
        status: in lower case; one that is not known counts as not terminal.
        total, completed, failed: requests; 0 while the server does not say.
        output_file_id, error_file_id: None until there is such a file, and for good where nothing went into it.
        problems: why it failed as a whole, one text each.
        tag: the `batchery` entry of its metadata.
        model: where the server names one for the whole batch.
        window: the completion window.
        created_at, expires_at: Unix seconds; None where the server does not say.
        ended_at: the terminal stamp, Unix seconds; None before there is one.
        deduplicated: what was saved so far; None where it was not asked for, or the server does not do it.
    """

    id: str
    status: str
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    problems: tuple[str, ...] = ()
    usage: Usage | None = None
    tag: str | None = None
    model: str | None = None
    window: str | None = None
    created_at: int | None = None
    expires_at: int | None = None
    ended_at: int | None = None
    deduplicated: Deduplicated | None = None

    @property
    def terminal(self) -> bool:
        """Whether the server is done with it."""
        return self.status in TERMINAL


_ENDS = ("completed_at", "failed_at", "expired_at", "cancelled_at")

TAG = "batchery"
"""The metadata key under which the client marks its batches, so that it finds one whose creation it did not hear of."""


def read_batch(value: Any) -> Batch:
    """A batch from a decoded answer.

    Raises:
        UnexpectedAnswerError: there is no batch in it.
    """
    if isinstance(value, dict) and isinstance(value.get("job"), dict):
        value = value["job"]
    if not isinstance(value, dict) or not isinstance(value.get("id"), str) or not isinstance(value.get("status"), str):
        raise UnexpectedAnswerError("the server's answer is not a batch: it has no id and status")
    counts = _dict(value.get("request_counts"))
    status = value["status"].lower()
    return Batch(
        id=value["id"],
        status="cancelled" if status == "canceled" else status,
        total=_count(counts.get("total")),
        completed=_count(counts.get("completed")),
        failed=_count(counts.get("failed")),
        output_file_id=_text(value.get("output_file_id")),
        error_file_id=_text(value.get("error_file_id")),
        problems=_problems(value.get("errors")),
        usage=read_usage(value.get("usage")),
        tag=_text(_dict(value.get("metadata")).get(TAG)),
        model=_text(value.get("model")),
        window=_text(value.get("completion_window")),
        created_at=_moment(value.get("created_at")),
        expires_at=_moment(value.get("expires_at")),
        ended_at=next((at for name in _ENDS if (at := _moment(value.get(name))) is not None), None),
        deduplicated=_deduplicated(value.get("deduplicated")),
    )


def read_batches(value: Any) -> tuple[list[Batch], bool]:
    """A page of batches, and whether there is another."""
    rows = value if isinstance(value, list) else _dict(value).get("data")
    if not isinstance(rows, list):
        raise UnexpectedAnswerError("the server's answer is not a list of batches")
    return [read_batch(row) for row in rows], _dict(value).get("has_more") is True


def read_file_id(value: Any) -> str:
    """The id of an uploaded file.

    Raises:
        UnexpectedAnswerError: there is none.
    """
    file_id = _text(_dict(value).get("id"))
    if file_id is None:
        raise UnexpectedAnswerError("the server's answer to the upload is not a file: it has no id")
    return file_id


def read_usage(value: Any) -> Usage | None:
    """Token counts in either naming (`input_tokens` or `prompt_tokens`); None where neither is there."""
    usage = _dict(value)
    for sent, received in (("input_tokens", "output_tokens"), ("prompt_tokens", "completion_tokens")):
        if isinstance(usage.get(sent), int):
            cached = _count(_dict(usage.get(f"{sent}_details")).get("cached_tokens"))
            return Usage(_count(usage[sent]), _count(usage.get(received)), cached)
    return None


def _deduplicated(value: Any) -> Deduplicated | None:
    if not isinstance(value, dict):
        return None
    return Deduplicated(*(_count(value.get(name)) for name in ("requests", "input_tokens", "output_tokens")))


def _problems(errors: Any) -> tuple[str, ...]:
    rows = errors if isinstance(errors, list) else _dict(errors).get("data")
    texts = []
    for row in rows if isinstance(rows, list) else ():
        message = _text(_dict(row).get("message")) or _text(_dict(row).get("code"))
        if message:
            texts.append(message)
    return tuple(texts)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _moment(value: Any) -> int | None:
    """Unix seconds; some servers write RFC 3339."""
    if isinstance(value, str):
        try:
            return int(datetime.fromisoformat(value).timestamp())
        except ValueError:
            return None
    return int(value) if isinstance(value, int | float) and value > 0 else None


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
