"""Servers of the settings file: found, bound to their keys, and refused where others can read the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchery.client.errors import SettingsError
from batchery.client.server import OPENAI, resolve_server
from batchery.client.stored_servers import StoredServers, stored_servers

TWO = """
default = "work"

[servers.work]
base_url = "https://work.example:1"
api_key = "sk-work"

[servers.home]
base_url = "http://home/v1"
api_key_env = "HOME_KEY"
"""


def read(tmp_path: Path, text: str, mode: int = 0o600) -> StoredServers:
    path = tmp_path / "config.toml"
    path.write_text(text)
    path.chmod(mode)
    return stored_servers({"BATCHERY_CONFIG": str(path)})


@pytest.mark.parametrize(
    ("base_url", "name", "environ", "server"),
    [
        (None, None, {}, ("https://work.example:1/v1", "sk-work")),  # the default
        (None, "work", {"BATCHERY_BASE_URL": "http://b"}, ("https://work.example:1/v1", "sk-work")),
        (None, "home", {"HOME_KEY": "sk-home"}, ("http://home/v1", "sk-home")),
        (None, "openai", {"OPENAI_API_KEY": "o"}, (OPENAI, "o")),
        # The environment goes before the file.
        (None, None, {"BATCHERY_BASE_URL": "http://b", "BATCHERY_API_KEY": "b"}, ("http://b/v1", "b")),
        # A stored key goes to its own origin only.
        ("https://work.example:1/v2", None, {}, ("https://work.example:1/v2", "sk-work")),
        ("https://work.example:2", None, {}, ("https://work.example:2/v1", None)),
        ("http://work.example:1", None, {}, ("http://work.example:1/v1", None)),
        ("https://work.example.evil:1", None, {}, ("https://work.example.evil:1/v1", None)),
        (None, None, {"BATCHERY_BASE_URL": "http://b"}, ("http://b/v1", None)),
    ],
)
def test_server_and_key(
    tmp_path: Path, base_url: str | None, name: str | None, environ: dict[str, str], server: tuple[str, str | None]
) -> None:
    found = resolve_server(base_url, None, environ, stored=read(tmp_path, TWO), name=name)
    assert (found.base_url, found.api_key) == server
    assert "sk-" not in repr(found)
    assert "sk-" not in repr(read(tmp_path, TWO))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(SettingsError, match="chmod 600"):
        read(tmp_path, TWO, mode)


def test_without_a_key_anybody_may_read_it(tmp_path: Path) -> None:
    assert read(tmp_path, '[servers.a]\nbase_url = "http://a"\n', 0o644).servers["a"].api_key is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("servers", "is not TOML"),
        ("servers = 1", "must be tables"),
        ("[servers.a]\n", "needs base_url"),
        ('[servers.a]\nbase_url = "http://a"\nkey = "x"\n', "'key'"),
        ("[servers.a]\nbase_url = 1\n", "must be a text"),
        ('[servers.a]\nbase_url = "http://a"\napi_key = "x"\napi_key_env = "Y"\n', "keep one"),
        ('default = "b"\n[servers.a]\nbase_url = "http://a"\n', "default"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read(tmp_path, text)


def test_no_file_is_no_server_unless_it_is_named(tmp_path: Path) -> None:
    assert not stored_servers({"XDG_CONFIG_HOME": str(tmp_path)}).servers
    with pytest.raises(SettingsError, match="does not exist"):
        stored_servers({"BATCHERY_CONFIG": str(tmp_path / "none")})


def test_two_ways_to_name_a_server_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="say one of them"):
        resolve_server("http://a", None, {}, stored=read(tmp_path, TWO), name="work")
    with pytest.raises(SettingsError, match="HOME_KEY"):
        resolve_server(None, None, {}, stored=read(tmp_path, TWO), name="home")
