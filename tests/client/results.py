"""Result lines for tests."""

from __future__ import annotations

import json
from typing import Any


def answer(custom_id: str, text: str = "yes", **more: Any) -> str:
    """A line of an output file."""
    body = {
        "id": f"chatcmpl-{custom_id}",
        "model": "m",
        "choices": [{"finish_reason": "stop", "message": {"content": text}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
    }
    response = {"status_code": 200, "request_id": "r", "body": body, **more}
    return json.dumps({"id": "batch_req_1", "custom_id": custom_id, "response": response, "error": None}) + "\n"


def failure(custom_id: str, status: int | None = 500, code: str = "server_error") -> str:
    """A line of an error file."""
    response = None if status is None else {"status_code": status, "body": {"error": {"message": "broken"}}}
    error = {"code": code, "message": "broken"}
    return json.dumps({"id": "batch_req_2", "custom_id": custom_id, "response": response, "error": error}) + "\n"
