"""HTTP to a batch server with the standard library alone: the key, retries, errors, uploads from disk, open downloads.

It must never print the key, send it to a server that it was not given for, or follow a redirect.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import http.client
import json
import os
import random
import ssl
import sys
import time
import urllib.parse
import urllib.request
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, NamedTuple, Optional, Tuple, Union

from exits import CONNECTION_LOST, INVALID_INPUT, NOT_ALLOWED, USAGE, StopError

DEFAULT_URL = "https://api.doubleword.ai/v1"
KEY_VARIABLE = "DOUBLEWORD_API_KEY"
URL_VARIABLE = "DOUBLEWORD_BASE_URL"
TIMEOUT = 90.0
LONGEST_PAUSE = 20.0
BLOCK = 256 * 1024
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Headers = Mapping[str, str]


class Server(NamedTuple):
    """A server and the key that is meant for it.

    Attributes:
        base_url: with its version at the end, and no slash.
        key: None for none.
        patience: seconds in which a call is tried again.
    """

    base_url: str
    key: Optional[str]
    patience: float

    def __repr__(self) -> str:
        """Without the key."""
        return "Server(%r)" % self.base_url


class HttpError(StopError):
    """The server refused. `status` is the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        code = (
            NOT_ALLOWED
            if status in (401, 402, 403, 429)
            else CONNECTION_LOST
            if status >= 500 or status == 408
            else USAGE
        )
        super().__init__(message, INVALID_INPUT if status == 413 else code)
        self.status = status


class LostError(StopError):
    """No answer, or only part of one. The call may or may not have been carried out."""

    def __init__(self, message: str) -> None:
        super().__init__(message, CONNECTION_LOST)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which server, with which key."""
    group = parser.add_argument_group("server")
    group.add_argument("--base-url", metavar="URL", help="default: $%s, else %s" % (URL_VARIABLE, DEFAULT_URL))
    group.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="the environment variable with the key; default: %s, for the server that --base-url or %s names"
        % (KEY_VARIABLE, URL_VARIABLE),
    )
    group.add_argument(
        "--patience", type=float, default=120.0, metavar="SECONDS", help="retry a call for so long (120)"
    )


def server_from(options: argparse.Namespace, remembered: Optional[str] = None) -> Server:
    """The server that the options and the environment name.

    Args:
        options: parsed.
        remembered: the base URL that earlier work used, for where no option names one.

    Raises:
        StopError: a URL or a key is wrong.
    """
    home = normalise(os.environ.get(URL_VARIABLE) or DEFAULT_URL)
    url = normalise(options.base_url) if options.base_url else remembered or home
    # A remembered address may have come with somebody else's folder: alone it does not get the key.
    meant = options.base_url or _origin(url) == _origin(home)
    name = options.api_key_env or (KEY_VARIABLE if meant else None)
    key = (os.environ.get(name) or "").strip() if name else ""
    if options.api_key_env and not key:
        raise StopError("--api-key-env names %s, but that environment variable is not set" % name)
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise StopError("the key in %s has characters that no key has; was it copied whole?" % name)
    host = urllib.parse.urlsplit(url).hostname
    if not key and url == DEFAULT_URL:
        raise StopError("no API key: set %s (keys are made at https://app.doubleword.ai)" % KEY_VARIABLE, NOT_ALLOWED)
    if not key and not name and os.environ.get(KEY_VARIABLE):
        print("note: %s is not sent to %s unless --base-url says so" % (KEY_VARIABLE, url), file=sys.stderr)
    if key and url.startswith("http:") and host not in LOOPBACK:
        print("note: the key goes to %s without encryption" % url, file=sys.stderr)
    return Server(url, key or None, options.patience)


def normalise(url: str) -> str:
    """A base URL as people write it, with `/v1` at its end.

    Raises:
        StopError: it is not the URL of a server.
    """
    try:
        parts = urllib.parse.urlsplit(url.strip())
        port = parts.port
    except ValueError as error:
        raise StopError("the base URL %r is not a URL: %s" % (url, error)) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise StopError("the base URL %r must look like https://api.example.com/v1" % url)
    if parts.username or parts.password:
        raise StopError("the base URL has a user name in it; give the key through an environment variable")
    path = parts.path.rstrip("/")
    last = path.rsplit("/", 1)[-1]
    if not (last.startswith("v") and last[1:].isdigit()):
        path += "/v1"
    host = "[%s]" % parts.hostname if ":" in parts.hostname else parts.hostname
    return "%s://%s%s%s" % (parts.scheme, host, "" if port is None else ":%d" % port, path)


def is_local(server: Server) -> bool:
    """Whether it runs on this machine."""
    return urllib.parse.urlsplit(server.base_url).hostname in LOOPBACK


class FileBody:
    """A multipart upload of a file from disk, a block at a time. It can be sent again.

    Args:
        path: the file.
        filename: as the server shall know it.
        size, sha256: that the file had when it was checked; another content is never sent whole.
        on_progress: told the bytes sent.
    """

    def __init__(
        self, path: Path, filename: str, size: int, sha256: str, on_progress: Callable[[int], None] = lambda _: None
    ) -> None:
        boundary = "batch-%s" % sha256[:32]
        quoted = filename.replace("\\", "_").replace('"', "_").replace("\r", "_").replace("\n", "_")
        self._head = (
            '--%s\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            '--%s\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n'
            "Content-Type: application/jsonl\r\n\r\n" % (boundary, boundary, quoted)
        ).encode()
        self._tail = ("\r\n--%s--\r\n" % boundary).encode()
        self._path, self._size, self._sha256, self._on_progress = path, size, sha256, on_progress
        self.content_type = "multipart/form-data; boundary=%s" % boundary
        self.length = len(self._head) + size + len(self._tail)

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        digest, sent = hashlib.sha256(), 0
        with self._path.open("rb") as file:
            while sent < self._size:
                block = file.read(min(BLOCK, self._size - sent))
                if not block:
                    break
                digest.update(block)
                sent += len(block)
                if sent == self._size and digest.hexdigest() != self._sha256:
                    break
                yield block
                self._on_progress(sent)
        if sent != self._size or digest.hexdigest() != self._sha256:
            raise StopError("%s was changed during the upload, which was given up" % self._path, INVALID_INPUT)
        yield self._tail


Body = Union[None, bytes, FileBody]


def call(
    server: Server,
    method: str,
    path: str,
    body: Body = None,
    headers: Optional[Dict[str, str]] = None,
    before_retry: Callable[[], Any] = lambda: None,
) -> Tuple[Any, Headers]:
    """A call whose answer is JSON, tried again while there is hope.

    Args:
        path: below the base URL.
        before_retry: called when a try may have been carried out unseen; if it returns something, that is the answer.

    Returns:
        The answer, and the headers in lower case.

    Raises:
        HttpError: refused. LostError: no answer within the server's patience.
    """
    began, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            with _opened(server, method, path, body, headers or {}) as (response, names):
                content = response.read()
                if response.length:
                    raise LostError("the answer of %s broke off" % server.base_url)
                try:
                    value = json.loads(content) if content.strip() else None
                except ValueError:
                    raise LostError(
                        "%s answered %s %s with something else than JSON" % (server.base_url, method, path)
                    ) from None
                return value, names
        except (HttpError, LostError) as error:
            pause = pause_for(error, tries)
            if pause is None or time.monotonic() - began + pause > server.patience:
                raise
            wait_to_retry(error, pause)
            if isinstance(error, LostError) or error.status >= 500:
                found = before_retry()
                if found is not None:
                    return found, {}


@contextlib.contextmanager
def opened(server: Server, path: str) -> Iterator[Tuple[http.client.HTTPResponse, Headers]]:
    """An answer to GET whose body is still to be read. It is tried once.

    Raises:
        HttpError: refused. LostError: no answer, also while the body is read.
    """
    with _opened(server, "GET", path, None, {}) as found:
        yield found


def wait_to_retry(error: StopError, pause: float) -> None:
    """Say what went wrong, and sleep for `pause` seconds."""
    print("%s; trying again in %.1f s" % (error, pause), file=sys.stderr)
    time.sleep(pause)


def pause_for(error: StopError, tries: int) -> Optional[float]:
    """Seconds before another try: doubling, with jitter, and never less than the server asks for; None for no more."""
    pause = min(LONGEST_PAUSE, 0.5 * 2.0 ** min(tries - 1, 10)) * random.uniform(0.75, 1)
    if isinstance(error, HttpError):
        advice = getattr(error, "should_retry", None)
        if advice == "false" or (error.status < 500 and error.status not in (408, 429) and advice != "true"):
            return None
        asked = getattr(error, "retry_after", None)
        return pause if asked is None else max(pause, asked)
    return pause if isinstance(error, LostError) else None


def blocks_of(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """A body, a block at a time.

    Raises:
        LostError: it ended before its announced length.
    """
    while True:
        block = response.read1(BLOCK)
        if not block:
            if response.length:
                raise LostError("the download broke off")
            return
        yield block


@contextlib.contextmanager
def _opened(
    server: Server, method: str, path: str, body: Body, headers: Dict[str, str]
) -> Iterator[Tuple[http.client.HTTPResponse, Headers]]:
    sent = {"Accept": "*/*", "User-Agent": "doubleword-batches-skill/1.0"}
    sent.update(headers)
    if server.key:
        sent["Authorization"] = "Bearer " + server.key
    if isinstance(body, FileBody):
        sent["Content-Type"], sent["Content-Length"] = body.content_type, str(body.length)
    elif body is not None:
        sent["Content-Type"], sent["Content-Length"] = "application/json", str(len(body))
    elif method == "POST":
        sent["Content-Length"] = "0"
    connection, target = _connect(server.base_url + path, sent)
    try:
        try:
            connection.request(method, target, body=body, headers=sent)
        except (BrokenPipeError, ConnectionResetError):
            # A server that refuses an upload early answers and closes; what it said is worth reading.
            if not isinstance(body, FileBody):
                raise
        response = connection.getresponse()
        names = {name.lower(): value for name, value in response.getheaders()}
        if response.status >= 300:
            raise _refusal(server, method, path, response.status, names, response.read(65536))
        yield response, names
    except (ssl.SSLError, OSError, http.client.HTTPException) as error:
        if isinstance(error, ssl.SSLCertVerificationError):
            raise StopError("%s cannot prove who it is: %s" % (server.base_url, error)) from None
        told = str(error) or type(error).__name__
        raise LostError("no connection to %s: %s" % (server.base_url, told)) from None
    finally:
        connection.close()


def _connect(url: str, headers: Dict[str, str]) -> Tuple[http.client.HTTPConnection, str]:
    """A connection and what to ask it for, by way of the system's proxy where there is one."""
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "", parts.port
    target = parts.path + ("?" + parts.query if parts.query else "")
    proxy = urllib.request.getproxies().get(parts.scheme)
    if host in LOOPBACK or urllib.request.proxy_bypass(host):
        proxy = None
    if proxy is None:
        if parts.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=TIMEOUT), target
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT), target
    way = urllib.parse.urlsplit(proxy if "://" in proxy else "http://" + proxy)
    if not way.hostname:
        raise StopError("the proxy %r in the environment is not a URL" % proxy)
    to_proxy = {}
    if way.username:
        pair = "%s:%s" % (urllib.parse.unquote(way.username), urllib.parse.unquote(way.password or ""))
        to_proxy["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    if parts.scheme == "https":
        tunnel = http.client.HTTPSConnection(way.hostname, way.port or 3128, timeout=TIMEOUT)
        tunnel.set_tunnel(host, port or 443, to_proxy)
        return tunnel, target
    headers.update(to_proxy, Host=parts.netloc)
    return http.client.HTTPConnection(way.hostname, way.port or 3128, timeout=TIMEOUT), url


def _refusal(server: Server, method: str, path: str, status: int, headers: Headers, body: bytes) -> HttpError:
    told = _message_in(body)
    if status < 400:
        told = "it redirects, which is not followed; use the address that it means as --base-url"
    elif status == 401:
        told += " (is it the right key? see --api-key-env)" if server.key else " (no key was sent; see --api-key-env)"
    error = HttpError(
        "%s answered %s %s with %d: %s" % (server.base_url, method, path.split("?", maxsplit=1)[0], status, told),
        status,
    )
    if server.key and server.key in str(error):
        error.args = (str(error).replace(server.key, "[key]"),)
    error.retry_after = retry_after(headers.get("retry-after"))  # type: ignore[attr-defined]
    error.should_retry = headers.get("x-should-retry")  # type: ignore[attr-defined]
    return error


def _message_in(body: bytes) -> str:
    """What an error says, whether it is JSON in one of the usual shapes or plain text."""
    text = body.decode("utf-8", "replace").strip()
    try:
        value = json.loads(text)
    except ValueError:
        return text[:500] or "no explanation"
    found = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(found, dict):
        found = found.get("message") or found
    elif isinstance(value, dict) and value.get("message"):
        found = value["message"]
    return found[:2000] if isinstance(found, str) else json.dumps(found)[:500]


def retry_after(text: Optional[str]) -> Optional[float]:
    """`Retry-After` in seconds: it holds seconds or a date (RFC 9110, 10.2.3)."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if seconds < 1e9 else None


def _origin(url: str) -> Tuple[str, str, int]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
