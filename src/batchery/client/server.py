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
from batchery.client.stored_servers import StoredServer, StoredServers

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
        key_from: the environment variable or the file that the key came from, for messages.
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


KNOWN = {"doubleword": DOUBLEWORD, "openai": OPENAI}
"""Servers that have a name without any settings."""


def resolve_server(
    base_url: str | None,
    api_key_env: str | None,
    environ: Mapping[str, str],
    *,
    stored: StoredServers | None = None,
    name: str | None = None,
) -> Server:
    """The server and its key: options first, then `BATCHERY_BASE_URL` with `BATCHERY_API_KEY`, then
    `DOUBLEWORD_API_KEY`, then `OPENAI_BASE_URL` with `OPENAI_API_KEY`, then the settings file's default.

    Args:
        base_url: as given by option; with or without `/v1`.
        api_key_env: the name of the variable that holds the key, where the user names one.
        environ: the process's environment.
        stored: the servers of the settings file.
        name: of one of them, or of `KNOWN`, as given by option.

    Raises:
        SettingsError: no server is named anywhere, a URL or name is wrong, or the named variable is empty.
    """
    stored = stored or StoredServers()
    entry: StoredServer | None = None
    if name is not None:
        if base_url is not None:
            raise SettingsError("--server and --base-url both name a server; say one of them")
        entry = stored.servers.get(name)
        if entry is None and name not in KNOWN:
            names = ", ".join(sorted({*KNOWN, *stored.servers}))
            raise SettingsError(f"--server {name}: there is no such server; known are {names}")
    url = base_url or (entry.base_url if entry else KNOWN.get(name or "")) or _url_of_environment(environ)
    if not url and stored.default:
        entry = stored.servers[stored.default]
        url = entry.base_url
    if not url:
        raise SettingsError(
            "no server to send to. Say --base-url URL, or --upstream URL to have one started here "
            "(--upstream simulator for a trial), or set BATCHERY_BASE_URL, DOUBLEWORD_API_KEY, "
            "or OPENAI_BASE_URL with OPENAI_API_KEY"
        )
    url = normalise_base_url(url)
    if api_key_env:
        key, source = environ.get(api_key_env, "").strip(), api_key_env
        if not key:
            raise SettingsError(f"--api-key-env names {api_key_env}, but that environment variable is not set")
    elif entry is not None and (entry.api_key or entry.api_key_env):
        key, source = _stored_key(entry, environ)
    else:
        source = _key_variable(url, environ) or ""
        key = environ.get(source, "").strip() if source else ""
        if not key:
            bound = [s for s in stored.servers.values() if origin(s.base_url) == origin(url)]
            key, source = _stored_key(bound[0], environ) if bound else ("", "")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise SettingsError(f"the key in {source} has characters that no key has; was it copied whole?")
    return Server(url, key or None, source if key else None)


def _url_of_environment(environ: Mapping[str, str]) -> str | None:
    url = environ.get("BATCHERY_BASE_URL")
    if not url and environ.get("DOUBLEWORD_API_KEY"):
        url = DOUBLEWORD
    if not url and environ.get("OPENAI_API_KEY"):
        url = environ.get("OPENAI_BASE_URL")
    return url


def _stored_key(entry: StoredServer, environ: Mapping[str, str]) -> tuple[str, str]:
    """The key of a server of the settings file, and where it is from."""
    if entry.api_key_env is None:
        return (entry.api_key or "").strip(), entry.file
    key = environ.get(entry.api_key_env, "").strip()
    if not key:
        raise SettingsError(f"{entry.file} says that the key of {entry.name} is in {entry.api_key_env}; it is not set")
    return key, entry.api_key_env


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
