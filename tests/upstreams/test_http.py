"""The HTTP upstream: whatever a server does comes back as a value, and says what became of the request."""

from __future__ import annotations

import asyncio
import gzip
import random
import socket
import ssl
import struct
import time
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

from batchery.upstreams import http
from batchery.upstreams.base import Answer, Fault, RateLimit
from batchery.upstreams.http import HttpUpstream, InvalidUpstreamError, base_url, rate_limit, retry_after
from batchery.upstreams.simulator import Behaviour, running_simulator

NOW = 1_445_412_420.0
"""One minute before Wed, 21 Oct 2015 07:28:00 GMT."""

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
CHAT = "/v1/chat/completions"
Behave = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Server:
    """A server on a raw socket: reads a request, and then does as told.

    Attributes:
        url: its address.
        requests: the head and the body of each that came.
        gone: how many clients have left.
    """

    def __init__(self, behave: Behave) -> None:
        self._behave = behave
        self.url = ""
        self.requests: list[tuple[str, bytes]] = []
        self.gone = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    (int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-length:")), 0
                )
                self.requests.append((head, await reader.readexactly(length)))
                await self._behave(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone += 1
        finally:
            writer.close()


def answering(data: bytes) -> Behave:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        writer.close()

    return answer


@asynccontextmanager
async def serving(behave: Behave | bytes) -> AsyncIterator[Server]:
    """A server that behaves so; bytes: answers with them and closes."""
    server = Server(answering(behave) if isinstance(behave, bytes) else behave)
    listening = await asyncio.start_server(server, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()


async def ask(url: str, *, timeout: float = 5.0, key: str | None = None, body: bytes = b"{}") -> Answer | Fault:
    upstream = HttpUpstream(url, timeout=timeout, key=key)
    try:
        async with asyncio.timeout(20):
            return await upstream.send(CHAT, body)
    finally:
        await upstream.close()


def refusing_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


async def reset(writer: asyncio.StreamWriter) -> None:
    await writer.drain()
    peer = writer.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# What is sent.


async def test_a_body_travels_byte_for_byte() -> None:
    body = '{"model": "m",  "x": "\u2028é", "y":1e5}'.encode() + b" " * 100_000
    async with serving(OK) as server:
        upstream = HttpUpstream(server.url + "/v1/", key="sk-secret")
        answer = await upstream.send(CHAT, memoryview(body))
        await upstream.close()
    assert answer == Answer(200, b"{}")
    ((head, sent),) = server.requests
    assert sent == body
    lines = head.lower().split("\r\n")
    assert lines[0] == "post /v1/chat/completions http/1.1"
    assert "authorization: bearer sk-secret" in lines
    assert "content-type: application/json" in lines


async def test_without_a_key_none_is_sent() -> None:
    async with serving(OK) as server:
        await ask(server.url)
    assert "authorization" not in server.requests[0][0].lower()


async def test_a_path_in_the_address_is_kept() -> None:
    async with serving(OK) as server:
        await ask(server.url + "/openai/v1")
    assert server.requests[0][0].startswith("POST /openai/v1/chat/completions ")


async def test_a_redirect_is_not_followed_and_takes_no_key_along() -> None:
    async with serving(OK) as other:
        moved = f"HTTP/1.1 307 Moved\r\nLocation: {other.url}/v1/chat/completions\r\nContent-Length: 0\r\n\r\n"
        async with serving(moved.encode()) as server:
            assert await ask(server.url, key="sk-secret") == Answer(307, b"")
    assert len(server.requests) == 1
    assert other.requests == []


async def test_a_cancelled_request_ends_its_connection() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'
    async with running_simulator(Behaviour(stall_rate=1)) as simulator:
        upstream = HttpUpstream(simulator.url)
        task = asyncio.create_task(upstream.send(CHAT, body))
        async with asyncio.timeout(1):
            while simulator.stats().in_flight == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while simulator.stats().in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        assert simulator.stats().aborted == 1
        await upstream.close()


async def test_a_request_that_is_cancelled_within_its_answer_ends_its_connection() -> None:
    async def begin(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()

    async with serving(begin) as server:
        upstream = HttpUpstream(server.url)
        task = asyncio.create_task(upstream.send(CHAT, b"{}"))
        async with asyncio.timeout(5):
            while not server.requests:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while not server.gone:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        await upstream.close()


async def test_cancellations_spoil_no_other_request() -> None:
    """Whenever a cancellation comes, it ends its own request, and each of the others gets its own answer."""
    draw = random.Random(1)

    async def echo(writer: asyncio.StreamWriter) -> None:
        head = server.requests[-1][0].lower()
        number = head.split("post /", 1)[1].split(" ", 1)[0].encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(number))
        await asyncio.sleep(0)
        writer.write(number)

    async def one(number: int) -> None:
        task = asyncio.create_task(upstream.send(f"/{number}", b"{}"))
        if number % 2:
            asyncio.get_running_loop().call_later(draw.random() * 0.003, task.cancel)
        try:
            assert await task == Answer(200, str(number).encode())
        except asyncio.CancelledError:
            assert number % 2

    async with serving(echo) as server:
        upstream = HttpUpstream(server.url)
        async with asyncio.timeout(20):
            for start in range(0, 1000, 50):
                await asyncio.gather(*map(one, range(start, start + 50)))
        await upstream.close()


async def test_a_closed_upstream_cancels_nobody() -> None:
    async def stall(writer: asyncio.StreamWriter) -> None:
        await writer.drain()

    async with serving(stall) as server:
        upstream = HttpUpstream(server.url)
        task = asyncio.create_task(upstream.send(CHAT, b"{}"))
        async with asyncio.timeout(5):
            while not server.requests:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            await upstream.close()
            closed = Fault("broken", "The client of the upstream was closed.")
            assert await task == closed
            assert await upstream.send(CHAT, b"{}") == closed
            assert await upstream.models() == []


# What comes back.


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (OK, Answer(200, b"{}")),
        (b"HTTP/1.1 200 OK\r\nX-Request-Id: abc\r\nContent-Length: 0\r\n\r\n", Answer(200, b"", "abc")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", Answer(204, b"")),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", Answer(200, b"until the end")),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", Answer(200, b"{}")),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, Answer(200, b"{}")),
        (b"HTTP/1.1 429 X\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n", Answer(429, b"", None, 7.0)),
        (
            b"HTTP/1.1 503 X\r\nRetry-After: 7\r\nretry-after-ms: 250\r\nContent-Length: 0\r\n\r\n",
            Answer(503, b"", None, 0.25),
        ),
        (b"HTTP/1.1 200 X\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n", Answer(200, b"")),
        (b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n", Answer(999, b"")),
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=nonsense\r\nContent-Length: 2\r\n\r\n\xff\xfe",
            Answer(200, b"\xff\xfe"),
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(b"{}" * 1000, mtime=0),
            Answer(200, b"{}" * 1000),
        ),
    ],
)
async def test_whole_answers(data: bytes, answer: Answer) -> None:
    async with serving(data) as server:
        assert await ask(server.url) == answer


@pytest.mark.parametrize("name", ["x-request-id", "retry-after", "retry-after-ms"])
async def test_a_header_that_is_not_ascii_spoils_nothing(name: str) -> None:
    head = f"HTTP/1.1 429 X\r\n{name}: ".encode() + b"caf\xe9\r\nContent-Length: 2\r\n\r\n{}"
    async with serving(head) as server:
        answer = await ask(server.url)
    assert isinstance(answer, Answer)
    assert (answer.status, answer.body, answer.retry_after) == (429, b"{}", None)


@pytest.mark.parametrize(
    "data",
    [
        b"",  # closed without a word
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 099 Odd\r\nContent-Length: 0\r\n\r\n",
        b"\x00\x01\x02 nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_000_000 + b"\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_half_answers_are_broken(data: bytes) -> None:
    async with serving(data) as server:
        outcome = await ask(server.url)
    assert isinstance(outcome, Fault)
    assert outcome.kind == "broken", outcome
    assert len(server.requests) == 1


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"])
async def test_a_reset_connection_is_broken(begun: bytes) -> None:
    async def begin_and_reset(writer: asyncio.StreamWriter) -> None:
        writer.write(begun)
        await reset(writer)

    async with serving(begin_and_reset) as server:
        outcome = await ask(server.url)
    assert isinstance(outcome, Fault)
    assert outcome.kind == "broken", outcome


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"])
async def test_a_stall_is_a_timeout(begun: bytes) -> None:
    async def begin_and_stall(writer: asyncio.StreamWriter) -> None:
        writer.write(begun)
        await writer.drain()

    async with serving(begin_and_stall) as server:
        outcome = await ask(server.url, timeout=0.1)
    assert outcome == Fault("timeout", "The upstream did not answer within 0.1 s.")
    assert len(server.requests) == 1


async def test_a_refused_connection_is_unreachable() -> None:
    outcome = await ask(f"http://127.0.0.1:{refusing_port()}")
    assert isinstance(outcome, Fault)
    assert outcome.kind == "unreachable"
    assert "refused" in outcome.message


@pytest.mark.parametrize("url", ["http://no-such-host.invalid", "https://127.0.0.1:1"])
async def test_a_server_that_is_not_there_is_unreachable(url: str) -> None:
    outcome = await ask(url)
    assert isinstance(outcome, Fault)
    assert outcome.kind == "unreachable"


@pytest.mark.parametrize("broken_off", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_a_handshake_that_breaks_off_is_unreachable(broken_off: bytes) -> None:
    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(broken_off)
        await reset(writer)

    async with await asyncio.start_server(break_off, "127.0.0.1", 0) as listening:
        outcome = await ask(f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
    assert isinstance(outcome, Fault)
    assert outcome.kind == "unreachable", outcome


async def test_the_system_s_certificate_authorities_are_trusted_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a company's own")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(hours=1), now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "ca.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "ca.pem", tmp_path / "key.pem")
    server = Server(answering(OK))
    async with await asyncio.start_server(server, "localhost", 0, ssl=context, family=socket.AF_INET) as listening:
        url = f"https://localhost:{listening.sockets[0].getsockname()[1]}"
        stranger = await ask(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert await ask(url) == Answer(200, b"{}")
    assert isinstance(stranger, Fault)
    assert stranger.kind == "unreachable", stranger


@pytest.mark.parametrize("url", ["http://models.invalid", "https://models.invalid"])
async def test_a_proxy_that_is_not_there_is_unreachable(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://user:secret@127.0.0.1:{refusing_port()}")
    outcome = await ask(url)
    assert isinstance(outcome, Fault)
    assert outcome.kind == "unreachable", outcome
    assert "refused" in outcome.message
    assert "secret" not in outcome.message


async def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(OK) as server:
        monkeypatch.setenv("http_proxy", server.url)
        assert await ask("http://models.invalid") == Answer(200, b"{}")
        monkeypatch.setenv("no_proxy", "models.invalid")
        assert isinstance(await ask("http://models.invalid"), Fault)
    assert server.requests[0][0].startswith("POST http://models.invalid/v1/chat/completions ")
    assert len(server.requests) == 1


async def test_no_proxy_stands_before_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{refusing_port()}")
    async with serving(OK) as server:
        assert await ask(server.url) == Answer(200, b"{}")
        assert await ask(server.url.replace("127.0.0.1", "localhost")) == Answer(200, b"{}")


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (Behaviour(reset_rate=1), "broken"),
        (Behaviour(truncate_rate=1), "broken"),
        (Behaviour(stall_rate=1), "timeout"),
    ],
)
async def test_the_simulator_s_faults(behaviour: Behaviour, kind: str) -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'
    async with running_simulator(behaviour) as simulator:
        outcome = await ask(simulator.url, timeout=0.3, body=body)
    assert isinstance(outcome, Fault)
    assert outcome.kind == kind, outcome


async def test_the_simulator_s_answers() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'
    for behaviour, status, wait in (
        (Behaviour(), 200, None),
        (Behaviour(error_rates={429: 1}, retry_after=3), 429, 3.0),
        (Behaviour(error_rates={500: 1}), 500, None),
        (Behaviour(html_rates={502: 1}), 502, None),
        (Behaviour(malformed_rate=1), 200, None),
        (Behaviour(api_key="sk-right"), 401, None),
    ):
        async with running_simulator(behaviour) as simulator:
            answer = await ask(simulator.url, body=body, key="sk-wrong")
        assert isinstance(answer, Answer)
        assert (answer.status, answer.retry_after) == (status, wait)
        assert answer.request_id is None or answer.request_id.startswith("sim-")


async def test_a_server_that_dies_between_requests_is_met_again() -> None:
    """An idle connection that the server has closed is no reason to fail the next request."""
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'
    async with running_simulator() as simulator:
        upstream = HttpUpstream(simulator.url)
        first = await upstream.send(CHAT, body)
        port = int(simulator.url.rsplit(":", 1)[1])
    gone = await upstream.send(CHAT, body)
    async with running_simulator(port=port):
        again = await upstream.send(CHAT, body)
    assert isinstance(first, Answer)
    assert isinstance(gone, Fault)
    assert gone.kind in ("unreachable", "broken")  # broken where the closing was not noticed before the sending
    assert isinstance(again, Answer)
    assert again.status == 200
    await upstream.close()


# Models.


async def test_the_models_that_it_serves() -> None:
    async with running_simulator(Behaviour(models=("a", "b"))) as simulator:
        upstream = HttpUpstream(simulator.url)
        assert [model.id for model in await upstream.models() or ()] == ["a", "b"]
        await upstream.close()


@pytest.mark.parametrize(
    "body",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnope",
        b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"data": ["no"]}',
        b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n" + b'{"data":"\xff"}',
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",
        b'HTTP/1.1 404 X\r\nContent-Length: 11\r\n\r\n{"data":[]}',
        b'HTTP/1.1 200 OK\r\nContent-Length: 100005\r\n\r\n{"x":' + 100_000 * b"[",
        b"",
    ],
)
async def test_a_server_that_does_not_say_its_models(body: bytes) -> None:
    async with serving(body) as server:
        upstream = HttpUpstream(server.url)
        assert await upstream.models() == []
        await upstream.close()
    assert server.requests[0][0].startswith("GET /v1/models ")


async def test_the_models_of_a_server_that_is_loading_are_not_known_yet() -> None:
    async with serving(b"HTTP/1.1 503 X\r\nContent-Length: 2\r\n\r\n{}") as server:
        upstream = HttpUpstream(server.url)
        assert await upstream.models() is None
        await upstream.close()


async def test_models_of_a_server_that_is_not_there() -> None:
    upstream = HttpUpstream(f"http://127.0.0.1:{refusing_port()}")
    assert await upstream.models() is None
    await upstream.close()


# Addresses and headers.


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://h", "http://h"),
        ("http://h/", "http://h"),
        ("http://h:8000/v1", "http://h:8000"),
        ("http://h:8000/v1/", "http://h:8000"),
        (" https://h/openai/v1 ", "https://h/openai"),
        ("http://h/v1/v1", "http://h/v1"),
        ("http://h/v10", "http://h/v10"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
        ("HTTP://h/v1", "http://h"),
    ],
)
def test_base_url(given: str, used: str) -> None:
    assert base_url(given) == used


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h:8000",
        "127.0.0.1:8000",
        "localhost",
        "ftp://h/v1",
        "http://",
        "http:///v1",
        "http://user:secret@h/v1",
        "http://h/v1?key=secret",
        "http://h/v1#x",
        "http://h:99999/v1",
        "http://h:port/v1",
        "http://[::1/v1",
        "http://exa mple/v1",
        "http://exa%mple/v1",
        "http://h:+80/v1",
        "http://[::1]h/v1",
        "http://[::g]/v1",
    ],
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(InvalidUpstreamError) as caught:
        base_url(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "milliseconds", "seconds"),
    [
        (None, None, None),
        ("7", None, 7.0),
        (" 7 ", None, 7.0),
        ("0", None, 0.0),
        ("1.5", None, 1.5),
        ("-3", None, 0.0),
        ("100000", None, 86_400.0),
        ("inf", None, 86_400.0),
        ("-inf", None, 0.0),
        ("1e400", None, 86_400.0),
        ("nan", None, None),
        ("", None, None),
        ("soon", None, None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", None, 60.0),
        ("Wednesday, 21-Oct-15 07:28:00 GMT", None, 60.0),  # RFC 850, which a reader must still know
        ("Wed Oct 21 07:28:00 2015", None, 60.0),  # asctime, likewise
        ("Wed, 21 Oct 2015 07:27:30 -0000", None, 30.0),
        ("Tue, 20 Oct 2015 07:28:00 GMT", None, 0.0),
        ("Wed, 21 Oct 2099 07:28:00 GMT", None, 86_400.0),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None, None),
        ("Wed, 21 Oct 2015 07:28:00 +9999", None, None),
        ("Wed, 21 Oct 99999 07:28:00 GMT", None, None),
        ("7", "250", 0.25),
        ("7", "nan", 7.0),
        ("7", "soon", 7.0),
        (None, "-5", 0.0),
        (None, "1e9", 86_400.0),
    ],
)
def test_retry_after(value: str | None, milliseconds: str | None, seconds: float | None) -> None:
    assert retry_after(value, milliseconds, NOW) == seconds


def test_a_date_without_a_zone_is_gmt_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert retry_after("Wed Oct 21 07:28:00 2015", None, NOW) == 60.0
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("left", "reset", "expected"),
    [
        ("59", "1s", RateLimit(59, None, 1.0, None)),
        (" 0 ", "6m0s", RateLimit(0, None, 360.0, None)),
        ("0", "250ms", RateLimit(0, None, 0.25, None)),
        ("0", "1h2m3.5s", RateLimit(0, None, 3723.5, None)),
        ("0", "2.5", RateLimit(0, None, 2.5, None)),
        ("-3", "soon", RateLimit(0, None, None, None)),
        ("1.0", "", RateLimit(1, None, None, None)),
        ("0", "-1s", RateLimit(0, None, None, None)),
        ("0", "ms", RateLimit(0, None, None, None)),
        ("0", "9" * 400, RateLimit(0, None, None, None)),
        ("many", "1s", None),
        ("9" * 400, "1s", None),
        ("", "1s", None),
        (None, "1s", None),
    ],
)
def test_rate_limits(left: str | None, reset: str | None, expected: RateLimit | None) -> None:
    assert rate_limit(left, None, reset, None) == expected


async def test_rate_limits_are_read_from_answers() -> None:
    headers = (
        b"x-ratelimit-remaining-requests: 9\r\nx-ratelimit-reset-requests: 120ms\r\n"
        b"x-ratelimit-remaining-tokens: 0\r\nx-ratelimit-reset-tokens: 6m0s\r\n"
    )
    async with serving(b"HTTP/1.1 200 OK\r\n" + headers + b"Content-Length: 2\r\n\r\n{}") as server:
        answer = await ask(server.url)
    assert isinstance(answer, Answer)
    assert answer.rate_limit == RateLimit(9, 0, 0.12, 360.0)


async def test_a_server_that_tells_no_limits_is_soon_no_longer_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def spy(*headers: str | None) -> RateLimit | None:
        nonlocal asked
        asked += 1
        return rate_limit(*headers)

    monkeypatch.setattr(http, "rate_limit", spy)
    async with running_simulator(Behaviour()) as simulator:
        upstream = HttpUpstream(simulator.url)
        for _ in range(http.ASKED + 5):
            await upstream.send(CHAT, b'{"model": "m", "messages": []}')
        await upstream.close()
    assert asked == http.ASKED
