"""What the engine asks of an inference server, whatever it is behind.

`send` gives back a value for everything that can happen to a request: an answer with any status, or a fault when there
was no whole answer. It raises for nothing that an upstream does.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from batchery.wire.objects import Model


class Answer(msgspec.Struct, frozen=True):
    """An HTTP answer, whole.

    Attributes:
        status: the HTTP status.
        body: its bytes.
        request_id: the server's own id for it, where it sent one.
        retry_after: seconds that the server asked to wait, from `Retry-After` or `retry-after-ms`.
    """

    status: int
    body: bytes
    request_id: str | None = None
    retry_after: float | None = None


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


class Upstream(Protocol):
    """An inference server."""

    async def send(self, url: str, body: bytes | memoryview) -> Answer | Fault:
        """Run one request.

        Args:
            url: the line's own, such as `/v1/chat/completions`.
            body: its body, as it is in the file.
        """

    async def models(self) -> list[Model]:
        """The models that it serves; empty when it does not say."""

    async def close(self) -> None:
        """Close its connections."""
