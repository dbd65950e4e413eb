"""Clients in great number that hold connections and do nothing with them: everybody else is served."""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from tests.processes import Process, server
from tests.requests import chat_file

NOWHERE = "http://127.0.0.1:9"
IDLE = 10_000
SLOW = 200
OTHERS = 500
"""Descriptors that this process needs besides the connections."""

PER_CONNECTION = 64 * 1024
"""Bytes of memory that an idle connection may cost the server; measured are 3 to 19 KiB."""


@contextlib.contextmanager
def many_files() -> Iterator[int]:
    """As many open files as the system lets this process have; says how many connections that is."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        yield IDLE if before[1] == resource.RLIM_INFINITY else min(IDLE, before[1] - OTHERS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def connections(process: Process, count: int, *said: bytes) -> Iterator[list[socket.socket]]:
    """Connections on which nothing is sent but this."""
    port = int(process.url.rsplit(":", 1)[1])
    made = []
    try:
        for _ in range(count):
            each = socket.create_connection(("127.0.0.1", port), timeout=30)
            made.append(each)
            for data in said:
                each.sendall(data)
        yield made
    finally:
        for each in made:
            each.close()


def works(process: Process, data: bytes) -> None:
    """All that a client does."""
    client = openai.OpenAI(base_url=process.url + "/v1", api_key="any", max_retries=0, timeout=20)
    file = client.files.create(file=("input.jsonl", data), purpose="batch")
    assert client.files.content(file.id).read() == data
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert client.batches.retrieve(batch.id).id == batch.id
    assert client.batches.cancel(batch.id).status == "cancelling"
    client.files.list(limit=10)


@pytest.mark.parametrize("said", [b"", b"GET /v1/files HTTP/1.1\r\nHost: x\r\nX-Half: "])
def test_idle_connections(said: bytes, tmp_path: Path) -> None:
    """10 000 of them, or as many as the limit of open files allows."""
    with many_files() as count, server(tmp_path, NOWHERE) as running:
        works(running, chat_file(100))
        main = psutil.Process(running.pid)
        memory, files = main.memory_info().rss, main.num_fds()
        with connections(running, count, said):
            began = time.monotonic()
            works(running, chat_file(5000))
            took = time.monotonic() - began
            held = main.num_fds() - files
            used = main.memory_info().rss - memory
        print(f"{held} connections, {used / count / 1024:.1f} KiB each; a client was served in {took:.2f} s")
        assert held > count * 0.9
        assert used < count * PER_CONNECTION + 100_000_000
        works(running, chat_file(100))


def test_clients_who_send_a_byte_now_and_then(tmp_path: Path) -> None:
    """200 uploads, 200 bodies and 200 heads that come byte by byte; they hold no place that others need."""
    upload = (
        b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    body = b"POST /v1/batches HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    with many_files(), server(tmp_path, NOWHERE) as running, contextlib.ExitStack() as on:
        uploads = on.enter_context(connections(running, SLOW, upload))
        bodies = on.enter_context(connections(running, SLOW, body))
        heads = on.enter_context(connections(running, SLOW, b"GET /v1/fi"))
        for place in range(3):
            for each in uploads:
                each.sendall(b"1\r\n%c\r\n" % b"--b"[place])
            for each in bodies:
                each.sendall(b" ")
            for each in heads:
                each.sendall(b"l")
            works(running, chat_file(2000))


def test_more_connections_than_files(tmp_path: Path) -> None:
    """With a low limit of open files some clients wait; the server neither ends nor fails anybody it has let in."""
    limit = 400
    program = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2); "
    program += "os.execv(sys.executable, [sys.executable, '-m', 'batchery', *sys.argv[2:]])"
    arguments = ["serve", "--port", "0", "--data-dir", str(tmp_path / "data"), "--upstream", NOWHERE]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(limit), *arguments], stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        running = Process.__new__(Process)
        running.url = url
        works(running, chat_file(100))
        main = psutil.Process(process.pid)
        with connections(running, 2 * limit):
            assert main.num_fds() < limit
        works(running, chat_file(2000))
        assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()
    assert "Traceback" not in (tmp_path / "server.log").read_text()
