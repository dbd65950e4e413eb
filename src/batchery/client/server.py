"""Which server to talk to, and with which key.

A key belongs to one server (its origin: scheme, host and port) and this module never gives it to another: a key found
in the environment goes only to the server that its own variable stands for, unless the user names the variable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

import msgspec

from batchery.client.errors import SettingsError

DOUBLEWORD = "https://api.doubleword.ai/v1"
OPENAI = "https://api.openai.com/v1"

_VERSION_AT_END = re.compile(r"/v[0-9]+\Z", re.ASCII)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Server(msgspec.Struct, frozen=True):
    """A server and the key for it.

    Attributes:
        base_url: ends with its version, such as `/v1`, and no slash.
        api_key: sent as bearer token; None for an open server.
        key_from: the environment variable that the key came from, for messages.
    """

    base_url: str
    api_key: str | None = None
    key_from: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine's loopback address."""
        return urlsplit(self.base_url).hostname in _LOOPBACK

    def __repr__(self) -> str:
        """Without the key, so that no log or traceback ever shows it."""
        return f"Server({self.base_url!r}, key from {self.key_from})"


def normalise_base_url(url: str) -> str:
    """A base URL as people write it, with its version at the end: `https://host` becomes `https://host/v1`.

    Raises:
        SettingsError: it is not an http or https URL with a host, or has a user, a query or a fragment.
    """
    text = url.strip()
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise SettingsError(f"the base URL {url!r} is not a URL: {error}") from None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise SettingsError(f"the base URL {url!r} needs a scheme and a host, such as https://api.example.com/v1")
    if parts.username or parts.password:
        raise SettingsError("the base URL has a user name in it; give the key through an environment variable instead")
    if parts.query or parts.fragment:
        raise SettingsError(f"the base URL {url!r} may not have a query or a fragment")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/")
    if not _VERSION_AT_END.search(path):
        path += "/v1"
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{path}"


def origin(url: str) -> tuple[str, str, int]:
    """What a key is bound to: scheme, host in lower case, and port."""
    parts = urlsplit(normalise_base_url(url))
    return parts.scheme, parts.hostname or "", parts.port or _DEFAULT_PORTS[parts.scheme]


def resolve_server(base_url: str | None, api_key_env: str | None, environ: Mapping[str, str]) -> Server:
    """The server and its key: options first, then `BATCHERY_BASE_URL` with `BATCHERY_API_KEY`, then
    `DOUBLEWORD_API_KEY`, then `OPENAI_BASE_URL` with `OPENAI_API_KEY`.

    Args:
        base_url: as given by option; with or without `/v1`.
        api_key_env: the name of the variable that holds the key, where the user names one.
        environ: the process's environment.

    Raises:
        SettingsError: no server is named anywhere, a URL is wrong, or the named variable is empty.
    """
    url = base_url or environ.get("BATCHERY_BASE_URL")
    if not url and environ.get("DOUBLEWORD_API_KEY"):
        url = DOUBLEWORD
    if not url and environ.get("OPENAI_API_KEY"):
        url = environ.get("OPENAI_BASE_URL")
    if not url:
        raise SettingsError(
            "no server to send to. Say --base-url URL, or --upstream URL to have one started here "
            "(--upstream simulator for a trial), or set BATCHERY_BASE_URL, DOUBLEWORD_API_KEY, "
            "or OPENAI_BASE_URL with OPENAI_API_KEY"
        )
    url = normalise_base_url(url)
    name = api_key_env or _key_variable(url, environ)
    key = environ.get(name, "").strip() if name else ""
    if api_key_env and not key:
        raise SettingsError(f"--api-key-env names {api_key_env}, but that environment variable is not set")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise SettingsError(f"the key in {name} has characters that no key has; was it copied whole?")
    return Server(url, key or None, name if key else None)


def _key_variable(url: str, environ: Mapping[str, str]) -> str | None:
    """The variable whose key is bound to this server, if any is set."""
    target = origin(url)

    def bound_to(bound_url: str | None) -> bool:
        return bool(bound_url) and origin(bound_url or "") == target

    own = environ.get("BATCHERY_BASE_URL")
    openai = environ.get("OPENAI_BASE_URL") or OPENAI
    candidates = (
        ("DOUBLEWORD_API_KEY", bound_to(DOUBLEWORD)),
        ("BATCHERY_API_KEY", not own or bound_to(own)),
        ("OPENAI_API_KEY", bound_to(openai)),
    )
    # A variable made for exactly this server goes before the general one, which is only a default.
    if own and bound_to(own):
        candidates = (candidates[1], candidates[0], candidates[2])
    return next((name for name, bound in candidates if bound and environ.get(name)), None)
