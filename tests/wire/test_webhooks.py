"""Webhooks on the wire: the signature against a known vector, and the event against the official SDK."""

from __future__ import annotations

import base64
import binascii
import time
from typing import Any

import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.wire.bodies import check_webhook_secret
from batchery.wire.objects import BatchUsage, InputTokensDetails, OutputTokensDetails, RequestCounts
from batchery.wire.webhooks import Event, EventData, encode_event, event_id, event_type, sign

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
VECTOR = b'{"id":"evt_1","object":"event","created_at":1700000000,"type":"batch.completed","data":{"id":"batch_1"}}'


def event(**data: Any) -> Event:
    values: dict[str, Any] = {
        "id": "batch_" + "1" * 32,
        "status": "completed",
        "endpoint": "/v1/chat/completions",
        "output_file_id": "file-" + "2" * 32,
        "error_file_id": None,
        "request_counts": RequestCounts(total=3, completed=2, failed=1),
        "usage": BatchUsage(
            input_tokens=1,
            input_tokens_details=InputTokensDetails(),
            output_tokens=2,
            output_tokens_details=OutputTokensDetails(),
            total_tokens=3,
        ),
        "metadata": {"job": "nightly"},
    }
    return Event(
        id=event_id("3" * 32), created_at=1_700_000_000, type="batch.completed", data=EventData(**values | data)
    )


def unwrap(body: bytes, secret: str, signature: str, id: str = "evt_1", timestamp: int | None = None) -> Any:
    headers = {
        "webhook-id": id,
        "webhook-timestamp": str(timestamp or int(time.time())),
        "webhook-signature": signature,
    }
    return openai.OpenAI(api_key="any").webhooks.unwrap(body.decode(), headers, secret=secret)


def test_a_known_signature() -> None:
    assert sign(SECRET, "evt_1", 1_700_000_000, VECTOR) == "v1,r+oibOd+AoVl3ji2Mlp/pHe3olJjOoPRGwIs3/fOdCc="


@pytest.mark.parametrize("field", ["secret", "id", "timestamp", "body"])
def test_everything_is_signed(field: str) -> None:
    good: dict[str, Any] = {"secret": SECRET, "id": "evt_1", "timestamp": 1_700_000_000, "body": VECTOR}
    bad = good | {"secret": "x" * 16, "id": "evt_2", "timestamp": 1_700_000_001, "body": VECTOR + b" "}
    assert sign(**good) != sign(**good | {field: bad[field]})


def test_a_secret_that_is_not_base64() -> None:
    with pytest.raises(binascii.Error):
        sign("whsec_*", "evt_1", 1, b"")


def test_the_whole_event() -> None:
    assert msgspec.json.decode(encode_event(event())) == {
        "id": "evt_" + "3" * 32,
        "object": "event",
        "created_at": 1_700_000_000,
        "type": "batch.completed",
        "data": {
            "id": "batch_" + "1" * 32,
            "status": "completed",
            "endpoint": "/v1/chat/completions",
            "output_file_id": "file-" + "2" * 32,
            "error_file_id": None,
            "request_counts": {"total": 3, "completed": 2, "failed": 1},
            "usage": {
                "input_tokens": 1,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": 2,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": 3,
            },
            "metadata": {"job": "nightly"},
        },
    }


@pytest.mark.parametrize("status", ["completed", "failed", "expired", "cancelled"])
def test_the_official_sdk_knows_each_event(status: str) -> None:
    told = event(status=status)
    told.type = event_type(status)
    body, now = encode_event(told), int(time.time())
    found = unwrap(body, SECRET, sign(SECRET, told.id, now, body), told.id, now)
    assert type(found).__name__ == f"Batch{status.capitalize()}WebhookEvent"
    assert (found.id, found.type, found.created_at, found.data.id) == (
        told.id,
        f"batch.{status}",
        1_700_000_000,
        "batch_" + "1" * 32,
    )


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing", "cancelling", ""])
def test_only_an_end_is_told(status: str) -> None:
    with pytest.raises(KeyError):
        event_type(status)


secrets = st.one_of(
    st.binary(min_size=16, max_size=64).map(lambda key: "whsec_" + base64.b64encode(key).decode()),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=16, max_size=256).filter(
        lambda text: not text.startswith("whsec_")
    ),
)


@given(secrets, st.dictionaries(st.text(), st.text(), max_size=3))
def test_whatever_the_secret_and_the_metadata(secret: str, metadata: dict[str, str]) -> None:
    """Every secret that the API accepts signs what the official SDK verifies, and no other secret does."""
    assert check_webhook_secret(secret) == secret
    body, now = encode_event(event(metadata=metadata)), int(time.time())
    signature = sign(secret, "evt_1", now, body)
    unwrap(body, secret, signature, timestamp=now)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrap(body, "x" + secret, signature, timestamp=now)
