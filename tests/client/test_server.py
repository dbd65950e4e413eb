"""Which server, and which key goes to it."""

from __future__ import annotations

import pytest

from batchery.client.errors import SettingsError
from batchery.client.server import DOUBLEWORD, OPENAI, Server, normalise_base_url, resolve_server


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("https://api.doubleword.ai", "https://api.doubleword.ai/v1"),
        ("https://api.doubleword.ai/v1", "https://api.doubleword.ai/v1"),
        ("https://api.doubleword.ai/v1/", "https://api.doubleword.ai/v1"),
        ("https://api.doubleword.ai/ai/v1", "https://api.doubleword.ai/ai/v1"),
        (" http://127.0.0.1:8080 ", "http://127.0.0.1:8080/v1"),
        ("http://[::1]:8080/", "http://[::1]:8080/v1"),
        ("HTTPS://Example.COM/api/v4", "https://example.com/api/v4"),
    ],
)
def test_base_urls_with_or_without_their_version(url: str, normal: str) -> None:
    assert normalise_base_url(url) == normal


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8080", "ftp://host", "https://", "https://user:pw@host", "https://host?x=1", "http://h:99999"],
)
def test_base_urls_that_are_none(url: str) -> None:
    with pytest.raises(SettingsError):
        normalise_base_url(url)


ALL = {"BATCHERY_API_KEY": "b", "DOUBLEWORD_API_KEY": "d", "OPENAI_API_KEY": "o"}


@pytest.mark.parametrize(
    ("base_url", "api_key_env", "environ", "server"),
    [
        # The order in which the environment is asked.
        (None, None, {**ALL, "BATCHERY_BASE_URL": "http://b"}, ("http://b/v1", "b")),
        (None, None, ALL, (DOUBLEWORD, "d")),
        (None, None, {"OPENAI_BASE_URL": "https://o/v1", "OPENAI_API_KEY": "o"}, ("https://o/v1", "o")),
        ("http://x", None, {**ALL, "BATCHERY_BASE_URL": "http://b"}, ("http://x/v1", None)),
        # A named server gets the key that is its own, or the general one.
        ("http://x", None, ALL, ("http://x/v1", "b")),
        ("http://x", None, {"DOUBLEWORD_API_KEY": "d", "OPENAI_API_KEY": "o"}, ("http://x/v1", None)),
        ("https://api.doubleword.ai", None, ALL, (DOUBLEWORD, "d")),
        ("https://api.openai.com", None, {"OPENAI_API_KEY": "o"}, (OPENAI, "o")),
        ("https://o:1", None, {"OPENAI_BASE_URL": "https://o:1/v1", "OPENAI_API_KEY": "o"}, ("https://o:1/v1", "o")),
        ("https://o:2", None, {"OPENAI_BASE_URL": "https://o:1/v1", "OPENAI_API_KEY": "o"}, ("https://o:2/v1", None)),
        (OPENAI, None, {"OPENAI_BASE_URL": "https://o:1/v1", "OPENAI_API_KEY": "o"}, (OPENAI, None)),
        # Neither another port, another host that only looks alike, nor plain HTTP is the same server.
        (
            "https://api.doubleword.ai:444",
            None,
            {"DOUBLEWORD_API_KEY": "d"},
            ("https://api.doubleword.ai:444/v1", None),
        ),
        ("http://api.doubleword.ai", None, {"DOUBLEWORD_API_KEY": "d"}, ("http://api.doubleword.ai/v1", None)),
        (
            "https://api.doubleword.ai.evil",
            None,
            {"DOUBLEWORD_API_KEY": "d"},
            ("https://api.doubleword.ai.evil/v1", None),
        ),
        ("https://b", None, {"BATCHERY_BASE_URL": "http://b", "BATCHERY_API_KEY": "b"}, ("https://b/v1", None)),
        # Naming a variable settles it.
        ("http://x", "MY_KEY", {**ALL, "MY_KEY": "m"}, ("http://x/v1", "m")),
        (None, "MY_KEY", {**ALL, "MY_KEY": "m", "BATCHERY_BASE_URL": "http://b"}, ("http://b/v1", "m")),
    ],
)
def test_server_and_key(
    base_url: str | None, api_key_env: str | None, environ: dict[str, str], server: tuple[str, str | None]
) -> None:
    found = resolve_server(base_url, api_key_env, environ)
    assert (found.base_url, found.api_key) == server


def test_no_server_named_anywhere() -> None:
    with pytest.raises(SettingsError, match="no server to send to"):
        resolve_server(None, None, {"OPENAI_API_KEY": "o", "BATCHERY_API_KEY": "b"})


def test_a_named_key_must_be_there_and_look_like_one() -> None:
    with pytest.raises(SettingsError, match="MY_KEY"):
        resolve_server("http://x", "MY_KEY", {})
    with pytest.raises(SettingsError, match="copied whole"):
        resolve_server("http://x", "MY_KEY", {"MY_KEY": "sk-1\nsk-2"})


def test_no_key_in_a_representation() -> None:
    assert "secret" not in repr(Server("http://x/v1", "secret", "MY_KEY"))
