"""A batch from upload to finished file, beside a bare loop of the same HTTP client against the same upstream.

    python -m benchmarks.end_to_end [--requests 20000] [--in-flight 256] [--latency 0ms] [--body-bytes 500]

The upstream is `batchery simulate` in a process of its own. The bare loop keeps the same number of requests in flight
and throws the answers away; the batch is validated, planned, recorded durably and finished. The two take turns, and the
ratio within a turn is what counts on a shared machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from batchery.upstreams.http import HttpUpstream
from benchmarks.processes import ENDED, call, create, make_file, start, upload, usage

BARE = "--bare"


async def bare_loop(url: str, path: Path, in_flight: int) -> None:
    """Send every request of a file and throw the answers away; prints the seconds and CPU seconds that it took."""
    bodies = [(line["url"], json.dumps(line["body"]).encode()) for line in map(json.loads, path.open())]
    upstream = HttpUpstream(url)
    queue = iter(bodies)

    async def slot() -> None:
        for target, body in queue:
            await upstream.send(target, body)

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(slot() for _ in range(in_flight)))
    print(json.dumps({"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}))
    await upstream.close()


def run_bare(url: str, path: Path, in_flight: int) -> dict[str, float]:
    """The bare loop, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.end_to_end", BARE, url, str(path), str(in_flight)]
    done = subprocess.run(command, check=True, capture_output=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def run_batch(url: str, pid: int, path: Path, count: int) -> dict[str, float]:
    """One batch over the file, from its upload to its finished output."""
    file, upload_seconds = upload(url, path)
    cpu_before, _ = usage(pid)
    started = time.perf_counter()
    batch = create(url, file)
    created = time.perf_counter() - started
    while batch["status"] not in ENDED:
        time.sleep(0.02)
        batch = call(f"{url}/v1/batches/{batch['id']}")
    seconds = time.perf_counter() - started
    cpu_after, peaks = usage(pid)
    if batch["status"] != "completed" or batch["request_counts"]["completed"] != count:
        raise SystemExit(f"the batch did not complete: {batch}")
    return {
        "seconds": seconds,
        "created": created,
        "upload": upload_seconds,
        "cpu": cpu_after - cpu_before,
        "peak": max(peaks),
        "peak_sum": sum(peaks),
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--latency", default="0ms")
    parser.add_argument("--body-bytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        simulator, upstream = start(
            ["simulate", "--port", "0", "--latency", options.latency, "--concurrency", "0"], folder / "simulator.log"
        )
        server, url = start(
            [
                *("serve", "--port", "0", "--data-dir", str(folder / "data"), "--upstream", upstream),
                *("--max-in-flight", str(options.in_flight), "--max-requests", str(max(options.requests, 50_000))),
                *("--log-level", "warning"),
            ],
            folder / "server.log",
        )
        try:
            rounds = []
            for turn in itertools.count():
                path = folder / "input.jsonl"
                make_file(path, options.requests, options.body_bytes, f"round {turn}")
                batch = run_batch(url, server.pid, path, options.requests)
                bare = run_bare(upstream, path, options.in_flight)
                rounds.append((bare, batch))
                if turn + 1 >= options.rounds:
                    break
            _print(options, rounds, path.stat().st_size)
        finally:
            for process in (server, simulator):
                process.terminate()
                process.wait(30)


def _print(options: argparse.Namespace, rounds: list[tuple[dict[str, float], dict[str, float]]], size: int) -> None:
    def median(values: list[float]) -> float:
        return statistics.median(values)

    count = options.requests
    bare = [turn[0] for turn in rounds]
    batch = [turn[1] for turn in rounds]
    print(
        f"{count} requests of {size / count:.0f} bytes, {options.in_flight} in flight, upstream latency "
        f"{options.latency}, {os.cpu_count()} cores, median of {len(rounds)} rounds"
    )
    print(f"  bare loop            {count / median([r['seconds'] for r in bare]):9.0f} requests/s", end="")
    print(f"  {1e6 * median([r['cpu'] for r in bare]) / count:6.0f} us CPU a request")
    print(f"  durable batch        {count / median([r['seconds'] for r in batch]):9.0f} requests/s", end="")
    print(f"  {1e6 * median([r['cpu'] for r in batch]) / count:6.0f} us CPU a request (server and worker)")
    print(f"  batch / bare         {median([a['seconds'] / b['seconds'] for a, b in rounds]):9.2f}")
    print(f"  upload               {size / median([r['upload'] for r in batch]) / 1e6:9.0f} MB/s, validated and synced")
    print(f"  create               {1e3 * median([r['created'] for r in batch]):9.1f} ms")
    print(f"  peak memory          {max(r['peak'] for r in batch) / 1e6:9.0f} MB in one process", end="")
    print(f", {max(r['peak_sum'] for r in batch) / 1e6:.0f} MB in both")


if __name__ == "__main__":
    if BARE in sys.argv:
        _, _, address, file, slots = sys.argv
        uvloop.run(bare_loop(address, Path(file), int(slots)))
    else:
        main()
