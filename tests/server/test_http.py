"""Serving: the port, the beginning, and the end."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from batchery.server.http import AddressInUse, serve_http
from tests.server.rig import Rig, free_port


async def _never(*_: Any) -> None:
    raise AssertionError("not to be called")


async def test_an_address_in_use_is_refused(rig: Rig) -> None:
    with pytest.raises(AddressInUse, match=str(rig.port)):
        await serve_http(_never, "127.0.0.1", rig.port, asyncio.Event(), lambda: None)
    with pytest.raises(OSError):  # noqa: PT011 (no interface has it)
        await serve_http(_never, "203.0.113.1", rig.port, asyncio.Event(), lambda: None)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::1", "::"])
async def test_it_accepts_when_it_says_so(host: str, capfd: pytest.CaptureFixture[str]) -> None:
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    stop, port = asyncio.Event(), free_port()
    accepted: list[bool] = []

    def ready() -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.connect(("::1" if ":" in host else "127.0.0.1", port))
            accepted.append(True)
        stop.set()

    await asyncio.wait_for(serve_http(_never, host, port, stop, ready), 10)
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

    port = free_port()
    serving = asyncio.create_task(serve_http(app, "127.0.0.1", port, stop, ready.set, grace=10 if patient else 0.05))
    await asyncio.wait_for(ready.wait(), 10)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.wait_for(begun.wait(), 10)
    stop.set()
    if patient:
        go_on.set()
        assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"whole")
    await asyncio.wait_for(serving, 10)
    assert cleaned_up == [True]
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    assert capfd.readouterr() == ("", "")


async def test_many_idle_connections_hold_nobody_up(rig: Rig) -> None:
    idle = [await asyncio.open_connection("127.0.0.1", rig.port) for _ in range(300)]
    assert (await rig.ask("GET", "/healthz")).status == 200
    for _, writer in idle:
        writer.close()
