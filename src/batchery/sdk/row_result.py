"""What became of a row, for a program: a typed outcome with the answer, read by the schema where one was given."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

import msgspec

from batchery.client.objects import Usage, read_usage
from batchery.client.results import read_record
from batchery.sdk.schema import parse

T = TypeVar("T")

Status = Literal["ok", "failed", "expired", "cancelled", "not_run"]


class RowError(msgspec.Struct, frozen=True):
    """Why a row has no good answer.

    Attributes:
        code: for programs.
        message: for people.
        http_status: of the answer; None where there was none.
    """

    code: str
    message: str
    http_status: int | None = None


class RowResult(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """What became of a row.

    Attributes:
        custom_id: the row's name: from its column, or `row-N`.
        row: its number, from 1.
        status: `ok`, `failed`, `expired`, `cancelled`, or `not_run` where it has no result at all.
        text: the answer's text; None where it has none.
        parsed: the answer as the schema says: an object of the model, or what its JSON holds; None without a schema,
            and where the answer does not follow it.
        parse_error: why the answer cannot be read as the schema says.
        error: why there is no good answer; None for `ok`.
        body: the whole answer.
        usage: its tokens; None where nobody says.
        data: the row's own columns; None for a finished request.
    """

    custom_id: str
    row: int
    status: Status
    text: str | None = None
    parsed: T | None = None
    parse_error: str | None = None
    error: RowError | None = None
    body: dict[str, Any] | None = None
    usage: Usage | None = None
    data: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Whether it has a good answer."""
        return self.status == "ok"

    @property
    def embedding(self) -> list[float] | None:
        """The vector of an answer of embeddings; None where there is none."""
        items = (self.body or {}).get("data")
        first = items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}
        vector = first.get("embedding")
        return vector if isinstance(vector, list) else None


class _Line(msgspec.Struct):
    custom_id: str
    row: int
    status: Status
    output_text: str | None = None
    response: Any = None
    error: Any = None
    data: dict[str, Any] | None = None


_read = msgspec.json.Decoder(_Line).decode


def read_row(line: bytes, schema: Any) -> RowResult[Any]:
    """A row's outcome from a line of a job's output.

    Args:
        line: as `batchery.client.join` writes it.
        schema: what answers follow; None for none.
    """
    try:
        found = _read(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # An answer may hold what only JSON's grammar allows, such as half of an emoji; see `read_record`.
        found = msgspec.convert(read_record(line), _Line)
    response = found.response if isinstance(found.response, dict) else {}
    body = response.get("body") if isinstance(response.get("body"), dict) else None
    parsed, problem = None, None
    if schema is not None and found.status == "ok":
        parsed, problem = (
            (None, "the answer has no text") if not found.output_text else parse(found.output_text, schema)
        )
    return RowResult(
        custom_id=found.custom_id,
        row=found.row,
        status=found.status,
        text=found.output_text,
        parsed=parsed,
        parse_error=problem,
        error=None if found.status == "ok" else _error(found.error, response.get("status_code")),
        body=body,
        usage=read_usage((body or {}).get("usage")),
        data=found.data,
    )


def _error(error: Any, status: Any) -> RowError:
    details = error if isinstance(error, dict) else {"message": str(error)}
    code, message = (details.get(name) for name in ("code", "message"))
    return RowError(
        str(code or details.get("type") or "error"), str(message or ""), status if type(status) is int else None
    )
