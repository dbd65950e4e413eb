"""Serving: the port, the beginning, and the end."""

from __future__ import annotations

import asyncio
import resource
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from batchery.server import events, http
from batchery.server.http import serve_http
from batchery.server.port import AddressInUse, take_port
from batchery.store.database import sqlite_url
from tests.requests import chat_file
from tests.server.following import Life, follow
from tests.server.rig import Rig, running, until


async def _never(*_: Any) -> None:
    raise AssertionError("not to be called")


async def test_an_address_in_use_is_refused(rig: Rig) -> None:
    with pytest.raises(AddressInUse, match=str(rig.port)):
        take_port("127.0.0.1", rig.port)
    with pytest.raises(OSError):  # noqa: PT011 (no interface has it)
        take_port("203.0.113.1", rig.port)


async def test_a_port_that_was_taken_first_by_somebody_who_does_not_know_of_it() -> None:
    port = take_port("127.0.0.1", 0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port.number))
        other.listen()
        with pytest.raises(AddressInUse, match=str(port.number)):
            await serve_http(_never, port, asyncio.Event(), lambda: None)
    port.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names that no file has")
def test_a_port_is_held_before_anybody_listens_there() -> None:
    """Or two servers that are started together would share it, and each get half of the connections."""
    port = take_port("127.0.0.1", 0)
    with pytest.raises(AddressInUse, match=str(port.number)):
        take_port("127.0.0.1", port.number)
    port.close()
    take_port("127.0.0.1", port.number).close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::1", "::"])
async def test_it_accepts_when_it_says_so(host: str, capfd: pytest.CaptureFixture[str]) -> None:
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    stop, port = asyncio.Event(), take_port(host, 0)
    accepted: list[bool] = []

    def ready() -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.connect(("::1" if ":" in host else "127.0.0.1", port.number))
            accepted.append(True)
        stop.set()

    await asyncio.wait_for(serve_http(_never, port, stop, ready), 10)
    port.close()
    assert accepted == [True]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize("patient", [True, False])
async def test_requests_in_flight_may_end_for_a_while(patient: bool, capfd: pytest.CaptureFixture[str]) -> None:
    stop, ready, begun, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event(), asyncio.Event()
    cleaned_up: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        try:
            await go_on.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"whole", "more_body": False})
        finally:
            cleaned_up.append(True)

    port = take_port("127.0.0.1", 0)
    serving = asyncio.create_task(serve_http(app, port, stop, ready.set, grace=10 if patient else 0.05))
    await asyncio.wait_for(ready.wait(), 10)
    reader, writer = await asyncio.open_connection("127.0.0.1", port.number)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.wait_for(begun.wait(), 10)
    stop.set()
    if patient:
        go_on.set()
        assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"whole")
    await asyncio.wait_for(serving, 10)
    port.close()
    assert cleaned_up == [True]
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port.number)
    writer.close()
    assert capfd.readouterr() == ("", "")


async def test_many_idle_connections_hold_nobody_up(rig: Rig) -> None:
    idle = [await asyncio.open_connection("127.0.0.1", rig.port) for _ in range(300)]
    assert (await rig.ask("GET", "/healthz")).status == 200
    for _, writer in idle:
        writer.close()


@pytest.mark.parametrize(
    ("files", "connections"),
    [(resource.RLIM_INFINITY, 16_384), (1 << 20, 16_384), (20_000, 16_384), (1024, 768), (300, 44), (100, 1)],
)
def test_connections_leave_files_for_the_rest(files: int, connections: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert http._max_connections() == connections


async def stalled(rig: Rig, file: str) -> socket.socket:
    """A connection that gets the beginning of a file, and takes no more of it."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(20):
        while True:
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", rig.port))
            client.send(b"GET /v1/files/%b/content HTTP/1.1\r\nHost: x\r\n\r\n" % file.encode())
            if await loop.sock_recv(client, 12) == b"HTTP/1.1 200":
                return client
            client.close()  # the place of another is just not free yet


async def test_who_takes_nothing_of_a_download_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "STALL_MS", 2000)
    async with running(sqlite_url(tmp_path / "b.db"), tmp_path) as rig:
        data = chat_file(2000, padding=10_000)
        file = (await rig.upload(data))["id"]
        process = psutil.Process()
        clients = [await stalled(rig, file) for _ in range(3)]
        ours = {client.getsockname()[1] for client in clients}

        def held() -> int:
            """How many of these connections the server still holds its ends of."""
            found = process.net_connections("tcp")
            return len(
                [each for each in found if each.raddr and each.raddr.port in ours and each.laddr.port == rig.port]
            )

        try:
            await until(lambda: held() == 3)
            await until(lambda: held() == 0, 20)
        finally:
            for client in clients:
                client.close()
        await until(lambda: not [each for each in process.open_files() if each.path.startswith(str(rig.folder))])
        assert (await rig.ask("GET", f"/v1/files/{file}/content")).body == data


async def test_files_are_sent_so_many_at_a_time(tmp_path: Path) -> None:
    """However a download ends, its place is free again."""
    async with running(sqlite_url(tmp_path / "b.db"), tmp_path, max_downloads=1) as rig:
        data = chat_file(2000, padding=10_000)
        file = (await rig.upload(data))["id"]
        path = f"/v1/files/{file}/content"
        for _ in range(3):
            client = await stalled(rig, file)
            answer = await rig.ask("GET", path)
            assert answer.error()["code"] == "too_many_downloads"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert (await rig.ask("GET", f"/v1/files/{file}")).status == 200
            client.close()
            async with asyncio.timeout(20):
                while (await rig.ask("GET", path)).status == 429:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert (await rig.ask("GET", path + "?offset=1999")).status == 200


async def test_results_take_a_place_among_the_files_that_are_sent(tmp_path: Path) -> None:
    """They hold as many megabytes as a download while a client takes its time."""
    async with running(sqlite_url(tmp_path / "b.db"), tmp_path, max_downloads=1) as rig:
        file = (await rig.upload(chat_file(2000, padding=10_000)))["id"]
        path = f"/v1/batches/{(await rig.create(file)).json['id']}/results"
        for query in ("", "?status=failed", "?offset=1999"):
            assert (await rig.ask("HEAD", path + query)).status == 200
            assert (await rig.ask("GET", path + query)).status == 200
        client = await stalled(rig, file)
        assert (await rig.ask("GET", path)).error()["code"] == "too_many_downloads"
        client.close()


async def test_the_lines_of_an_event_stream_wait_for_a_place_likewise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "RETRY", 0.01)
    async with running(sqlite_url(tmp_path / "b.db"), tmp_path, max_downloads=1) as rig:
        file = (await rig.upload(chat_file(2000, padding=10_000)))["id"]
        life = await Life(rig.context).begin()
        await life.grow([b'"one"'])
        client = await stalled(rig, file)
        async with follow(rig, life, "?lines=true") as stream:
            line = asyncio.ensure_future(stream.until("output"))
            await until(lambda: len(stream.comments) > 1)
            assert not line.done()
            client.close()
            assert (await asyncio.wait_for(line, 20)).raw == b'"one"'
            (await stalled(rig, file)).close()  # no place is held where there is nothing to send
