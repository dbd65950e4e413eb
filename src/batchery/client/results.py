"""What became of the rows, told from the result lines themselves: how many went well, how many failed and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from batchery.client.objects import Usage, read_usage

NOT_RUN = frozenset({"batch_expired", "batch_cancelled"})
"""Codes of error lines whose request was never run."""

_LONGEST_MESSAGE = 160
_MOST_REASONS = 1_000


class Reason(msgspec.Struct, frozen=True):
    """Why some rows failed.

    Attributes:
        text: status, code and the first message seen with them.
        rows: how many.
    """

    text: str
    rows: int


class Tally(msgspec.Struct, frozen=True):
    """The rows of a job.

    Attributes:
        rows: requests in the inputs.
        ok: answered with 2xx.
        failed: answered otherwise, or tried in vain.
        not_run: never run, or without a result line.
        usage: tokens, summed over the results; None where none names any.
        reasons: why rows failed, the commonest first.
    """

    rows: int
    ok: int
    failed: int
    not_run: int
    usage: Usage | None
    reasons: tuple[Reason, ...]


def tally(rows: int, paths: Iterable[Path]) -> Tally:
    """Read result files through, one line at a time, and count.

    Args:
        rows: requests in the inputs.
        paths: the output and the error file; one that does not exist has no lines.
    """
    ok = failed = tokens_in = tokens_out = 0
    any_usage = False
    kinds: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for path in paths:
        for record in _records(path):
            status, code, message = judge(record)
            if code is None:
                ok += 1
            elif code not in NOT_RUN:
                failed += 1
                kind = code if status is None else f"{status} {code}"
                if kind in kinds or len(kinds) < _MOST_REASONS:
                    kinds[kind] += 1
                    examples.setdefault(kind, message)
            usage = read_usage(_dict(_dict(record.get("response")).get("body")).get("usage"))
            if usage is not None:
                any_usage = True
                tokens_in += usage.input_tokens
                tokens_out += usage.output_tokens
    reasons = (Reason(f"{kind}: {examples[kind]}".rstrip(": "), rows) for kind, rows in kinds.most_common())
    usage = Usage(tokens_in, tokens_out) if any_usage else None
    return Tally(rows, ok, failed, max(0, rows - ok - failed), usage, tuple(reasons))


def judge(record: dict[str, Any]) -> tuple[int | None, str | None, str]:
    """Status, code and message of a result line; the code is None if it is a success.

    A line has failed if its status is not 2xx, or it or its answer's body names an error: servers differ in which of
    the three they use.
    """
    response, body = _dict(record.get("response")), _dict(_dict(record.get("response")).get("body"))
    status = response.get("status_code")
    status = status if isinstance(status, int) and status else None
    error = record.get("error") or body.get("error")
    if status is not None and 200 <= status < 300 and not error:
        return status, None, ""
    details = _dict(error)
    inner = _dict(body.get("error"))
    code = next((v for d in (details, inner) for v in (d.get("code"), d.get("type")) if isinstance(v, str) and v), "")
    message = next((d["message"] for d in (details, inner) if isinstance(d.get("message"), str)), "")
    if not message and isinstance(error, str):
        message = error
    return status, code or "error", " ".join(message.split())[:_LONGEST_MESSAGE]


def _records(path: Path) -> Iterable[dict[str, Any]]:
    decode = msgspec.json.Decoder().decode
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                record = decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                record = _decode_leniently(line)
            if record is None:
                record = {"error": {"code": "unreadable_result", "message": "the server sent a line that is not JSON"}}
            yield _dict(record)


def _decode_leniently(line: bytes) -> Any:
    """A line that msgspec refuses: half of a surrogate pair and numbers beyond any float are JSON too. None if not."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
