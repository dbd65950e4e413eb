"""The whole flow with the official Python SDK, whichever version is on the path; says what it saw as one JSON object.

Arguments: the base URL, a good API key, and how many further batches to make for paging.
"""

from __future__ import annotations

import io
import json
import sys
import time
from typing import Any

import openai

URL, KEY, MORE = sys.argv[1], sys.argv[2], int(sys.argv[3])
LINES = [
    json.dumps(
        {
            "custom_id": f"r{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": prompt}]},
        }
    )
    for i, prompt in enumerate(["one", "two \u2028 three", "[[simulate status=400]]"])
]
DATA = "\n".join(LINES).encode()


class Unsized(io.RawIOBase):
    """A stream that cannot say how long it is, so that it is sent in chunks."""

    def __init__(self, data: bytes) -> None:
        self._rest = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._rest.read(min(size, 100) if size > 0 else 100)


def failing(call: Any) -> dict[str, Any]:
    """What the SDK makes of a failing call."""
    try:
        call()
    except openai.APIStatusError as error:
        return {
            "class": type(error).__name__,
            "status": error.status_code,
            "code": error.code,
            "param": error.param,
            "request_id": bool(error.response.headers.get("x-request-id")),
        }
    raise AssertionError("it did not fail")


def main() -> None:
    """Run it."""
    saw: dict[str, Any] = {"version": openai.__version__}
    client = openai.OpenAI(base_url=URL, api_key=KEY)

    file = client.files.create(file=("input.jsonl", DATA), purpose="batch")
    saw["file"] = [file.object, file.bytes == len(DATA), file.filename, file.purpose, file.status]
    saw["unnamed"] = client.files.create(file=DATA, purpose="batch").filename
    saw["waited"] = client.files.wait_for_processing(file.id, poll_interval=0.1, max_wait_seconds=5).status
    saw["listed"] = file.id in [one.id for one in client.files.list(purpose="batch")]
    saw["same bytes"] = client.files.content(file.id).read() == DATA

    batch = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"job": "flow"},
    )
    saw["created"] = [batch.object, batch.status, batch.metadata, batch.expires_at is not None]
    deadline = time.monotonic() + 60
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    counts = batch.request_counts
    assert counts is not None
    saw["ended"] = [batch.status, counts.total, counts.completed, counts.failed]
    assert batch.output_file_id is not None
    assert batch.error_file_id is not None
    with client.files.with_streaming_response.content(batch.output_file_id) as answer:
        lines = [json.loads(line) for line in answer.iter_lines() if line]
        saw["headers"] = [answer.headers.get("x-last-line"), answer.headers.get("x-incomplete")]
    saw["output"] = sorted(line["custom_id"] for line in lines)
    error = json.loads(client.files.content(batch.error_file_id).text)
    saw["error line"] = [error["custom_id"], error["response"]["status_code"], sorted(error["error"])]

    saw["cancel finished"] = failing(lambda: client.batches.cancel(batch.id))
    saw["unknown batch"] = failing(lambda: client.batches.retrieve("batch_" + "0" * 32))
    saw["unknown file"] = failing(lambda: client.files.retrieve("file-nothing"))
    saw["bad window"] = failing(
        lambda: client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="25h",  # type: ignore[arg-type]
        )
    )
    saw["wrong key"] = failing(openai.OpenAI(base_url=URL, api_key="sk-wrong").batches.list)

    invalid = client.files.create(file=("bad.jsonl", b"nonsense\n"), purpose="batch")
    failed = client.batches.create(input_file_id=invalid.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert failed.errors is not None
    assert failed.errors.data is not None
    saw["failed"] = [failed.status, failed.errors.data[0].code, failed.errors.data[0].line]

    made = {batch.id, failed.id}
    for _ in range(MORE):
        made.add(
            client.batches.create(input_file_id=invalid.id, endpoint="/v1/chat/completions", completion_window="24h").id
        )
    found = [one.id for one in client.batches.list(limit=20)]
    saw["paged"] = [len(found), len(set(found)), made <= set(found)]
    saw["empty page"] = len(client.batches.list(after=found[-1]).data)

    upload = client.uploads.create(
        bytes=len(DATA), filename="parts.jsonl", mime_type="application/jsonl", purpose="batch"
    )
    half = len(DATA) // 2
    second = client.uploads.parts.create(upload.id, data=DATA[half:])
    first = client.uploads.parts.create(upload.id, data=DATA[:half])
    done = client.uploads.complete(upload.id, part_ids=[first.id, second.id])
    assert done.file is not None
    saw["uploaded"] = [upload.status, done.status, client.files.content(done.file.id).read() == DATA]

    if hasattr(client.uploads, "upload_file_chunked"):
        chunked = client.uploads.upload_file_chunked(
            file=DATA,
            filename="c.jsonl",
            bytes=len(DATA),
            mime_type="application/jsonl",
            purpose="batch",
            part_size=100,
        )
        assert chunked.file is not None
        saw["chunked parts"] = client.files.content(chunked.file.id).read() == DATA
        streamed = client.files.create(
            file=("stream.jsonl", Unsized(DATA)),  # type: ignore[arg-type]
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert streamed.expires_at is not None
        saw["stream"] = [streamed.bytes == len(DATA), streamed.expires_at - streamed.created_at]
    saw["deleted"] = client.files.delete(file.id).deleted
    saw["gone"] = failing(lambda: client.files.content(file.id))
    print(json.dumps(saw))


if __name__ == "__main__":
    main()
