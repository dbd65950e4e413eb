"""Good lines, and the codes of bad ones."""

from __future__ import annotations

import json
from typing import Any

CODES = {
    "invalid_json_line",
    "missing_required_parameter",
    "invalid_custom_id",
    "duplicate_custom_id",
    "invalid_method",
    "invalid_url",
    "streaming_unsupported",
    "line_too_large",
    "too_many_requests_in_file",
    "empty_file",
    "invalid_utf8",
}
"""The contract's, all of them."""

GOOD: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m"}}


def request(custom_id: str = "a", model: str = "m", **body: Any) -> bytes:
    return json.dumps(GOOD | {"custom_id": custom_id, "body": {"model": model, **body}}).encode()
