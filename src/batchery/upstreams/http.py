"""An inference server over HTTP: anything that speaks OpenAI's API (vLLM, SGLang, Ollama, llama.cpp, a hosted one).

Redirects are not followed, so that a key never travels to another host, and proxies are used only where the
environment names one for the upstream's host, as for any HTTP client; for this machine's loopback never.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
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

from batchery.upstreams.base import Answer, Fault, Load, RateLimit
from batchery.upstreams.engine_metrics import read_load
from batchery.wire.objects import Model

CONNECT_TIMEOUT = 10.0
MODELS_TIMEOUT = 5.0

NOT_THERE = frozenset((502, 503, 504))
"""Statuses by which a proxy, or a server that loads its model, says that it cannot yet say what it serves."""

METRICS_TIMEOUT = 2.0
MAX_METRICS_BYTES = 8 * 1024 * 1024
"""Of an engine's metrics."""

ASKED = 16
"""Answers that are looked through for a server's rate limits, before it is taken to have none to tell."""


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


def metrics_url(setting: str, base: str) -> str | None:
    """Where an upstream's own metrics are.

    Args:
        setting: `auto`, `off`, or an http(s) URL.
        base: the upstream's, as `base_url` gives it.

    Returns:
        None for nowhere. Engines have them at `/metrics`, beside `/v1`.

    Raises:
        InvalidUpstreamError: it is none of these.
    """
    text = setting.strip()
    if text == "off":
        return None
    if text == "auto":
        return f"{base}/metrics"
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not _AUTHORITY.fullmatch(parts.netloc) or "@" in parts.netloc:
        shown = "the text given" if "@" in text else repr(text)
        raise InvalidUpstreamError(
            f"{shown} does not say where the upstream's metrics are; write auto, off, or a URL without a user name, "
            "such as http://127.0.0.1:8000/metrics"
        )
    return text


def is_loopback(url: str) -> bool:
    """Whether a URL is on this machine's loopback, of which a proxy named in the environment knows nothing."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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


def rate_limit(
    requests_left: str | None, tokens_left: str | None, requests_reset: str | None, tokens_reset: str | None
) -> RateLimit | None:
    """What a server says of the sender's quota (https://platform.openai.com/docs/guides/rate-limits#headers).

    Args:
        requests_left, tokens_left: the headers `x-ratelimit-remaining-...`: whole numbers.
        requests_reset, tokens_reset: the headers `x-ratelimit-reset-...`: seconds, or such as `6m0s`, `1.5s`, `20ms`.

    Returns:
        None when no header says how much is left.
    """
    requests, tokens = _whole(requests_left), _whole(tokens_left)
    if requests is None and tokens is None:
        return None
    return RateLimit(requests, tokens, _span(requests_reset), _span(tokens_reset))


def _whole(text: str | None) -> int | None:
    if text is None or not re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]*)?", text := text.strip()):
        return None
    return max(0, int(float(text)))


def _span(text: str | None) -> float | None:
    if text is None or not _SPAN.fullmatch(text := text.strip()):
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in _PIECE.findall(text))


_SPAN = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{1,9})?(?:ms|[smhd]))+|[0-9]{1,9}(?:\.[0-9]{1,9})?", re.ASCII)
_PIECE = re.compile(r"([0-9.]+)(ms|[smhd]|)", re.ASCII)
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}


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
        metrics: where its own metrics are: `auto` (at `/metrics`), `off`, or a URL.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 600.0, metrics: str = "auto") -> None:
        self.url = base_url(url)
        self._metrics_url = metrics_url(metrics, self.url)
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
            no_proxy=is_loopback(self.url),
        )
        self._keyless: Client | None = None
        self._timeout = timeout
        self._asked = 0
        self._tells_limits = False
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
        # Few servers say how much may still be sent, and asking for headers takes time; one that does is known by its
        # first answers, or by those that refuse.
        limit = None
        if self._tells_limits or self._asked < ASKED or status == 429:
            self._asked += 1
            limit = rate_limit(
                _header(headers, "x-ratelimit-remaining-requests"),
                _header(headers, "x-ratelimit-remaining-tokens"),
                _header(headers, "x-ratelimit-reset-requests"),
                _header(headers, "x-ratelimit-reset-tokens"),
            )
            self._tells_limits = self._tells_limits or limit is not None
        return Answer(status, data, _header(headers, "x-request-id"), wait, limit)

    async def models(self) -> list[Model] | None:
        try:
            async with asyncio.timeout(MODELS_TIMEOUT):
                response = await self._client.get(self.url + "/v1/models")
                status = response.status.as_int()
                if status != 200:
                    return None if status in NOT_THERE else []
                found = _decode_models(await response.bytes())
        except (msgspec.MsgspecError, RecursionError, TimeoutError):
            return []
        except FAILURES as error:
            return None if _fault(error, MODELS_TIMEOUT).kind == "unreachable" else []
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            return []
        return [Model(id=model.id, created=model.created, owned_by=model.owned_by) for model in found.data]

    async def load(self) -> Load | None:
        if self._metrics_url is None:
            return None
        # The key is for the upstream alone.
        client = self._client if _origin(self._metrics_url) == _origin(self.url) else self._stranger()
        try:
            async with asyncio.timeout(METRICS_TIMEOUT):
                response = await client.get(self._metrics_url, headers={"Accept": "text/plain"})
                if response.status.as_int() != 200:
                    return None
                data = bytes(await response.bytes())
        except (*FAILURES, TimeoutError):
            return None
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            return None
        return read_load(data.decode(errors="replace")) if len(data) <= MAX_METRICS_BYTES else None

    def _stranger(self) -> Client:
        """A client that takes no key along."""
        if self._keyless is None:
            self._keyless = Client(
                runtime=Runtime(workers=1),
                user_agent="batchery",
                redirect=Policy.none(),
                referer=False,
                http1_only=True,
                timeout=timedelta(seconds=METRICS_TIMEOUT),
                dns_options=DnsOptions(system_dns=True),
                tls_verify=_authorities(),
                no_proxy=is_loopback(self._metrics_url or ""),
            )
        return self._keyless

    async def close(self) -> None:
        self._client.close()
        if self._keyless is not None:
            self._keyless.close()


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


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


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
