"""Identifiers: 128 random bits, shown as 32 hex digits behind a prefix that says what they name.

Inside (tables, blob keys) an id is the bare 32 digits; the prefix is put on at the edge. Clients of other servers send
ids with other prefixes or none, so all of those are read.
"""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["file", "batch", "upload", "part", "key", "evt"]

_PREFIX = {"file": "file-", "batch": "batch_", "upload": "upload_", "part": "part_", "key": "key_", "evt": "evt_"}
_ID = re.compile(r"(?:(file|batch|upload|part|key|evt)[-_])?([0-9a-f]{32})", re.ASCII)


def show(kind: Kind, key: str) -> str:
    """The id as the API emits it: `file-<32 hex>`, `batch_<32 hex>`, `upload_<32 hex>` and so on."""
    return _PREFIX[kind] + key


def parse(kind: Kind, text: str) -> str | None:
    """The bare 32 hex digits of an id with the kind's own prefix (`file-` or `file_`, and so on) or none; else None.

    A prefix of the other kind names nothing.
    """
    match = _ID.fullmatch(text)
    if match is None or match[1] not in (None, kind):
        return None
    return match[2]


def request_id(batch: str, index: int) -> str:
    """The id of one request of a batch: `batch_req_` and 32 hex digits.

    It is derived, so a line keeps its id whoever writes it and whenever: 96 random bits of the batch's id, then the
    request's number.

    Args:
        batch: the batch's bare id, 32 hex digits.
        index: the request's number in its file, from 0.
    """
    return f"batch_req_{batch[:24]}{index:08x}"
