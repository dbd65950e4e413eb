"""The server that a job has for itself, as far as no process is needed for it."""

from __future__ import annotations

import socket

import pytest

from batchery.client.local_server import silent_upstreams


def test_an_upstream_without_a_connection_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        there, not_there = (f"http://127.0.0.1:{found.getsockname()[1]}" for found in (listening, bound))
        (warning,) = silent_upstreams(f"{there},{not_there}/v1")
        assert f"{not_there}/v1 (Connection refused)" in warning
        assert not list(silent_upstreams("simulator"))
        monkeypatch.setenv("HTTPS_PROXY", there)
        assert not list(silent_upstreams("https://models.invalid"))
        assert list(silent_upstreams(not_there))
