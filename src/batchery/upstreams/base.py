"""What the engine asks of an inference server, whatever it is behind.

`send` gives back a value for everything that can happen to a request: an answer with any status, or a fault when there
was no whole answer. It raises for nothing that an upstream does.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import msgspec

from batchery.wire.objects import Model


class RateLimit(msgspec.Struct, frozen=True):
    """What a server says of the sender's quota there, in `x-ratelimit-...` headers as OpenAI has them.

    Attributes:
        requests_left, tokens_left: what may still be sent; None where it does not say.
        requests_reset, tokens_reset: seconds until there is as much as at first.
    """

    requests_left: int | None = None
    tokens_left: int | None = None
    requests_reset: float | None = None
    tokens_reset: float | None = None


class Answer(msgspec.Struct, frozen=True):
    """An HTTP answer, whole.

    Attributes:
        status: the HTTP status.
        body: its bytes.
        request_id: the server's own id for it, where it sent one.
        retry_after: seconds that the server asked to wait, from `Retry-After` or `retry-after-ms`.
        rate_limit: what it says of the sender's quota; None where it says nothing.
    """

    status: int
    body: bytes
    request_id: str | None = None
    retry_after: float | None = None
    rate_limit: RateLimit | None = None


FaultKind = Literal["unreachable", "timeout", "broken"]


class Fault(msgspec.Struct, frozen=True):
    """There was no whole answer.

    Attributes:
        kind: `unreachable`: no connection was made, so nothing was sent; `timeout`: the server took too long;
            `broken`: the connection ended before the answer did.
        message: for people.
    """

    kind: FaultKind
    message: str


class Load(msgspec.Struct, frozen=True):
    """How busy an inference server says that it is, with everybody's requests.

    Attributes:
        waiting: requests in its queue; all its models and replicas together.
        running: requests that it works on, likewise; None where it does not say.
        cache: the used share of its key-value cache, 0 to 1; of the fullest. None where it does not say.
    """

    waiting: int
    running: int | None = None
    cache: float | None = None


@runtime_checkable
class TellsLoad(Protocol):
    """An inference server that may tell how busy it is."""

    async def load(self) -> Load | None:
        """How busy it is now; None where it does not say."""


class Upstream(Protocol):
    """An inference server."""

    async def send(self, url: str, body: bytes | memoryview) -> Answer | Fault:
        """Run one request.

        Args:
            url: the line's own, such as `/v1/chat/completions`.
            body: its body, as it is in the file.
        """

    async def models(self) -> list[Model] | None:
        """The models that it serves; empty when it does not say, None when it is not there."""

    async def close(self) -> None:
        """Close its connections."""
