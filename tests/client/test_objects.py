"""Answers of servers that each have their own idea of a batch."""

from __future__ import annotations

from typing import Any

import pytest

from batchery.client.errors import UnexpectedAnswerError
from batchery.client.exchange import read_error
from batchery.client.objects import Deduplicated, Usage, read_batch, read_batches, read_file_id


def test_a_full_batch() -> None:
    batch = read_batch(
        {
            "id": "batch_1",
            "status": "completed",
            "request_counts": {"total": 3, "completed": 2, "failed": 1},
            "output_file_id": "file-1",
            "error_file_id": None,
            "errors": None,
            "usage": {"input_tokens": 5, "output_tokens": 6},
            "metadata": {"batchery": "tag"},
        }
    )
    assert (batch.total, batch.completed, batch.failed) == (3, 2, 1)
    assert (batch.output_file_id, batch.error_file_id, batch.tag) == ("file-1", None, "tag")
    assert batch.usage == Usage(5, 6)
    assert batch.terminal


@pytest.mark.parametrize(
    "value",
    [
        {"id": "b", "status": "Validating", "request_counts": {"total": None}, "metadata": None},
        {"job": {"id": "b", "status": "queued", "request_counts": None}},
        {"id": "b", "status": "some_new_status", "usage": 3, "errors": "x", "output_file_id": ""},
    ],
)
def test_drift_is_read_as_far_as_it_goes(value: dict[str, Any]) -> None:
    batch = read_batch(value)
    assert (batch.id, batch.total, batch.terminal, batch.output_file_id, batch.problems) == ("b", 0, False, None, ())


@pytest.mark.parametrize(
    "errors", [[{"message": "bad line"}], {"data": [{"message": "bad line"}]}, {"data": [{"code": "bad line"}]}]
)
def test_errors_as_list_or_array(errors: Any) -> None:
    assert read_batch({"id": "b", "status": "FAILED", "errors": errors}).problems == ("bad line",)


@pytest.mark.parametrize("value", [None, [], {}, {"id": "b"}, {"id": 3, "status": "completed"}, "batch"])
def test_no_batch(value: Any) -> None:
    with pytest.raises(UnexpectedAnswerError):
        read_batch(value)


def test_lists_in_an_envelope_or_bare() -> None:
    row = {"id": "b", "status": "completed"}
    assert read_batches({"data": [row], "has_more": True})[1] is True
    assert [batch.id for batch in read_batches([row, row])[0]] == ["b", "b"]
    with pytest.raises(UnexpectedAnswerError):
        read_batches("none")


@pytest.mark.parametrize(
    ("value", "saved"),
    [
        ({"requests": 3, "input_tokens": 4, "output_tokens": 5, "total_tokens": 9}, Deduplicated(3, 4, 5)),
        ({"requests": 0, "input_tokens": None}, Deduplicated()),
        (None, None),
        (True, None),
    ],
)
def test_what_was_saved(value: Any, saved: Deduplicated | None) -> None:
    assert read_batch({"id": "b", "status": "completed", "deduplicated": value}).deduplicated == saved


def test_file_ids() -> None:
    assert read_file_id({"id": "0b5"}) == "0b5"
    with pytest.raises(UnexpectedAnswerError):
        read_file_id({"object": "file"})


@pytest.mark.parametrize(
    ("body", "message", "code", "param"),
    [
        (b'{"error": {"message": "no", "type": "t", "code": "c"}}', "no", "c", None),
        (b'{"error": {"message": "no", "type": "t", "code": "c", "param": "p"}}', "no", "c", "p"),
        (b'{"error": {"message": "no", "type": "t", "code": null}}', "no", "t", None),
        (b'{"error": "no"}', "no", None, None),
        (b'{"detail": "no"}', "no", None, None),
        (b"plain\ntext", "plain text", None, None),
        (b"\xff<html>", "\ufffd<html>", None, None),
        (b"", "", None, None),
    ],
)
def test_error_answers(body: bytes, message: str, code: str | None, param: str | None) -> None:
    assert read_error(body) == (message, code, param)
