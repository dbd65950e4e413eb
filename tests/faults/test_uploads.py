"""`kill -9` of the real server while an upload in parts is completed: it is pending as before, or it is a file."""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress
from pathlib import Path

import openai
import pytest

from tests.processes import Process, serve, wait_for
from tests.requests import chat_file

UPSTREAM = "http://127.0.0.1:9/v1"
"""Nobody listens there: no batch runs here."""

TRIES = 20


def blobs(folder: Path, kind: str) -> set[str]:
    """The keys of one kind of blob in a server's folder, unfinished ones too."""
    root = folder / "data" / "blobs"
    return {path.relative_to(root).as_posix() for path in (root / kind).rglob("*") if path.is_file()}


def client_of(process: Process) -> openai.OpenAI:
    """The official client, which must not paper over anything by retrying."""
    return openai.OpenAI(base_url=process.url + "/v1", api_key="any", max_retries=0)


class Attempt:
    """An upload of three parts, to be completed.

    Args:
        client: the server's.
        name: the file's.
        data: its bytes.
    """

    def __init__(self, client: openai.OpenAI, name: str, data: bytes) -> None:
        upload = client.uploads.create(filename=name, bytes=len(data), mime_type="application/jsonl", purpose="batch")
        size = len(data) // 3 + 1
        self.id = upload.id
        self.parts = [
            client.uploads.parts.create(upload.id, data=data[start : start + size]).id
            for start in range(0, len(data), size)
        ]

    def killed_while_completing(self, process: Process, folder: Path, phase: str) -> None:
        """Kill the server as soon as there is a new blob of this kind."""
        before = blobs(folder, phase)

        def completing() -> None:
            with suppress(openai.OpenAIError):
                client_of(process).uploads.complete(self.id, part_ids=self.parts)

        thread = threading.Thread(target=completing)
        thread.start()
        wait_for(lambda: blobs(folder, phase) - before, 30, "the file's beginning")
        process.kill()
        thread.join()


@pytest.mark.parametrize("phase", ["files", "index"])
def test_a_kill_in_the_middle_of_a_completion(tmp_path: Path, phase: str) -> None:
    """It strikes once the file's blob has begun to appear, or once its index has, just before the commit."""
    data = chat_file(12_000, padding=2_000)
    process = serve(tmp_path, UPSTREAM)
    try:
        for turn in range(TRIES):
            name = f"{turn}.jsonl"
            attempt = Attempt(client_of(process), name, data)
            stored = blobs(tmp_path, "parts")
            attempt.killed_while_completing(process, tmp_path, phase)
            process = serve(tmp_path, UPSTREAM)
            client = client_of(process)
            if process.get(f"/v1/uploads/{attempt.id}")["status"] == "completed":
                continue  # the kill came too late
            assert stored <= blobs(tmp_path, "parts"), "a part was lost"
            assert name not in [file.filename for file in client.files.list()]
            done = client.uploads.complete(attempt.id, part_ids=attempt.parts, md5=hashlib.md5(data).hexdigest())
            assert done.status == "completed"
            assert done.file is not None
            assert client.files.content(done.file.id).read() == data
            count = len(list(client.files.list()))
            assert count == turn + 1
            break
        else:
            pytest.fail("every kill came too late")
        wait_for(lambda: len(blobs(tmp_path, "files")) == count, 30, "the end of what the kill has left")
    finally:
        process.stop()
