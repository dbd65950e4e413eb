"""What known batch servers accept, for checking and splitting files before anything is sent to them.

Sources: Doubleword and OpenAI document 200 MB, 50 000 requests and one model for each file; OpenAI also that each
request's url is the batch's endpoint. The line limit is Doubleword's and batchery's own; OpenAI states none.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import msgspec

from batchery.client.errors import SettingsError
from batchery.wire.lines import MAX_FILE_BYTES, MAX_LINE_BYTES, MAX_REQUESTS, Limits


class ServerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one file may be on a server.

    Attributes:
        name: of the server.
        file_bytes: the whole file.
        line_bytes: one line without its line break.
        requests: in one file.
        one_model: a file may name only one model.
        one_url: all requests of a file must have the same url.
    """

    name: str = "batchery"
    file_bytes: int = MAX_FILE_BYTES
    line_bytes: int = MAX_LINE_BYTES
    requests: int = MAX_REQUESTS
    one_model: bool = False
    one_url: bool = False

    @property
    def of_a_file(self) -> Limits:
        """The limits in the terms of the wire."""
        return Limits(file_bytes=self.file_bytes, line_bytes=self.line_bytes, requests=self.requests)


SERVERS = {
    "batchery": ServerLimits(),
    "doubleword": ServerLimits(name="doubleword"),
    "openai": ServerLimits(name="openai", one_model=True, one_url=True),
}
"""By name."""

_HOSTS = {"api.openai.com": "openai", "api.doubleword.ai": "doubleword"}


def limits_named(name: str) -> ServerLimits:
    """The limits of a server by its name.

    Raises:
        SettingsError: it is none of `SERVERS`.
    """
    try:
        return SERVERS[name]
    except KeyError:
        raise SettingsError(f"--server is one of {', '.join(SERVERS)}, not {name!r}") from None


def server_name_of(base_url: str) -> str:
    """The name of the server at an address; `batchery` for one that is not known."""
    return _HOSTS.get(urlsplit(base_url).hostname or "", "batchery")
