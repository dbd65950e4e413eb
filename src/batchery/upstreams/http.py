"""An inference server over HTTP: anything that speaks OpenAI's API (vLLM, SGLang, Ollama, llama.cpp, a hosted one).

Redirects are not followed, so that a key never travels to another host, and proxies are used only where the
environment names one for the upstream's host, as for any HTTP client.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import time
from datetime import UTC, timedelta
from urllib.parse import urlsplit

import msgspec
from pyreqwest.client import ClientBuilder
from pyreqwest.exceptions import PyreqwestError, RequestTimeoutError
from pyreqwest.http import Url
from pyreqwest.response import Response

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
        Url(text)  # the client's own reading, which refuses ports and names that `urlsplit` passes
    except ValueError:
        raise InvalidUpstreamError(_NO_URL.format("the text given" if "@" in text else repr(text))) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidUpstreamError(_NO_URL.format("the text given" if "@" in text else repr(text)))
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InvalidUpstreamError(
            f"the upstream URL {parts.scheme}://{parts.hostname}... must not carry a user name, a query or a fragment; "
            "name the key's environment variable with --upstream-key-env"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


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
        self._client = (
            ClientBuilder()
            .default_headers(headers)
            .user_agent("batchery")
            .follow_redirects(False)
            .referer(False)
            .connect_timeout(timedelta(seconds=CONNECT_TIMEOUT))
            .timeout(timedelta(seconds=timeout))
            .pool_idle_timeout(timedelta(seconds=20))
            .build()
        )
        self._timeout = timeout
        self._targets: dict[str, str] = {}

    async def send(self, url: str, body: bytes | memoryview) -> Answer | Fault:
        target = self._targets.get(url)
        if target is None:
            target = self._targets[url] = self.url + url
        try:
            response = await self._client.post(target).body_bytes(body).build().send()
            data = bytes(await response.bytes())
        except PyreqwestError as error:
            # The client's `ConnectError` and `ConnectTimeoutError` also stand for what happens between the connection
            # and the answer's head; only the causes tell the two apart.
            causes = _causes(error)
            if CONNECTING in causes:
                return Fault("unreachable", f"No connection to the upstream: {causes[-1]}.")
            if isinstance(error, RequestTimeoutError):
                return Fault("timeout", f"The upstream did not answer within {self._timeout:g} s.")
            return Fault("broken", f"The upstream's answer broke off: {causes[-1]}.")
        status = response.status
        wait = None
        if status >= 400:
            wait = retry_after(_header(response, "retry-after"), _header(response, "retry-after-ms"), time.time())
        return Answer(status, data, _header(response, "x-request-id"), wait)

    async def models(self) -> list[Model]:
        try:
            async with asyncio.timeout(MODELS_TIMEOUT):
                response = await self._client.get(self.url + "/v1/models").build().send()
                if response.status != 200:
                    return []
                found = _decode_models(bytes(await response.bytes()))
        except (PyreqwestError, msgspec.MsgspecError, TimeoutError):
            return []
        return [Model(id=model.id, created=model.created, owned_by=model.owned_by) for model in found.data]

    async def close(self) -> None:
        await self._client.close()


CONNECTING = "client error (Connect)"


def _causes(error: PyreqwestError) -> list[str]:
    """The causes that the client lists, `connection refused` after `error sending request`; never none."""
    details = getattr(error, "details", None)
    causes = details.get("causes") if isinstance(details, dict) else None
    return [str(cause.get("message", error)).strip().rstrip(".") for cause in causes or [{}]]


def _header(response: Response, name: str) -> str | None:
    """A header's value; None where there is none, or none that is text."""
    try:
        return response.get_header(name)
    except ValueError:  # the client's complaint about bytes beyond ASCII
        return None
