"""`kill -9` of the real server at random moments of every phase: nothing acknowledged is lost, nothing comes twice.

`KILLS=200 scripts/test tests/faults/test_kill.py` makes it as long as wanted; `KILL_SEED` repeats a run's moments.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.processes import Process, serve, simulator, wait_for
from tests.requests import by_custom_id, chat_file, chat_line

KILLS = int(os.environ.get("KILLS", "4"))
IN_FLIGHT = 32
UNRECORDED = 128
"""Answers that may lie between two commits: 32 slots of 30 ms give one a ms, and a commit may take 100 ms."""

TERMINAL = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def moments() -> random.Random:
    """The moments of the kills; the seed is printed, so that a failure can be repeated."""
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"KILL_SEED={seed}")
    return random.Random(seed)


def drift(moments: random.Random, most: float) -> None:
    """Let a random time pass, at most so many seconds: not to wait for something, but to strike at any moment."""
    time.sleep(moments.random() * most)


class Crashing:
    """A server on one data folder that is killed and started again.

    Args:
        folder: for the data and the logs.
        upstream: the simulator.
    """

    def __init__(self, folder: Path, upstream: str) -> None:
        self._folder = folder
        self._upstream = upstream
        self.may_repeat = 0
        self.slowest_return = 0.0
        self.process = self._serve()

    def _serve(self) -> Process:
        return serve(self._folder, self._upstream, "--max-in-flight", str(IN_FLIGHT))

    @property
    def client(self) -> openai.OpenAI:
        """The official client, which must not paper over anything by retrying."""
        return openai.OpenAI(base_url=self.process.url + "/v1", api_key="any", max_retries=0)

    def kill_and_restart(self, *, all_at_once: bool = False) -> None:
        """SIGKILL, and start anew at once, as an init system would.

        Args:
            all_at_once: kill the worker too, as a power cut does; else the main process only, and the worker outlives
                it for as long as it takes to record what was answered.
        """
        if all_at_once:
            self.kill_worker()
        children = self.process.kill()
        self.may_repeat += 0 if all_at_once else IN_FLIGHT
        killed = time.monotonic()
        self.process = self._serve()
        self.slowest_return = max(self.slowest_return, time.monotonic() - killed)
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive, "a child outlived its server by more than 5 s"

    def kill_worker(self) -> None:
        """SIGKILL only the process that dispatches; the server starts another."""
        for child in self.process.children():
            child.kill()
        self.may_repeat += IN_FLIGHT + UNRECORDED


def received(upstream: Process) -> int:
    """Requests that the upstream has got so far."""
    count: int = upstream.get("/simulator/stats")["received"]
    return count


def content(server: Process, file: str) -> bytes:
    """A file's bytes as they are now."""
    return openai.OpenAI(base_url=server.url + "/v1", api_key="any").files.content(file).read()


def wait_for_requests(crashing: Crashing, upstream: Process, count: int, batch: str) -> bool:
    """Wait until the upstream has got so many requests; whether the batch still runs."""

    def look() -> str | None:
        if received(upstream) >= count:
            return "runs"
        return "ended" if crashing.client.batches.retrieve(batch).status in TERMINAL else None

    return wait_for(look, 30, f"{count} requests at the upstream") == "runs"


def wait_for_results(client: openai.OpenAI, batch: str, count: int) -> None:
    """Wait until so many requests of a batch are recorded."""

    def look() -> bool:
        counts = client.batches.retrieve(batch).request_counts
        return counts is not None and counts.completed >= count

    wait_for(look, 30, f"{count} results")


def wait_for_end(client: openai.OpenAI, batch: str) -> Any:
    """Wait until a batch has ended; the batch."""

    def look() -> Any:
        found = client.batches.retrieve(batch)
        return found if found.status in TERMINAL else None

    return wait_for(look, 60, "the batch's end")


def check_end(crashing: Crashing, upstream: Process, batch_id: str, count: int, early: bytes) -> None:
    """Every request has exactly one line, and the upstream saw no more repeats than were in flight at the kills."""
    batch = wait_for_end(crashing.client, batch_id)
    assert batch.status == "completed", batch
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (
        count,
        count,
        0,
    )
    assert batch.output_file_id is not None
    data = content(crashing.process, batch.output_file_id)
    assert data.startswith(early), "lines that were readable before a kill have moved or changed"
    results = by_custom_id(data.splitlines())
    assert sorted(results) == [f"request-{i:05}" for i in range(count)]
    stats = upstream.get("/simulator/stats")
    assert stats["repeated_prompts"] <= crashing.may_repeat, stats
    assert stats["received"] <= count + crashing.may_repeat, stats


def create(client: openai.OpenAI, data: bytes) -> Any:
    """Upload and create; both are acknowledged when this returns."""
    file = client.files.create(file=("input.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")


def test_killed_while_running(tmp_path: Path, moments: random.Random) -> None:
    """The phase that matters most: requests in flight, results half recorded."""
    count = 800 * KILLS
    with simulator(tmp_path, "--latency", "uniform:5ms-60ms", "--concurrency", "64") as upstream:
        crashing = Crashing(tmp_path, upstream.url)
        try:
            batch = create(crashing.client, chat_file(count))
            early = b""
            kills = 0
            while kills < KILLS:
                before = received(upstream)
                goal = before + moments.randrange(1, 250)
                if not wait_for_requests(crashing, upstream, goal, batch.id):
                    break
                drift(moments, 0.05)  # the moment itself must not fall into step with the commits
                if batch.output_file_id is not None and kills % 2:
                    latest = content(crashing.process, batch.output_file_id)
                    assert latest.startswith(early)
                    early = latest
                if kills % 4 == 3:
                    crashing.kill_worker()
                else:
                    crashing.kill_and_restart(all_at_once=kills % 4 == 1)
                kills += 1
            assert kills >= KILLS // 2, "the batch ended too soon to be killed often"
            check_end(crashing, upstream, batch.id, count, early)
        finally:
            assert crashing.process.stop() == 0


def test_killed_while_planning_and_finalising(tmp_path: Path, moments: random.Random) -> None:
    """Right after the acknowledgement of a batch, and around its end."""
    count = 300
    with simulator(tmp_path, "--latency", "2ms") as upstream:
        crashing = Crashing(tmp_path, upstream.url)
        try:
            for kill in range(KILLS):
                may_repeat_before = crashing.may_repeat
                upstream_before = upstream.get("/simulator/stats")
                batch = create(crashing.client, chat_file(count, mark=f"round {kill}"))
                if kill % 2:
                    drift(moments, 0.03)
                else:
                    wait_for_results(crashing.client, batch.id, count * 9 // 10)
                    drift(moments, 0.04)
                crashing.kill_and_restart(all_at_once=moments.random() < 0.5)
                ended = wait_for_end(crashing.client, batch.id)
                assert ended.status == "completed"
                results = by_custom_id(content(crashing.process, ended.output_file_id).splitlines())
                assert len(results) == count
                repeated = upstream.get("/simulator/stats")["repeated_prompts"] - upstream_before["repeated_prompts"]
                assert repeated <= crashing.may_repeat - may_repeat_before
        finally:
            assert crashing.process.stop() == 0


def test_killed_while_uploading(tmp_path: Path, moments: random.Random) -> None:
    """An upload is there whole if it was acknowledged, and not at all if it was not; nothing of it stays behind."""
    data = chat_file(4000, padding=2000)
    with simulator(tmp_path) as upstream:
        crashing = Crashing(tmp_path, upstream.url)
        acknowledged: list[str] = []

        def upload(client: openai.OpenAI) -> None:
            try:
                acknowledged.append(client.files.create(file=("input.jsonl", data), purpose="batch").id)
            except openai.APIConnectionError:
                return

        try:
            for _ in range(KILLS):
                thread = threading.Thread(target=upload, args=(crashing.client,))
                thread.start()
                drift(moments, 0.3)
                crashing.kill_and_restart(all_at_once=moments.random() < 0.5)
                thread.join(10)
                assert not thread.is_alive()
                listed = {file.id for file in crashing.client.files.list(purpose="batch")}
                assert listed >= set(acknowledged)
                for file in listed:
                    assert content(crashing.process, file) == data
            blobs = tmp_path / "data" / "blobs"
            kept = {file.id.removeprefix("file-") for file in crashing.client.files.list()}
            wait_for(
                lambda: {p.name for p in blobs.rglob("*") if p.is_file()} == kept or None, 10, "the sweep of remnants"
            )
        finally:
            assert crashing.process.stop() == 0


def test_killed_while_bad_lines_are_passed_over_and_while_retrying(tmp_path: Path, moments: random.Random) -> None:
    """Error lines of bad lines, and the second run of a batch over the files of its first."""
    rounds = max(1, KILLS // 4)
    with simulator(tmp_path, "--latency", "uniform:1ms-10ms", "--concurrency", "32") as upstream:
        crashing = Crashing(tmp_path, upstream.url)
        try:
            for turn in range(rounds):
                data = b"".join(
                    b"bad\n"
                    if i % 7 == 3
                    else chat_line(f"r{i}", ["go", "[[simulate status=400 times=1]]"][i % 2] + f" {turn} {i}")
                    for i in range(2_100)
                )
                file = crashing.client.files.create(file=("input.jsonl", data), purpose="batch")
                batch = crashing.client.batches.create(
                    input_file_id=file.id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    extra_body={"on_invalid_line": "skip"},
                )
                for _ in range(2):
                    drift(moments, 0.2)
                    crashing.kill_and_restart(all_at_once=moments.random() < 0.5)
                first = wait_for_end(crashing.client, batch.id)
                before = content(crashing.process, first.output_file_id)
                crashing.client.post(f"/batches/{batch.id}/retry", cast_to=object)
                for _ in range(2):
                    drift(moments, 0.2)
                    crashing.kill_and_restart(all_at_once=moments.random() < 0.5)
                    assert content(crashing.process, first.output_file_id).startswith(before)
                second = wait_for_end(crashing.client, batch.id)
                counts = second.request_counts
                assert (counts.total, counts.completed, counts.failed) == (2_100, 1_800, 300)
                after = content(crashing.process, second.output_file_id)
                assert after.startswith(before)
                assert len(by_custom_id(after.splitlines())) == 1_800
                errors = [json.loads(line) for line in content(crashing.process, second.error_file_id).splitlines()]
                assert [error["line"] for error in errors] == [i + 1 for i in range(2_100) if i % 7 == 3]
                path = f"{crashing.process.url}/v1/batches/{batch.id}/results"
                with urllib.request.urlopen(path) as answer:
                    lines = [json.loads(line) for line in answer.read().splitlines()]
                assert [line["line"] for line in lines] == list(range(1, 2_101))
        finally:
            assert crashing.process.stop() == 0


def test_duplicates_get_their_lines_when_everything_dies_between(tmp_path: Path, moments: random.Random) -> None:
    total, kinds = 20_000, 40
    data = b"".join(chat_line(f"request-{i:05}", f"prompt {i % kinds} {'x' * 500}", seed=1) for i in range(total))
    with simulator(tmp_path, "--latency", "250ms", "--concurrency", "2") as upstream:
        crashing = Crashing(tmp_path, upstream.url)
        try:
            file = crashing.client.files.create(file=("input.jsonl", data), purpose="batch").id
            batch = crashing.client.batches.create(
                input_file_id=file,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                extra_body={"deduplicate": True},
            ).id
            kills = 0
            while kills < KILLS and crashing.client.batches.retrieve(batch).status not in TERMINAL:
                wait_for_results(crashing.client, batch, 1 + kills * 1_500)
                drift(moments, 0.05)
                crashing.kill_and_restart(all_at_once=True)
                kills += 1
            ended = wait_for(
                lambda: found if (found := crashing.client.batches.retrieve(batch)).status in TERMINAL else None, 60
            )
            assert ended.status == "completed"
            assert ended.output_file_id is not None
            lines = by_custom_id(content(crashing.process, ended.output_file_id).splitlines())
            assert len(lines) == total
            for custom_id, line in lines.items():
                kind = int(custom_id.removeprefix("request-")) % kinds
                assert line["response"]["body"]["choices"] == lines[f"request-{kind:05}"]["response"]["body"]["choices"]
            assert kills > 1
            # A crash costs at most what was in flight, and what was answered and not yet given to all of its kind.
            assert received(upstream) <= kinds * (1 + kills)
        finally:
            crashing.process.stop()
