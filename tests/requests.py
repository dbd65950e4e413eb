"""Input files for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def chat_line(custom_id: str, prompt: str, **body: Any) -> bytes:
    """One line of an input file, with its line break."""
    request = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": prompt}]} | body,
    }
    return json.dumps(request).encode() + b"\n"


def chat_file(count: int, *, padding: int = 0, mark: str = "") -> bytes:
    """An input file of `count` requests, each with a prompt of its own."""
    return b"".join(chat_line(f"request-{i:05}", f"{mark} prompt number {i} {'x' * padding}") for i in range(count))


def by_custom_id(lines: Iterable[bytes]) -> dict[str, dict[str, Any]]:
    """Result lines by `custom_id`; each may be there only once."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        result = json.loads(line)
        assert result["custom_id"] not in found, f"{result['custom_id']} is there twice"
        found[result["custom_id"]] = result
    return found
