"""Webhooks on the wire: the event that tells a batch's end, and its signature.

The event has OpenAI's keys, so that its official SDKs unwrap it, and in `data` what a receiver would ask for next. The
signature is that of Standard Webhooks (https://github.com/standard-webhooks/standard-webhooks).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import Literal

import msgspec

from batchery.wire.bodies import SECRET_PREFIX
from batchery.wire.objects import BatchUsage, RequestCounts

EndStatus = Literal["completed", "failed", "expired", "cancelled"]
EventType = Literal["batch.completed", "batch.failed", "batch.expired", "batch.cancelled"]

_TYPES: dict[str, EventType] = {
    "completed": "batch.completed",
    "failed": "batch.failed",
    "expired": "batch.expired",
    "cancelled": "batch.cancelled",
}


class EventData(msgspec.Struct, kw_only=True):
    """The batch as it ended; each field is the batch's of the same name."""

    id: str
    status: EndStatus
    endpoint: str
    output_file_id: str | None
    error_file_id: str | None
    request_counts: RequestCounts
    usage: BatchUsage | None
    metadata: dict[str, str]


class Event(msgspec.Struct, kw_only=True):
    """What a receiver gets.

    Attributes:
        id: `evt_` and 32 hex digits, the same in every attempt to deliver it.
        created_at: Unix seconds at which the batch ended.
        type: `batch.` and the status.
    """

    id: str
    object: Literal["event"] = "event"
    created_at: int
    type: EventType
    data: EventData


def event_id(bare: str) -> str:
    """An event's id as receivers see it.

    Args:
        bare: 32 hex digits.
    """
    return f"evt_{bare}"


def event_type(status: str) -> EventType:
    """The type of the event that tells an end with this status.

    Raises:
        KeyError: a batch with this status has not ended.
    """
    return _TYPES[status]


encode_event = msgspec.json.Encoder().encode
"""An event as the bytes that are signed and sent."""


def sign(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature` of one attempt: `v1,` and the base64 of an HMAC-SHA256.

    Args:
        secret: `whsec_` and the base64 of the key, or any other text, whose bytes are the key.
        id: the event's, as in the header `webhook-id`.
        timestamp: of the attempt in Unix seconds, as in the header `webhook-timestamp`.
        body: as it is sent.

    Raises:
        ValueError: `whsec_` is followed by something that is not base64.
    """
    if secret.startswith(SECRET_PREFIX):
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    else:
        key = secret.encode()
    digest = hmac.new(key, f"{id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()
