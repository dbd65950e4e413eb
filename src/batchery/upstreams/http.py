"""An inference server over HTTP: anything that speaks OpenAI's API (vLLM, SGLang, Ollama, llama.cpp, a hosted one).

Redirects are not followed, so that a key never travels to another host, and proxies are used only where the
environment names one for the upstream's host, as for any HTTP client.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import re
import ssl
import time
from datetime import UTC, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from wreq import Client, exceptions
from wreq.dns import DnsOptions
from wreq.header import HeaderMap
from wreq.redirect import Policy
from wreq.runtime import Runtime
from wreq.tls import CertStore

from batchery.upstreams.base import Answer, Fault
from batchery.wire.objects import Model

CONNECT_TIMEOUT = 10.0
MODELS_TIMEOUT = 5.0


class InvalidUpstreamError(ValueError):
    """The address of an upstream is not one."""


def base_url(text: str) -> str:
    """An upstream's address without a `/v1` at its end, from what an OpenAI client takes as base URL.

    Raises:
        InvalidUpstreamError: it is not an http(s) URL, or carries a user name, a query or a fragment.
    """
    text = text.strip()
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018  # reading it is what refuses a port that is none
    except ValueError:
        raise InvalidUpstreamError(_NO_URL.format("the text given" if "@" in text else repr(text))) from None
    if parts.scheme not in ("http", "https") or not _AUTHORITY.fullmatch(parts.netloc):
        raise InvalidUpstreamError(_NO_URL.format("the text given" if "@" in text else repr(text)))
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InvalidUpstreamError(
            f"the upstream URL {parts.scheme}://{parts.hostname}... must not carry a user name, a query or a fragment; "
            "name the key's environment variable with --upstream-key-env"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


_AUTHORITY = re.compile(r"(?:.*@)?(?:\[[0-9A-Fa-f:.]+\]|[^\x00-\x20\x7f#%/:<>?@\[\\\]^`{|}]+)(?::[0-9]*)?")
"""A user, a host and a port, without what no host may contain
(https://url.spec.whatwg.org/#forbidden-domain-code-point), which `urlsplit` lets pass."""

_NO_URL = "{} is not an upstream URL; write one such as http://127.0.0.1:8000/v1"


def retry_after(value: str | None, milliseconds: str | None, now: float) -> float | None:
    """The seconds that a server asks to wait.

    Args:
        value: the header `Retry-After`: seconds or an HTTP date (RFC 9110, 10.2.3).
        milliseconds: the header `retry-after-ms`, which some hosted servers add and which is then more exact.
        now: Unix seconds, for a date.

    Returns:
        A number from 0 to 86 400; None when neither header says anything sensible.
    """
    for text, scale in ((milliseconds, 0.001), (value, 1.0)):
        if text is None:
            continue
        try:
            seconds = float(text) * scale
        except ValueError:
            try:
                date = email.utils.parsedate_to_datetime(text)
                # A date without a zone is in GMT (RFC 9110, 5.6.7).
                seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now
            except (ValueError, TypeError, OverflowError):
                continue
        if not math.isnan(seconds):
            return min(max(seconds, 0.0), 86_400.0)
    return None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Model(msgspec.Struct):
    id: str
    created: int = 0
    owned_by: str = "upstream"


_decode_models = msgspec.json.Decoder(_Models).decode


class HttpUpstream:
    """One server.

    Args:
        url: its base URL; a `/v1` at the end is optional.
        key: sent as a bearer token; None for none.
        timeout: seconds that one request may take from its start to the end of its answer.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 600.0) -> None:
        self.url = base_url(url)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        self._client = Client(
            runtime=Runtime(workers=1),  # a thread for each CPU, the default, takes far more time for each request
            headers=headers,
            user_agent="batchery",
            redirect=Policy.none(),
            referer=False,
            http1_only=True,
            connect_timeout=timedelta(seconds=CONNECT_TIMEOUT),
            timeout=timedelta(seconds=timeout),
            pool_idle_timeout=timedelta(seconds=20),
            dns_options=DnsOptions(system_dns=True),  # the client's own resolver would not ask the system
            tls_verify=_authorities(),
        )
        self._timeout = timeout
        self._targets: dict[str, str] = {}

    async def send(self, url: str, body: bytes | memoryview) -> Answer | Fault:
        target = self._targets.get(url)
        if target is None:
            target = self._targets[url] = self.url + url
        try:
            # Anything but `bytes` would be sent as JSON.
            response = await self._client.post(target, body=body if isinstance(body, bytes) else bytes(body))
            data = bytes(await response.bytes())
        except FAILURES as error:
            return _fault(error, self._timeout)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            return Fault("broken", "The client of the upstream was closed.")
        status = response.status.as_int()
        headers = response.headers
        wait = None
        if status >= 400:
            wait = retry_after(_header(headers, "retry-after"), _header(headers, "retry-after-ms"), time.time())
        return Answer(status, data, _header(headers, "x-request-id"), wait)

    async def models(self) -> list[Model]:
        try:
            async with asyncio.timeout(MODELS_TIMEOUT):
                response = await self._client.get(self.url + "/v1/models")
                if response.status.as_int() != 200:
                    return []
                found = _decode_models(await response.bytes())
        except (*FAILURES, msgspec.MsgspecError, TimeoutError):
            return []
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            return []
        return [Model(id=model.id, created=model.created, owned_by=model.owned_by) for model in found.data]

    async def close(self) -> None:
        self._client.close()


FAILURES = (
    exceptions.BodyError,
    exceptions.BuilderError,
    exceptions.ConnectionError,
    exceptions.ConnectionResetError,
    exceptions.DecodingError,
    exceptions.ProxyConnectionError,
    exceptions.RequestError,
    exceptions.TimeoutError,
    exceptions.TlsError,
)
"""What the client raises for one request; these classes have no base of their own."""


def _authorities() -> CertStore | bool:
    """The certificate authorities that this system trusts, a company's own among them.

    The client alone trusts those that came with it, which are used where the system has none.
    """
    paths = ssl.get_default_verify_paths()
    if paths.cafile is None and paths.capath is None:
        return True
    bundle = "" if paths.cafile is None else Path(paths.cafile).read_text("ascii", "ignore")
    return CertStore(pem_certs=_CERTIFICATES.findall(bundle), default_paths=True)


_CERTIFICATES = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


def _fault(error: Exception, timeout: float) -> Fault:
    """What became of a request, from the client's error.

    Its class does not tell whether a connection was made (a reset within a TLS handshake and one within an answer are
    of the same), nor always a timeout (one within a body is a `BodyError`). Its text does: it is the tree of causes.
    """
    source = str(error).partition("source: ")[2].partition(", connect_info: ")[0]
    if isinstance(error, exceptions.BuilderError) or _CONNECTING.search(source):
        return Fault("unreachable", f"No connection to the upstream: {_reason(source)}.")
    if isinstance(error, exceptions.TimeoutError) or source.startswith("TimedOut"):
        return Fault("timeout", f"The upstream did not answer within {timeout:g} s.")
    return Fault("broken", f"The upstream's answer broke off: {_reason(source)}.")


def _reason(source: str) -> str:
    """The innermost cause in words: the system's where there are some, else from names such as `IncompleteBody`."""
    if texts := _TEXTS.findall(source):
        return str(texts[-1]).strip().rstrip(".")
    names = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower() for name in _NAMES.findall(source)]
    return ": ".join(names) or "no reason given"


_TEXTS = re.compile(r'(?:message|error|reason): "([^"]*)"')
_NAMES = re.compile(r"\b(?!(?:Connect|Custom|Error|Kind|None|SendRequest|Some)\b)[A-Z]\w+")
_CONNECTING = re.compile(r"kind: (?:Proxy)?Connect, ")


def _is_cancelled() -> bool:
    """Whether someone cancelled this task: a closed client raises the same error where nobody did."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _header(headers: HeaderMap, name: str) -> str | None:
    """A header's value; None where there is none, or none that is ASCII text."""
    value = headers.get(name)
    try:
        return None if value is None else str(value, "ascii")
    except UnicodeDecodeError:
        return None
