"""What the benchmarks share: batchery's processes, input files, and what these cost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ENDED = ("completed", "failed", "expired", "cancelled")


def start(arguments: list[str], log: Path) -> tuple[subprocess.Popen[str], str]:
    """Start a batchery command; the process, and the address that it prints."""
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "batchery", *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    if "listening on" not in line:
        raise SystemExit(f"batchery {arguments[0]} did not start:\n{log.read_text()}")
    return process, line.split()[-1]


def make_file(path: Path, count: int, body_bytes: int, mark: str) -> None:
    """An input file of chat requests, no two alike."""
    padding = "x" * body_bytes
    with path.open("w") as file:
        for i in range(count):
            body = {"model": "m", "messages": [{"role": "user", "content": f"{mark} {i} {padding}"}]}
            request = {"custom_id": f"request-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(request) + "\n")


def call(url: str, method: str = "GET", body: Any = None) -> Any:
    """One JSON call."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def upload(url: str, path: Path) -> tuple[str, float]:
    """Upload a file with curl, which streams it; the file's id and the seconds that it took."""
    started = time.perf_counter()
    done = subprocess.run(
        ["curl", "-sS", f"{url}/v1/files", "-F", "purpose=batch", "-F", f"file=@{path}"],
        check=True,
        capture_output=True,
    )
    return json.loads(done.stdout)["id"], time.perf_counter() - started


def usage(pid: int) -> tuple[float, list[int]]:
    """CPU seconds and peak resident bytes of a process and its children, the latter one by one."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    seconds, peaks = 0.0, []
    for process in processes:
        times = process.cpu_times()
        seconds += times.user + times.system
        status = Path(f"/proc/{process.pid}/status").read_text()
        peaks.append(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))
    return seconds, peaks


@contextmanager
def running(arguments: list[str], log: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A batchery command for the length of a block; the process, and the address that it prints."""
    process, address = start(arguments, log)
    try:
        yield process, address
    finally:
        process.terminate()
        process.wait(60)


def create(url: str, file: str) -> Any:
    """Create a batch over an uploaded file."""
    request = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return call(f"{url}/v1/batches", "POST", request)
