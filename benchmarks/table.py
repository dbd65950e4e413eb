"""The table of what the engine is to reach: each row measured as a ratio or a time, side by side in one run.

    python -m benchmarks.table [--only 1,3,8] [--rounds 3] [--long]

`--long` also measures what takes minutes: a million requests, a file of 2 GB, and 20 000 requests of a second each.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.end_to_end import run_bare, run_batch
from benchmarks.processes import ENDED, call, create, make_file, running, upload, usage

LARGE = ["--max-requests", "2000000", "--max-file-bytes", "4000000000", "--log-level", "warning"]
OPENAI_LOOP = """
import asyncio, json, sys, time
from openai import AsyncOpenAI

async def main(url, path, in_flight):
    client = AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=2)
    room = asyncio.Semaphore(in_flight)
    async def one(body):
        async with room:
            return await client.chat.completions.create(**body)
    bodies = [json.loads(line)["body"] for line in open(path)]
    started = time.perf_counter()
    await asyncio.gather(*(one(body) for body in bodies))
    print(time.perf_counter() - started)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""

Row = tuple[str, str, str]
"""What is measured, what is to be reached, and what was measured."""


class Bench:
    """Where the rows are measured.

    Args:
        folder: for files, logs and data.
        rounds: how often each is measured; medians are shown.
        long: whether to measure what takes minutes.
    """

    def __init__(self, folder: Path, rounds: int, long: bool) -> None:
        self.folder = folder
        self.rounds = rounds
        self.long = long
        self._data = 0

    def serve(self, upstream: str, *options: str) -> list[str]:
        """Arguments for a server with a data folder of its own."""
        self._data += 1
        data = self.folder / f"data-{self._data}"
        return ["serve", "--port", "0", "--data-dir", str(data), "--upstream", upstream, *LARGE, *options]

    @property
    def log(self) -> Path:
        """Where processes log to."""
        return self.folder / "log"

    def file(self, requests: int, body_bytes: int, mark: str) -> Path:
        """A new input file."""
        path = self.folder / "input.jsonl"
        make_file(path, requests, body_bytes, mark)
        return path


def simulate(*options: str) -> list[str]:
    """Arguments for a simulator."""
    return ["simulate", "--port", "0", *options]


def until_ended(url: str, id: str, pause: float = 0.02) -> None:
    """Wait for a batch to complete."""
    while (batch := call(f"{url}/v1/batches/{id}"))["status"] not in ENDED:
        time.sleep(pause)
    if batch["status"] != "completed" or batch["request_counts"]["failed"]:
        raise SystemExit(f"the batch did not complete: {batch}")


def against_the_bare_loop(bench: Bench) -> list[Row]:
    """Row 1: at several upstream latencies, since what is left over per request decides."""
    rows = []
    for latency in ("0ms", "10ms", "50ms"):
        ratios = []
        with (
            running(simulate("--latency", latency, "--concurrency", "0"), bench.log) as (_, upstream),
            running(bench.serve(upstream, "--max-in-flight", "256"), bench.log) as (server, url),
        ):
            for turn in range(bench.rounds):
                path = bench.file(20_000, 500, f"{latency} {turn}")
                batch = run_batch(url, server.pid, path, 20_000)
                bare = run_bare(upstream, path, 256)
                ratios.append((bare["seconds"] / batch["seconds"], 20_000 / batch["seconds"]))
        ratio, rate = (statistics.median(values) for values in zip(*ratios, strict=True))
        name = f"1  durable requests/s ÷ bare loop, 256 in flight, upstream {latency}"
        rows.append((name, "≥ 0.85", f"{ratio:.2f} ({rate:.0f}/s)"))
    return rows


def against_the_sdk(bench: Bench) -> list[Row]:
    """Row 2: what a user would write, with the official SDK."""
    with (
        running(simulate("--latency", "0ms", "--concurrency", "0"), bench.log) as (_, upstream),
        running(bench.serve(upstream, "--max-in-flight", "256"), bench.log) as (server, url),
    ):
        ratios = []
        for turn in range(bench.rounds):
            batch = run_batch(url, server.pid, bench.file(20_000, 500, f"sdk {turn}"), 20_000)
            path = bench.file(1_000, 500, f"sdk loop {turn}")
            command = [sys.executable, "-c", OPENAI_LOOP, upstream, str(path), "256"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            ratios.append((20_000 / batch["seconds"]) / (1_000 / float(done.stdout)))
    return [("2  the same ÷ AsyncOpenAI with gather and a semaphore", "≥ 40", f"{statistics.median(ratios):.0f}")]


def against_the_ideal(bench: Bench) -> list[Row]:
    """Row 3: an upstream with slots, and requests that queue behind them."""
    rows = []
    many = 20_000 if bench.long else 2_000  # of few, the last answers alone are 0.06 more than the ideal
    for name, options, requests, slots, mean in (
        ("64 slots of 50 ms", ("--latency", "50ms"), 20_000, 64, 0.05),
        ("64 slots, log-normal, median 1 s", ("--latency", "lognormal:1s"), many, 64, 1.1331),
    ):
        ratios = []
        with (
            running(simulate(*options, "--concurrency", str(slots)), bench.log) as (_, upstream),
            running(bench.serve(upstream, "--max-in-flight", str(2 * slots)), bench.log) as (server, url),
        ):
            for turn in range(1 if mean > 1 else bench.rounds):
                batch = run_batch(url, server.pid, bench.file(requests, 100, f"{name} {turn}"), requests)
                ratios.append(batch["seconds"] / (requests * mean / slots))
        measure = f"3  wall time ÷ ideal, {name}, {requests:,} requests"
        rows.append((measure, "≤ 1.03", f"{statistics.median(ratios):.3f}"))
    ratios = []
    with (
        running(simulate("--latency", "50ms", "--concurrency", "256"), bench.log) as (_, upstream),
        running(bench.serve(upstream, "--max-in-flight", "256"), bench.log) as (server, url),
    ):
        for turn in range(bench.rounds):
            path = bench.file(20_000, 100, f"slots {turn}")
            batch = run_batch(url, server.pid, path, 20_000)
            ratios.append(batch["seconds"] / run_bare(upstream, path, 256)["seconds"])
    rows.append(("3  wall time ÷ the bare loop's, 256 slots of 50 ms", "≤ 1.05", f"{statistics.median(ratios):.3f}"))
    return rows


class FirstRequest:
    """An upstream that notes when its first request comes, and answers all of them."""

    ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"

    def __init__(self) -> None:
        self.at: float | None = None
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(65_536):
                if data.startswith(b"POST"):
                    self.at = self.at or time.perf_counter()
                    connection.sendall(self.ANSWER)


def to_the_first_request(bench: Bench) -> list[Row]:
    """Row 4: from the call that creates a batch to its first request at the upstream."""
    rows = []
    for requests, reach in ((50_000, 20), (1_000_000, 100)) if bench.long else ((50_000, 20),):
        path = bench.file(requests, 40, "first")
        upstream = FirstRequest()
        took: list[float] = []
        with running(bench.serve(upstream.url, "--max-in-flight", "1"), bench.log) as (_, url):
            file, _ = upload(url, path)
            for _ in range(bench.rounds):
                upstream.at = None
                started = time.perf_counter()
                batch = create(url, file)
                while upstream.at is None:
                    time.sleep(0.0005)
                took.append(upstream.at - started)
                call(f"{url}/v1/batches/{batch['id']}/cancel", "POST")
                while call(f"{url}/v1/batches/{batch['id']}")["status"] not in ENDED:
                    time.sleep(0.05)
        name = f"4  create → first request sent, {requests:,} lines"
        rows.append((name, f"≤ {reach} ms", f"{1e3 * statistics.median(took):.0f} ms"))
    return rows


def cost_of_many(bench: Bench) -> list[Row]:
    """Row 5: what a request costs among a million, and among ten thousand."""
    if not bench.long:
        return []
    with (
        running(simulate("--latency", "0ms", "--concurrency", "0"), bench.log) as (_, upstream),
        running(bench.serve(upstream, "--max-in-flight", "256"), bench.log) as (server, url),
    ):
        few = []
        for turn in range(5):
            few.append(run_batch(url, server.pid, bench.file(10_000, 200, f"few {turn}"), 10_000)["cpu"] / 10_000)
        many = run_batch(url, server.pid, bench.file(1_000_000, 200, "many"), 1_000_000)["cpu"] / 1_000_000
    ratio = many / statistics.median(few)
    return [("5  CPU a request, 1 000 000 ÷ 10 000 requests", "≤ 1.1", f"{ratio:.2f} ({1e6 * many:.0f} µs)")]


def memory(bench: Bench) -> list[Row]:
    """Row 6: the most memory of the server, and of its worker."""
    rows = []
    for size, reach in ((200, 150), (2_000, 200)) if bench.long else ((200, 150),):
        path = bench.file(size * 240, 4_000, "memory")
        with (
            running(simulate("--latency", "0ms", "--concurrency", "0"), bench.log) as (_, upstream),
            running(bench.serve(upstream, "--max-in-flight", "256"), bench.log) as (server, url),
        ):
            file, _ = upload(url, path)
            until_ended(url, create(url, file)["id"], 0.2)
            _, (of_server, *of_workers) = usage(server.pid)
        megabytes = path.stat().st_size / 1e6
        measured = f"{of_server / 1e6:.0f} MB, worker {of_workers[0] / 1e6:.0f} MB"
        rows.append((f"6  peak memory of the server, a file of {megabytes:.0f} MB", f"≤ {reach} MB", measured))
    return rows


def validation(bench: Bench) -> list[Row]:
    """Row 7: an upload with validation, beside the same bytes as parts, which are only stored."""
    path = bench.file(45_000, 4_000, "upload")
    data = path.read_bytes()
    ratios = []
    with running(bench.serve("http://127.0.0.1:9"), bench.log) as (_, url):
        for _ in range(bench.rounds):
            _, validated = upload(url, path)
            plain = 0.0
            fields = {"filename": "a", "purpose": "batch", "bytes": len(data), "mime_type": "application/jsonl"}
            parts = call(f"{url}/v1/uploads", "POST", fields)["id"]
            for first in range(0, len(data), 60_000_000):
                part = bench.folder / "part"
                part.write_bytes(data[first : first + 60_000_000])
                started = time.perf_counter()
                command = ["curl", "-sS", f"{url}/v1/uploads/{parts}/parts", "-F", f"data=@{part}"]
                subprocess.run(command, check=True, capture_output=True)
                plain += time.perf_counter() - started
            ratios.append((plain / validated, len(data) / validated / 1e6))
    ratio, rate = (statistics.median(values) for values in zip(*ratios, strict=True))
    return [("7  upload MB/s with validation ÷ without", "≥ 0.5", f"{ratio:.2f} ({rate:.0f} MB/s)")]


def answers_under_load(bench: Bench) -> list[Row]:
    """Row 8: how long a look at a batch takes while dispatch is saturated."""
    with (
        running(simulate("--latency", "0ms", "--concurrency", "0"), bench.log) as (_, upstream),
        running(bench.serve(upstream, "--max-in-flight", "256"), bench.log) as (_, url),
    ):
        file, _ = upload(url, bench.file(100_000, 200, "load"))
        id = create(url, file)["id"]
        took = []
        status = ""
        while status not in ENDED:
            started = time.perf_counter()
            status = call(f"{url}/v1/batches/{id}")["status"]
            took.append(time.perf_counter() - started)
            time.sleep(0.005)
    p99 = sorted(took)[int(0.99 * len(took))]
    return [("8  p99 of GET /v1/batches/{id} under saturated dispatch", "≤ 50 ms", f"{1e3 * p99:.0f} ms")]


def many_batches(bench: Bench) -> list[Row]:
    """Row 9: a thousand batches of a hundred requests, beside one of a hundred thousand."""
    ratios = []
    with (
        running(simulate("--latency", "5ms", "--concurrency", "0"), bench.log) as (_, upstream),
        running(bench.serve(upstream, "--max-in-flight", "64"), bench.log) as (_, url),
    ):
        for turn in range(bench.rounds):
            file, _ = upload(url, bench.file(100_000, 100, f"one {turn}"))
            started = time.perf_counter()
            until_ended(url, create(url, file)["id"])
            one = time.perf_counter() - started
            small, _ = upload(url, bench.file(100, 100, f"small {turn}"))
            started = time.perf_counter()
            ids = [create(url, small)["id"] for _ in range(1_000)]
            made = time.perf_counter() - started
            while call(f"{url}/v1/batches?status=validating,in_progress,finalizing&limit=1")["data"]:
                time.sleep(0.05)
            ratios.append((time.perf_counter() - started) / one)
            if {call(f"{url}/v1/batches/{id}")["status"] for id in ids[::100]} != {"completed"}:
                raise SystemExit("a batch did not complete")
    measured = f"{statistics.median(ratios):.2f} (of which creating them takes {made:.1f} s)"
    return [("9  1 000 batches of 100 ÷ one of 100 000, time", "≤ 1.15", measured)]


def to_the_end(bench: Bench) -> list[Row]:
    """Row 10: from the last result recorded to a batch that is completed and its file readable."""
    took = []
    with (
        running(simulate("--latency", "0ms", "--concurrency", "0"), bench.log) as (_, upstream),
        running(bench.serve(upstream, "--max-in-flight", "256"), bench.log) as (_, url),
    ):
        for turn in range(bench.rounds):
            file, _ = upload(url, bench.file(50_000, 200, f"end {turn}"))
            id = create(url, file)["id"]
            recorded = None
            while (batch := call(f"{url}/v1/batches/{id}"))["status"] not in ENDED:
                if recorded is None and batch["request_counts"]["completed"] == 50_000:
                    recorded = time.perf_counter()
                time.sleep(0.002)
            output = call_text(f"{url}/v1/files/{batch['output_file_id']}/content?offset=49999")
            assert json.loads(output)["response"]["status_code"] == 200
            took.append(0.0 if recorded is None else time.perf_counter() - recorded)
    name = "10 last result recorded → completed and readable, 50 000 results"
    return [(name, "≤ 0.5 s", f"{statistics.median(took):.2f} s")]


def call_text(url: str) -> str:
    """What is at an address."""
    return subprocess.run(["curl", "-sS", url], check=True, capture_output=True, text=True).stdout


ROWS: dict[int, Callable[[Bench], list[Row]]] = {
    1: against_the_bare_loop,
    2: against_the_sdk,
    3: against_the_ideal,
    4: to_the_first_request,
    5: cost_of_many,
    6: memory,
    7: validation,
    8: answers_under_load,
    9: many_batches,
    10: to_the_end,
}


def main() -> None:
    """Measure, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows, such as 1,3,8; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", action="store_true")
    options = parser.parse_args()
    wanted = [int(row) for row in options.only.split(",") if row] or list(ROWS)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before, medians of {options.rounds} rounds\n")
    print("| measure | reach | measured |\n|---|---|---|", flush=True)
    for number in wanted:
        with tempfile.TemporaryDirectory() as folder:
            for row in ROWS[number](Bench(Path(folder), options.rounds, options.long)):
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
