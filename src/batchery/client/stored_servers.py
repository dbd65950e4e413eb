"""Servers that the user has named in the settings file, `config.toml` in `~/.config/batchery`.

    default = "work"

    [servers.work]
    base_url = "https://batch.example.com/v1"
    api_key = "sk-..."            # or: api_key_env = "WORK_KEY"

A stored key is only read from a file that nobody else can read, and is bound to the origin of its server's base URL.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from batchery.client.errors import SettingsError

MAX_BYTES = 1024 * 1024


class StoredServer(msgspec.Struct, frozen=True):
    """A server of the settings file.

    Attributes:
        api_key: the key itself; None where there is none, or it is in a variable.
        api_key_env: the variable that it is in.
        file: where it was read.
    """

    name: str
    base_url: str
    api_key: str | None
    api_key_env: str | None
    file: str

    def __repr__(self) -> str:
        """Without the key."""
        return f"StoredServer({self.name!r}, {self.base_url!r})"


class StoredServers(msgspec.Struct, frozen=True):
    """All of them.

    Attributes:
        default: the name of the one to use where none is named.
    """

    servers: Mapping[str, StoredServer] = {}
    default: str | None = None
    file: str = ""


def settings_path(environ: Mapping[str, str]) -> Path:
    """Where the settings file is: `BATCHERY_CONFIG`, else below `XDG_CONFIG_HOME`, else below `~/.config`."""
    named = environ.get("BATCHERY_CONFIG")
    if named:
        return Path(named)
    base = environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "batchery" / "config.toml"


def stored_servers(environ: Mapping[str, str]) -> StoredServers:
    """The servers of the settings file; none where there is no such file.

    Raises:
        SettingsError: it cannot be read, is wrong, or holds a key and others can read it.
    """
    path = settings_path(environ)
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        if environ.get("BATCHERY_CONFIG"):
            raise SettingsError(f"BATCHERY_CONFIG names {path}, which does not exist") from None
        return StoredServers()
    except OSError as error:
        raise SettingsError(f"the settings file {path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise SettingsError(f"the settings file {path} is larger than {MAX_BYTES} bytes")
    try:
        value = tomllib.loads(content.decode())
    except ValueError as error:
        raise SettingsError(f"the settings file {path} is not TOML: {error}") from None
    tables = value.get("servers", {})
    if type(tables) is not dict:
        raise SettingsError(f"in {path}, servers must be tables such as [servers.work]")
    servers = {name: _server(name, table, path) for name, table in tables.items()}
    if any(server.api_key for server in servers.values()) and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"{path} holds a key and others can read it; say: chmod 600 {path}")
    default = value.get("default")
    if default is not None and (type(default) is not str or default not in servers):
        raise SettingsError(f"in {path}, default names no server of the file: {default!r}")
    return StoredServers(servers, default, str(path))


def _server(name: str, table: Any, path: Path) -> StoredServer:
    place = f"in {path}, servers.{name}"
    if type(table) is not dict:
        raise SettingsError(f"{place} must be a table with base_url")
    wrong = sorted(set(table) - {"base_url", "api_key", "api_key_env"})
    if wrong:
        raise SettingsError(f"{place} has {wrong[0]!r}; it may have base_url, and api_key or api_key_env")
    for key, text in table.items():
        if type(text) is not str or not text:
            raise SettingsError(f"{place}.{key} must be a text")
    if "base_url" not in table:
        raise SettingsError(f"{place} needs base_url")
    if "api_key" in table and "api_key_env" in table:
        raise SettingsError(f"{place} has both api_key and api_key_env; keep one")
    return StoredServer(name, table["base_url"], table.get("api_key"), table.get("api_key_env"), str(path))
