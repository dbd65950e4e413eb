"""No room left, as the operating system says it: a clear error, nothing corrupt, and work goes on once there is room.

The limit is `RLIMIT_FSIZE`, set from outside on the running processes: no file may grow beyond it, and writes fail as
on a full disk (`EFBIG`, which is treated as `ENOSPC` is). It needs no privileges and can be lifted again.
"""

from __future__ import annotations

import resource
from pathlib import Path

import openai
import psutil
import pytest

from tests.processes import Process, server, simulator, wait_for
from tests.requests import by_custom_id, chat_file

TERMINAL = ("completed", "failed", "expired", "cancelled")


def limit_files(process: Process, size: int) -> None:
    """Let no file of the server and its worker grow beyond `size` bytes; -1 for no limit."""
    for each in (psutil.Process(process.pid), *process.children()):
        each.rlimit(psutil.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_upload_on_a_full_disk(tmp_path: Path) -> None:
    """The upload is refused with 503 and leaves nothing behind; the next one, with room, succeeds."""
    with simulator(tmp_path) as upstream, server(tmp_path, upstream.url) as running:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)
        before = client.files.create(file=("small.jsonl", chat_file(2)), purpose="batch")
        data = chat_file(3000, padding=4000)
        blobs = tmp_path / "data" / "blobs"
        kept = sorted(path for path in blobs.rglob("*") if path.is_file())
        limit_files(running, 2_000_000)
        with pytest.raises(openai.InternalServerError) as refused:
            client.files.create(file=("big.jsonl", data), purpose="batch")
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) > 0
        assert "full" in str(refused.value.body)
        assert [file.id for file in client.files.list()] == [before.id]
        wait_for(
            lambda: sorted(path for path in blobs.rglob("*") if path.is_file()) == kept or None, 10, "an empty folder"
        )
        assert client.files.content(before.id).read() == chat_file(2)
        limit_files(running, resource.RLIM_INFINITY)
        after = client.files.create(file=("big.jsonl", data), purpose="batch")
        assert client.files.content(after.id).read() == data


def test_recording_on_a_full_disk(tmp_path: Path) -> None:
    """Results that cannot be recorded are kept and recorded later: none is lost, and none is asked for twice."""
    count = 3000
    with (
        simulator(tmp_path, "--latency", "10ms", "--concurrency", "16", "--tokens", "200") as upstream,
        server(tmp_path, upstream.url, "--max-in-flight", "16") as running,
    ):
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)
        file = client.files.create(file=("input.jsonl", chat_file(count)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed > 50 or None, what="some results")  # type: ignore[union-attr]
        limit_files(running, 65_536)
        log = tmp_path / "server.log"
        wait_for(lambda: "cannot be recorded" in log.read_text() or None, 20, "the complaint in the log")
        stuck = client.batches.retrieve(batch.id)
        assert stuck.status == "in_progress"
        assert stuck.output_file_id is not None
        early = client.files.content(stuck.output_file_id).read()
        assert early.endswith(b"\n")
        limit_files(running, resource.RLIM_INFINITY)
        ended = wait_for(lambda: b if (b := client.batches.retrieve(batch.id)).status in TERMINAL else None, 60)
        assert ended.status == "completed"
        output = client.files.content(ended.output_file_id or "").read()
        assert output.startswith(early)
        assert len(by_custom_id(output.splitlines())) == count
        stats = upstream.get("/simulator/stats")
        assert (stats["received"], stats["repeated_prompts"]) == (count, 0)
