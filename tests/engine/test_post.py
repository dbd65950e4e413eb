"""One POST: it goes to the address given and nowhere else, and no answer can hold it up or fill memory."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from batchery.engine import post as module
from batchery.engine.egress import Address, parse_target
from batchery.engine.post import PostError, Reply, post
from tests.receivers import receiver, status

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

HERE: list[Address] = [ipaddress.ip_address("127.0.0.1")]
TLS = ssl.create_default_context()


async def send(url: str, body: bytes = b"{}", to: list[Address] = HERE, tls: ssl.SSLContext = TLS) -> Reply:
    return await post(parse_target(url), to, {"Content-Type": "application/json"}, body, tls)


@asynccontextmanager
async def answering(answer: bytes | Answering, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that says these bytes to whatever it is sent, and closes; its port."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await reader.readuntil(b"\r\n\r\n{}")
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(reader, writer)
        except OSError:
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the address, whatever the name is, and past any proxy."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    body = b'{"a":"\xc3\xbc"}' * 10_000
    with receiver(status(202, Retry_After="7")) as found:
        reply = await send(f"http://Hooks.invalid:{found.port}/a%20b?c=d", body)
    (delivery,) = found.deliveries
    assert (delivery.method, delivery.path, delivery.body) == ("POST", "/a%20b?c=d", body)
    assert delivery.headers == {
        "host": f"hooks.invalid:{found.port}",
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    assert reply == Reply(202, "7")


async def test_redirects_are_not_followed() -> None:
    with receiver() as other, receiver(status(307, Location=other.url)) as found:
        assert (await send(found.url)).status == 307
    assert len(found.deliveries) == 1
    assert other.deliveries == []


async def test_the_next_address_is_tried() -> None:
    """As long as none has connected; how many is bounded."""
    dead: list[Address] = [ipaddress.ip_address(f"127.0.0.{i}") for i in (2, 3, 4)]
    with receiver() as found:
        assert (await send(found.url, to=[*dead[:2], *HERE])).status == 200
        with pytest.raises(PostError, match=r"no connection to 127\.0\.0\.4, port \d+: connection refused"):
            await send(found.url, to=[*dead, *HERE])
    assert len(found.deliveries) == 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "closed without an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "closed without an answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "not one in HTTP/1"),
        (b"HTTP/1.1 abc\r\n\r\n", "not one in HTTP/1"),
        (b"\x00" * 100, "not one in HTTP/1"),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", "not one in HTTP/1"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "closed without an answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"X-Long: " + b"x" * 200_000, "head is longer than 65536 bytes"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 50_000, "head is longer than 65536 bytes"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000, "head is longer than 65536 bytes"),
    ],
)
async def test_no_answer(answer: bytes, error: str) -> None:
    async with answering(answer) as port:
        with pytest.raises(PostError, match=error):
            await asyncio.wait_for(send(f"http://127.0.0.1:{port}/"), 10)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 204 No Content\r\nRetry-After: 3\r\n\r\n",
        b"HTTP/1.0 204 No Content\r\nretry-after:3\r\n\r\nnot a body",
        b"HTTP/1.1 100 Continue\r\nRetry-After: 9\r\n\r\nHTTP/1.1 204 No Content\r\nRetry-After: 3\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 99\r\nRetry-After: 3\r\n\r\nshort",
        b"HTTP/1.1 204 No Content\r\nRetry-After: 3\r\n\r\nHTTP/1.1 500 No\r\nRetry-After: 4\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\nRetry-After: 3\r\n\r\nzz\r\n",
    ],
)
async def test_the_head_is_the_answer(answer: bytes) -> None:
    """Whatever follows it."""
    async with answering(answer) as port:
        assert await send(f"http://127.0.0.1:{port}/") == Reply(204, "3")


async def test_a_body_without_end() -> None:
    """Little of it is read, and then the connection is closed."""
    closed = asyncio.Event()
    sent = 0

    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            while True:
                writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                sent += 4096
                await writer.drain()
        finally:
            closed.set()

    async with answering(endless) as port:
        assert (await asyncio.wait_for(send(f"http://127.0.0.1:{port}/"), 10)).status == 200
        await asyncio.wait_for(closed.wait(), 10)
    assert sent < 64 * 1024 * 1024


async def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER", 0.05)

    async def stalling(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx")
        await reader.read()

    async with answering(stalling) as port:
        assert (await asyncio.wait_for(send(f"http://127.0.0.1:{port}/"), 10)).status == 200


async def test_a_connection_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and says nothing to a TLS greeting."""
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", 0.1)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    listening = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        with pytest.raises(PostError, match="nothing within"):
            await asyncio.wait_for(send(f"https://127.0.0.1:{port}/"), 10)


async def test_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection does not outlive the attempt."""
    came, closed = asyncio.Event(), asyncio.Event()

    async def hanging(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set()
        try:
            await reader.read()
        finally:
            closed.set()

    async with answering(hanging) as port:
        task = asyncio.create_task(send(f"http://127.0.0.1:{port}/"))
        await asyncio.wait_for(came.wait(), 10)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        await asyncio.wait_for(closed.wait(), 10)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of its own authority, for hooks.invalid, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ours")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(hours=1), now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("hooks.invalid")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "both.pem"
    path.write_bytes(
        made.public_bytes(Encoding.PEM) + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return path


async def test_tls(certificate: Path) -> None:
    """The certificate must be good for the name in the URL, though the connection goes to an address; without a good
    one nothing is sent."""
    served: list[str | None] = []
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate)
    server.sni_callback = lambda _socket, name, _context: served.append(name)
    trusting = ssl.create_default_context(cafile=str(certificate))
    async with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", server) as port:
        assert (await send(f"https://hooks.invalid:{port}/", tls=trusting)).status == 200
        assert served == ["hooks.invalid"]
        for url, tls in ((f"https://other.invalid:{port}/", trusting), (f"https://hooks.invalid:{port}/", TLS)):
            with pytest.raises(PostError, match="the certificate is not good"):
                await send(url, tls=tls)
        with pytest.raises(PostError):
            await send(f"http://hooks.invalid:{port}/", tls=trusting)
    async with answering(b"x") as port:
        with pytest.raises(PostError, match="no connection to"):
            await asyncio.wait_for(send(f"https://hooks.invalid:{port}/", tls=trusting), 10)
